"""Batch norm over the images of all processes. One image per GPU, as the paper trains, is too few for statistics."""

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn


def synchronized(module: nn.Module, cfg: CfgNode) -> nn.Module:
    """The module with its batch norms turned into SyncBatchNorm if MODEL.CASNET.SYNC_BN says so and it can be done: there are
    several processes, and they have GPUs. Names and values of the weights stay the same."""
    possible = comm.get_world_size() > 1 and cfg.MODEL.DEVICE.startswith("cuda")
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if cfg.MODEL.CASNET.SYNC_BN and possible else module
