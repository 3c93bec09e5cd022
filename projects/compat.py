"""The places where Detectron2 0.6 and its main branch differ and this project needs both."""

import torch.distributed as dist
from detectron2.utils import comm


def create_local_process_group(processes_per_machine: int) -> None:
    """Tell Detectron2 which processes share a machine. Every process calls it once, after ``init_process_group``."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes_per_machine)
        return
    machine = dist.get_rank() // processes_per_machine
    for i in range(dist.get_world_size() // processes_per_machine):
        group = dist.new_group(range(i * processes_per_machine, (i + 1) * processes_per_machine))
        if i == machine:
            comm._LOCAL_PROCESS_GROUP = group
