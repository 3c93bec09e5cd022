"""Cityscapes' label table, as `cityscapesscripts` has it, in the forms that data sets and evaluators take.

Label ids 0 to 33 stand in labelIds.png. instanceIds.png holds label id * 1000 + n for an instance, and the plain label id for
stuff and for groups, whose single objects nobody could tell apart. Train ids 0 to 18 number the classes that the benchmark
evaluates; everything else is 255.
"""

from cityscapesscripts.helpers.labels import labels

LABELS = {label.id: label for label in labels if label.id >= 0}
INSTANCES = 1000  # ids from here on are label id * INSTANCES + n
IGNORED = 255

THINGS = [i for i, label in LABELS.items() if label.hasInstances and not label.ignoreInEval]
"""The benchmark's 8 classes: person, rider, car, truck, bus, train, motorcycle, bicycle."""

THINGS_10 = [i for i, label in LABELS.items() if label.hasInstances]
"""With caravan and trailer, which the benchmark ignores: the classes of GAN Mask R-CNN (section 4.4)."""

LABEL_OF_TRAIN_ID = sorted((i for i, label in LABELS.items() if label.trainId != IGNORED), key=lambda i: LABELS[i].trainId)
"""The label ids of the 19 classes of semantic segmentation, in the order of their train ids."""

TRAIN_ID_TABLE = bytes(LABELS[i].trainId if i in LABELS else IGNORED for i in range(256))
"""Label id -> train id (see :func:`projects.data.mapper.training_labels`)."""


def label_of(instance_id: int) -> int:
    """The label id of a value of instanceIds.png."""
    return instance_id // INSTANCES if instance_id >= INSTANCES else instance_id


def class_metadata(things: list[int] | None, semantic: bool) -> dict:
    """Detectron2's metadata for a list of thing label ids, the 19 semantic classes, or both.

    ``thing_dataset_id_to_contiguous_id`` and ``stuff_dataset_id_to_contiguous_id`` lead from label ids to the positions in
    ``thing_classes`` and ``stuff_classes``; the latter are all 19 classes, things included, so that a position is a train id.
    """
    metadata = {}
    for kind, ids in (("thing", things), ("stuff", LABEL_OF_TRAIN_ID if semantic else None)):
        if ids is not None:
            metadata[f"{kind}_classes"] = [LABELS[i].name for i in ids]
            metadata[f"{kind}_colors"] = [list(LABELS[i].color) for i in ids]
            metadata[f"{kind}_dataset_id_to_contiguous_id"] = {i: position for position, i in enumerate(ids)}
    if semantic:
        metadata |= {"ignore_label": IGNORED, "label_id_of_train_id": list(LABEL_OF_TRAIN_ID)}
    return metadata
