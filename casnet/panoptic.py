"""The panoptic map: instances, and around them the stuff of the semantic map. It has no overlaps and needs no heuristics.

Shapes: H x W pixels, R instances.
"""

from collections.abc import Sequence

import torch
from detectron2.structures import Instances
from torch import Tensor

VOID = 0
LABELS = 256


def panoptic_map(
    labels: Tensor, instance_of_pixel: Tensor, instances: Instances, thing_labels: Sequence[int]
) -> tuple[Tensor, list[dict]]:
    """
    Args:
        labels: (H, W) semantic labels; 255 where there is none.
        instance_of_pixel: (H, W): a position in ``instances``, or a negative number.
        instances: R, with ``pred_classes`` and ``scores``.
        thing_labels: the semantic labels that are things.

    Returns:
        (H, W) int32: VOID (no label, or a thing class without a seed), 1 to R the instances, then the stuff classes that
        there are; and of each segment "id", "isthing", "category_id" (a thing class, or a semantic label), "area" and for
        things "score" and "instance_id".
    """
    count = len(instances)
    areas = torch.bincount(labels.flatten().long(), minlength=LABELS)
    areas[[*thing_labels, LABELS - 1]] = 0
    stuff = areas.nonzero().squeeze(1)
    ids = torch.full((LABELS,), VOID, dtype=torch.int32, device=labels.device)
    ids[stuff] = torch.arange(count + 1, count + 1 + len(stuff), dtype=torch.int32, device=labels.device)
    segments = torch.where(instance_of_pixel >= 0, instance_of_pixel.int() + 1, ids[labels.long()])

    things = zip(
        instances.pred_classes.tolist(),
        instances.scores.tolist(),
        torch.bincount(segments.flatten(), minlength=count + 1)[1 : count + 1].tolist(),
        strict=True,
    )
    infos = [
        {"id": i + 1, "isthing": True, "category_id": category, "area": area, "score": score, "instance_id": i}
        for i, (category, score, area) in enumerate(things)
    ]
    infos += [
        {"id": count + 1 + i, "isthing": False, "category_id": label, "area": area}
        for i, (label, area) in enumerate(zip(stuff.tolist(), areas[stuff].tolist(), strict=True))
    ]
    return segments, infos
