"""JointPanopticFPN: which classes are stuff, and how instances and the semantic map are combined."""

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances

from projects import load_config
from projects.errors import ConfigError
from projects.modeling.panoptic_fpn import JointPanopticFPN

ROAD, SKY, CAR = 0, 1, 2  # semantic classes; a car is thing class 0
SIZE = (4, 8)


@pytest.fixture
def model():
    model = JointPanopticFPN.__new__(JointPanopticFPN)  # `combine` wants the settings only
    torch.nn.Module.__init__(model)
    model.stuff_ids = (ROAD, SKY)
    model.combine_overlap_thresh, model.combine_stuff_area_thresh, model.combine_instances_score_thresh = 0.5, 3, 0.5
    return model


def found(*boxes_and_scores: tuple[int, int, float]) -> Instances:
    """Cars over whole columns x0 to x1."""
    masks = torch.zeros(len(boxes_and_scores), *SIZE, dtype=torch.bool)
    for mask, (x0, x1, _) in zip(masks, boxes_and_scores, strict=True):
        mask[:, x0:x1] = True
    scores = torch.tensor([score for *_, score in boxes_and_scores])
    return Instances(SIZE, pred_masks=masks, scores=scores, pred_classes=torch.zeros(len(masks), dtype=torch.int64))


def columns(*labels: int) -> torch.Tensor:
    return torch.tensor(labels).expand(SIZE)


def described(segments: torch.Tensor, infos: list[dict]) -> list:
    """Per column "void" or (is it a thing, category)."""
    names = {0: "void"} | {s["id"]: (s["isthing"], s["category_id"]) for s in infos}
    assert (segments == segments[:1]).all()
    return [names[int(i)] for i in segments[0]]


def test_instances_first_then_stuff_and_void_where_the_map_says_thing(model):
    labels = columns(ROAD, ROAD, CAR, CAR, CAR, SKY, SKY, SKY)
    car, road, sky = (True, 0), (False, ROAD), (False, SKY)
    segments, infos = model.combine(found((1, 3, 0.9), (6, 8, 0.4)), labels)  # the second scores too little
    assert described(segments, infos) == [road, car, car, "void", "void", sky, sky, sky]
    assert segments.dtype == torch.int32 and len(infos) == 3
    segments, infos = model.combine(found((1, 3, 0.6), (2, 6, 0.9)), labels)  # better scores first, then what is left
    assert described(segments, infos) == [road, car, car, car, car, car, sky, sky]
    assert len({int(i) for i in segments[0]}) == 4 and int(segments[0, 2]) == int(segments[0, 5]) != int(segments[0, 1])
    segments, infos = model.combine(found((1, 3, 0.6), (1, 6, 0.9)), labels)  # covered by more than half: left out
    assert len(infos) == 3


def test_nothing_but_stuff_and_small_stuff_left_out(model):
    segments, infos = model.combine(found(), columns(ROAD, *[SKY] * 7))
    assert [s["category_id"] for s in infos] == [ROAD, SKY] and not any(s["isthing"] for s in infos)
    model.combine_stuff_area_thresh = 5  # a column has four pixels
    assert described(*model.combine(found(), columns(ROAD, *[SKY] * 7)))[0] == "void"
    assert model.combine(found(), columns(*[CAR] * 8))[1] == []


@pytest.fixture
def cfg():
    from pathlib import Path

    config = Path(__file__).resolve().parents[2] / "configs/baseline/shapes_cityscapes_panoptic_fpn_R_18.yaml"
    return load_config(str(config), ["MODEL.DEVICE", "cpu"])


def test_stuff_comes_from_the_data_set(cfg):
    names = MetadataCatalog.get("cityscapes_panoptic_train").stuff_classes
    cfg.MODEL.DEVICE = "meta"
    model = build_model(cfg)
    assert [names[k] for k in model.stuff_ids] == names[:11]
    assert names[10:12] == ["sky", "person"]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("shapes_val_panoptic",)
    assert build_model(cfg).stuff_ids == (8, 9, 10)
    for train in ((), ("cityscapes_semantic_train",), ("shapes_cityscapes_instance_train",)):
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, ()
        with pytest.raises(ConfigError, match="which classes are stuff"):
            build_model(cfg)


def test_inference_gives_all_three_at_the_images_size(cfg):
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.0
    model = build_model(cfg).eval()
    with torch.no_grad():
        (output,) = model([{"image": torch.rand(3, 64, 96) * 255, "height": 40, "width": 60}])
        detections, logits = model.inference([{"image": torch.zeros(3, 64, 96)}], do_postprocess=False)
    ids, infos = output["panoptic_seg"]
    assert output["sem_seg"].shape == (19, 40, 60) and output["instances"].image_size == ids.shape == (40, 60)
    assert {s["id"] for s in infos} | {0} >= set(ids.unique().tolist())
    labels = output["sem_seg"].argmax(dim=0)
    for segment in infos:
        if not segment["isthing"]:
            assert segment["category_id"] < 11 and (labels[ids == segment["id"]] == segment["category_id"]).all()
    assert detections[0].image_size == (64, 96) and logits.shape[1] == 19
