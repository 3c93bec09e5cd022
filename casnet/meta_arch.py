"""CASNet (section III, figure 2): backbone, three heads on one map, post-processing.

Shapes: N images of H x W pixels (padded), h x w cells of the grid, s = OUTPUT_STRIDE pixels per cell, C semantic classes (all
of them for the task "panoptic", the things and a background for "instance"), K thing classes.
"""

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn

from projects.errors import ConfigError, DataError

from .heads import FeatureFusion, PixelHead
from .losses import IGNORED, attribute_loss, enlarge, probability_loss, semantic_loss
from .norm import synchronized
from .panoptic import panoptic_map
from .postprocess import CommonAttributeSupport, thing_classes
from .semantics import SemanticNetwork, build_semantic_network
from .targets import UNCOUNTED, GridTargets, grid_targets

TASKS, MODES = ("panoptic", "instance"), ("joint", "separated", "oracle")
TRAINS_JOINT = (
    "MODEL.CASNET.MODE '{mode}' differs from 'joint' at inference only: this training repeats that of the config of 'joint'. "
    "To evaluate that config's weights instead, pass --eval-only MODEL.WEIGHTS <its model_final.pth>."
)
PRIOR = 0.01  # box probability that an untrained head predicts, as in RetinaNet and FCOS: few positions are central


@META_ARCH_REGISTRY.register()
class CASNet(nn.Module):
    """One-stage instance and panoptic segmentation.

    In all modes the same is trained; they differ in where the semantic map comes from at inference: from the own semantic head
    ("joint"), from a second network ("separated"), or from the input's "sem_seg" ("oracle").
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        fusion: FeatureFusion,
        heads: nn.ModuleDict,
        support: CommonAttributeSupport,
        task: str,
        mode: str,
        thing_labels: Sequence[int],
        semantic_network: SemanticNetwork | None,
        output_stride: int,
        central_area: float,
        positive_weight: float,
        loss_weights: tuple[float, float, float],
        semantic_score: bool,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """
        Args:
            backbone: gives the maps that ``fusion`` takes.
            heads: "semantic" (C channels), "attributes" (4) and "probability" (K), from the fused map.
            support: the post-processing.
            task: "panoptic" or "instance"; panoptic models give "sem_seg" and "panoptic_seg" too.
            mode: "joint", "separated" or "oracle".
            thing_labels: K, the labels of the thing classes in the semantic map of that mode.
            semantic_network: of the mode "separated".
            output_stride: s.
            central_area, positive_weight: see :func:`.grid_targets` and :func:`.probability_loss`.
            loss_weights: alpha, beta and gamma of equation 4.
            semantic_score: whether scores are multiplied by the semantic probability.
            pixel_mean, pixel_std: per channel, of the input's values.
        """
        super().__init__()
        self.backbone, self.fusion, self.heads = backbone, fusion, heads
        self.support, self.semantic_network = support, semantic_network
        self.task, self.mode, self.thing_labels = task, mode, list(thing_labels)
        self.output_stride, self.central_area, self.positive_weight = output_stride, central_area, positive_weight
        self.loss_weights, self.semantic_score = loss_weights, semantic_score
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        casnet, num_things = cfg.MODEL.CASNET, cfg.MODEL.ROI_HEADS.NUM_CLASSES
        for key, known in (("TASK", TASKS), ("MODE", MODES)):
            if casnet[key] not in known:
                raise ConfigError(f"MODEL.CASNET.{key} is '{casnet[key]}': expected one of {', '.join(known)}.")
        backbone = build_backbone(cfg)
        fusion = FeatureFusion(cfg, backbone.output_shape())
        num_labels = num_things + 1 if casnet.TASK == "instance" else cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        channels = {"semantic": num_labels, "attributes": 4, "probability": num_things}
        heads = nn.ModuleDict({name: PixelHead(fusion.channels, count) for name, count in channels.items()})
        nn.init.constant_(heads["probability"][3].bias, math.log(PRIOR / (1 - PRIOR)))
        return {
            "backbone": backbone,
            "fusion": fusion,
            "heads": synchronized(heads, cfg),
            "support": CommonAttributeSupport(cfg),
            "task": casnet.TASK,
            "mode": casnet.MODE,
            "thing_labels": labels_of_things(cfg),
            "semantic_network": build_semantic_network(cfg) if casnet.MODE == "separated" else None,
            "output_stride": casnet.OUTPUT_STRIDE,
            "central_area": casnet.CENTRAL_AREA,
            "positive_weight": casnet.POSITIVE_WEIGHT,
            "loss_weights": (casnet.ALPHA, casnet.BETA, casnet.GAMMA),
            "semantic_score": casnet.SEMANTIC_SCORE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def size_divisibility(self) -> int:
        """Of which the sides of padded images are multiples: 32 at least, so that the maps of a pyramid fit the grid."""
        return max(self.backbone.size_divisibility, 32)

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: per image "image" (3, H, W), "height" and "width" of the output; in training what
                :class:`.CASNetMapper` adds; in mode "oracle" at inference "sem_seg" (height, width).

        Returns:
            In training the losses. At inference per image "instances" and "common_attributes", a dict of "distances" (4, h, w)
            in cells, "seeds" (:class:`.Seeds`), and "grid_size", height and width of the image in cells. For the task
            "panoptic" also "sem_seg", logits (C, height, width) (in mode "oracle" 1 for the given label and 0), and
            "panoptic_seg" (see :func:`.panoptic_map`).
        """
        images = [(image["image"].to(self.device) - self.pixel_mean) / self.pixel_std for image in batched_inputs]
        images = ImageList.from_tensors(images, self.size_divisibility)
        fused = self.fusion(self.backbone(images.tensor))
        distances = F.softplus(self.heads["attributes"](fused).float())
        probability = self.heads["probability"](fused)
        if self.training:
            if self.mode != "joint" and torch.is_grad_enabled():  # without gradients it is a validation loss
                log_first_n(logging.WARNING, TRAINS_JOINT.format(mode=self.mode), key="message")
            targets, labels = self.targets(batched_inputs)
            alpha, beta, gamma = self.loss_weights
            return {
                "loss_semantic": alpha * semantic_loss(self.heads["semantic"](fused), labels),
                "loss_attributes": beta * attribute_loss(distances, targets.distances, targets.things),
                "loss_probability": gamma
                * probability_loss(probability, targets.central, targets.counted, self.positive_weight),
            }
        semantic = self.semantic_maps(batched_inputs, fused, images.image_sizes)
        parts = zip(semantic, distances, probability.float().sigmoid(), images.image_sizes, strict=True)
        return [self.inference(*part) for part in parts]

    def targets(self, batched_inputs: list[dict]) -> tuple[GridTargets, Tensor]:
        """The targets of a batch on the grid, and the labels (N, H, W). Raises DataError where an input has none."""
        for image in batched_inputs:
            if "owner" not in image or "sem_seg" not in image:
                raise DataError(
                    f"CASNet trains on what CASNetMapper makes of annotations, and the input of '{image.get('file_name')}' has "
                    "no 'owner' or 'sem_seg'. Set INPUT.MAPPER to CASNetMapper and DATASETS.TRAIN to data with instances."
                )

        def stacked(key: str, padding: int) -> Tensor:
            maps = [image[key].to(self.device) for image in batched_inputs]
            return ImageList.from_tensors(maps, self.size_divisibility, padding).tensor

        num_classes = self.heads["probability"].out_channels
        of_images = [
            grid_targets(
                owner,
                image["instances"].gt_boxes.tensor.to(self.device),
                image["instances"].gt_classes.to(self.device),
                self.output_stride,
                num_classes,
                self.central_area,
            )
            for owner, image in zip(stacked("owner", UNCOUNTED), batched_inputs, strict=True)
        ]
        return GridTargets(*map(torch.stack, zip(*of_images, strict=True))), stacked("sem_seg", IGNORED)

    def semantic_maps(self, batched_inputs: list[dict], fused: Tensor, image_sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Per image the semantic scores (C, height, width), or in mode "oracle" the labels (height, width)."""
        sizes = [
            (image.get("height", size[0]), image.get("width", size[1]))
            for image, size in zip(batched_inputs, image_sizes, strict=True)
        ]
        if self.mode == "separated":
            return self.semantic_network(batched_inputs, self.device)
        if self.mode == "oracle":
            return [self.given_labels(image, size) for image, size in zip(batched_inputs, sizes, strict=True)]
        logits = self.heads["semantic"](fused).float()
        logits = enlarge(logits, [side * self.output_stride for side in logits.shape[-2:]])
        parts = zip(logits, image_sizes, sizes, strict=True)
        return [enlarge(of_image[None, :, :h, :w], size)[0] for of_image, (h, w), size in parts]

    def given_labels(self, image: dict, size: tuple[int, int]) -> Tensor:
        """The "sem_seg" of an input. Raises ConfigError where there is none, DataError where it has another size."""
        if "sem_seg" not in image:
            raise ConfigError(
                "MODEL.CASNET.MODE 'oracle' takes the semantic ground truth at inference: expected the field 'sem_seg' in "
                f"every input, found only {', '.join(image)}. Evaluate with train_net.py --eval-only on annotated data, where "
                "CASNetMapper gives it, or set MODEL.CASNET.MODE to 'joint'."
            )
        if tuple(image["sem_seg"].shape) != tuple(size):
            raise DataError(f"The semantic ground truth is {tuple(image['sem_seg'].shape)} (height, width), the output {size}.")
        return image["sem_seg"].to(self.device)

    def inference(self, semantic: Tensor, distances: Tensor, probabilities: Tensor, image_size: tuple[int, int]) -> dict:
        """The output of an image: see :meth:`forward`.

        Args:
            semantic: scores (C, height, width) or labels (height, width).
            distances: (4, h, w); probabilities: (K, h, w).
            image_size: of the image in the network, without padding.
        """
        given = semantic.dim() == 2
        labels = semantic if given else semantic.argmax(dim=0)
        certainty = None if given or not self.semantic_score else semantic.softmax(dim=0).amax(dim=0)
        grid_size = tuple(side / self.output_stride for side in image_size)
        classes = thing_classes(labels, self.thing_labels)
        instance_of_pixel, instances, seeds = self.support(classes, distances, probabilities, grid_size, certainty)
        output = {
            "instances": instances,
            "common_attributes": {"distances": distances, "seeds": seeds, "grid_size": grid_size},
        }
        if self.task == "panoptic":
            num_labels = self.heads["semantic"].out_channels
            output["sem_seg"] = one_hot(labels, num_labels) if given else semantic
            output["panoptic_seg"] = panoptic_map(labels, instance_of_pixel, instances, self.thing_labels)
        return output


def labels_of_things(cfg: CfgNode) -> list[int]:
    """The labels of the thing classes in the semantic map that is used at inference.

    Raises ConfigError when MODEL.CASNET.THING_LABELS does not name a different semantic class for each thing class.
    """
    casnet, num_things, num_labels = cfg.MODEL.CASNET, cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if casnet.TASK == "instance" and casnet.MODE != "separated":
        return list(range(num_things))
    labels = list(casnet.THING_LABELS)
    if len(set(labels)) != num_things or len(labels) != num_things or not set(labels) <= set(range(num_labels)):
        raise ConfigError(
            f"MODEL.CASNET.THING_LABELS is {labels}: expected {num_things} different numbers (MODEL.ROI_HEADS.NUM_CLASSES) "
            f"from 0 to {num_labels - 1} (MODEL.SEM_SEG_HEAD.NUM_CLASSES less one)."
        )
    return labels


def one_hot(labels: Tensor, count: int) -> Tensor:
    """Labels (H, W) -> (count, H, W) float: 1 at the label; all 0 where it is 255."""
    return (labels == torch.arange(count, device=labels.device)[:, None, None]).float()
