"""Pictures: exact colours at known pixels, contours, holes, odd input, geometry."""

import copy
import importlib
import itertools

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import read_image
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints, PolygonMasks
from PIL import Image

from projects.canvas import Canvas, distinct_colors
from projects.drawables import binary_mask
from projects.visualization import (
    GAP,
    TITLE_HEIGHT,
    contact_sheet,
    draw,
    draw_comparison,
    draw_panoptic,
    draw_semantic,
)

RED, GREEN, BLUE, SKY, GRASS = (220, 20, 60), (10, 200, 30), (40, 60, 250), (70, 130, 180), (150, 160, 20)
GREY = 90


@pytest.fixture
def metadata() -> Metadata:
    return Metadata(
        name="drawn",
        thing_classes=["disk", "ring", "star"],
        thing_colors=[RED, GREEN, BLUE],
        stuff_classes=["things", "sky", "grass"],
        stuff_colors=[(0, 0, 0), SKY, GRASS],
    )


@pytest.fixture
def image() -> np.ndarray:
    return np.full((450, 500, 3), GREY, np.uint8)


def blended(color, alpha=0.45):
    return tuple(round(GREY * (1 - alpha) + c * alpha) for c in color)


def square(x0=100, y0=150, x1=300, y1=350, hole=None, size=(450, 500)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    if hole:
        mask[hole[1] : hole[3], hole[0] : hole[2]] = False
    return mask


def instances(masks, classes, boxes=None, scores=None, size=(450, 500)) -> Instances:
    result = Instances(size)
    result.pred_masks = torch.from_numpy(np.array(masks, bool).reshape(-1, *size))
    result.pred_classes = torch.tensor(classes, dtype=torch.int64)
    if boxes is not None:
        result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    if scores is not None:
        result.scores = torch.tensor(scores)
    return result


def pixel(picture, x, y):
    return tuple(picture[y, x].tolist())


def test_colours_are_exact_inside_on_the_contour_and_outside(image, metadata):
    picture = draw(image, instances([square()], [1], boxes=[[80, 120, 320, 380]]), metadata, color_by="class")
    assert picture.shape == image.shape and picture.dtype == np.uint8
    assert pixel(picture, 250, 300) == blended(GREEN)
    for x, y in ((100, 250), (299, 250), (200, 150), (200, 349)):  # first and last pixels of the mask
        assert pixel(picture, x, y) == GREEN
    for x, y in ((80, 300), (319, 300), (300, 120), (300, 379)):  # first and last pixels of the box
        assert pixel(picture, x, y) == GREEN
    for x, y in ((310, 250), (79, 300), (320, 300), (300, 380), (450, 20)):
        assert pixel(picture, x, y) == (GREY,) * 3
    assert (image == GREY).all(), "the image itself was painted on"


def test_alpha_is_the_opacity(image, metadata):
    picture = draw(image, instances([square()], [0]), metadata, "class", alpha=0.8)
    assert pixel(picture, 250, 300) == blended(RED, 0.8)


def test_hole_is_outlined_and_not_filled(image, metadata):
    found = instances([square(hole=(160, 180, 250, 300))], [2], boxes=[[100, 150, 300, 350]])
    picture = draw(image, found, metadata, color_by="class")
    assert pixel(picture, 205, 240) == (GREY,) * 3
    assert pixel(picture, 130, 320) == blended(BLUE)
    for x, y in ((159, 240), (250, 240), (205, 179), (205, 300)):  # the mask's pixels that touch the hole
        assert pixel(picture, x, y) == BLUE


def test_every_instance_has_its_own_colour(image, metadata):
    found = instances([square(10, 10, 100, 100), square(200, 200, 400, 400)], [0, 0])
    picture = draw(image, found, metadata, color_by="instance")
    assert pixel(picture, 10, 50) == distinct_colors()[0]
    assert pixel(picture, 200, 250) == distinct_colors()[1]
    with pytest.raises(ValueError, match="class.*instance.*'score'"):
        draw(image, found, metadata, color_by="score")


def test_small_objects_lie_on_top_of_large_ones(image, metadata):
    boxes = [[200, 200, 240, 240], [100, 150, 300, 350]]
    picture = draw(image, instances([square(200, 200, 240, 240), square()], [0, 1], boxes), metadata, "class")
    red_on_green = [0.55 * g + 0.45 * r for g, r in zip(blended(GREEN), RED, strict=True)]
    np.testing.assert_allclose(picture[225, 225], red_on_green, atol=1)
    assert pixel(picture, 190, 220) == blended(GREEN)


def test_colours_are_far_apart():
    rgb = np.array([distinct_colors()[:20]], np.float32) / 255
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0]
    nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2))
    assert nearest > 30  # CIELAB; about 2 can just be told apart
    assert len(set(distinct_colors())) == len(distinct_colors()) >= 48


def test_all_mask_formats_draw_the_same(image, metadata):
    mask = square()
    polygon = [np.array([100.0, 150, 300, 150, 300, 350, 100, 350])]
    compressed = mask_util.encode(np.asfortranarray(mask, np.uint8))
    as_text = {**compressed, "counts": compressed["counts"].decode()}
    column = np.flatnonzero(np.diff(mask.ravel(order="F").astype(int), prepend=0, append=0))
    uncompressed = {"size": [450, 500], "counts": np.diff(column, prepend=0, append=mask.size).tolist()}
    expected = draw(image, instances([mask], [1]), metadata, color_by="class")

    for kind, value in (
        ("pred_masks", torch.from_numpy(mask)[None]),
        ("gt_masks", BitMasks(torch.from_numpy(mask)[None])),
        ("gt_masks", PolygonMasks([polygon])),
        ("pred_masks_rle", [compressed]),
        ("pred_masks_rle", [uncompressed]),
    ):
        found = Instances((450, 500), **{kind: value, "gt_classes": torch.tensor([1])})
        np.testing.assert_array_equal(draw(image, found, metadata, color_by="class"), expected)
    for segmentation in ([polygon[0].tolist()], compressed, as_text, uncompressed):
        record = {"annotations": [{"category_id": 1, "segmentation": segmentation}]}
        np.testing.assert_array_equal(draw(image, record, metadata, color_by="class"), expected)


def test_polygons_that_are_none_give_empty_masks():
    assert not binary_mask([[1, 2, 3, 4]], 10, 12).any()  # two points; pycocotools would read a box
    assert not binary_mask([], 10, 12).any()
    assert binary_mask([[2.0, 2, 8, 2, 8, 8, 2, 8], [1.0, 1]], 10, 12).sum() == 36


def test_mask_of_another_image_is_refused(image, metadata):
    with pytest.raises(ValueError, match=r"\(30, 40\).*\(450, 500\)"):
        draw(image, {"annotations": [{"category_id": 0, "segmentation": square(1, 1, 9, 9, size=(30, 40))}]}, metadata)
    with pytest.raises(ValueError, match=r"\(30, 40\).*\(450, 500\)"):
        draw(image, Instances((30, 40)), metadata)


def test_without_masks_boxes_are_drawn(image, metadata):
    found = Instances((450, 500), pred_boxes=Boxes([[50.0, 60, 150, 160]]), pred_classes=torch.tensor([0]))
    picture = draw(image, found, metadata, color_by="class")
    assert pixel(picture, 50, 155) == RED and pixel(picture, 149, 155) == RED
    assert pixel(picture, 100, 110) == (GREY,) * 3


def test_nothing_to_draw_leaves_the_image(image, metadata):
    empty = instances([], [], boxes=[], scores=[])
    for result in (empty, {"instances": empty}, {"annotations": []}, Instances((450, 500), pred_masks=[])):
        np.testing.assert_array_equal(draw(image, result, metadata), image)
    picture = draw(image, instances([np.zeros((450, 500))], [0]), metadata)  # an instance with an empty mask
    np.testing.assert_array_equal(picture, image)
    with pytest.raises(ValueError, match="proposals"):
        draw(image, {"proposals": 1}, metadata)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_boxes_that_are_not_finite_are_left_out_and_named(image, metadata, wrong, caplog):
    boxes = [[wrong, 10, 50, 50], [200.0, 200, 300, 300]]
    picture = draw(image, instances([square(10, 10, 50, 50), square(200, 200, 300, 300)], [0, 1], boxes), metadata)
    assert pixel(picture, 30, 30) == (GREY,) * 3
    assert pixel(picture, 250, 280) == blended(distinct_colors()[0])
    assert "1 of 2 boxes are not finite" in caplog.text


def test_boxes_beyond_the_image_and_without_area_do_no_harm(image, metadata):
    boxes = [[-1e9, -50, 1e9, 9000], [20.0, 20, 20, 20], [60, 60, 40, 40], [498, 448, 600, 600]]
    found = Instances((450, 500), pred_boxes=Boxes(boxes), pred_classes=torch.tensor([0, 1, 2, 0]))
    assert draw(image, found, metadata).shape == image.shape


def test_score_threshold_and_labels(image, metadata):
    found = instances([square(10, 10, 90, 90), square(200, 200, 300, 300)], [0, 1], scores=[0.9, 0.3])
    picture = draw(image, found, metadata, color_by="class", score_threshold=0.5)
    np.testing.assert_array_equal(picture, draw(image, found[:1], metadata, color_by="class"))
    lower = instances([square(10, 10, 90, 90)], [0], scores=[0.4])
    assert (draw(image, lower, metadata, color_by="class") != picture).any(), "the label does not show the score"


def texts_of(monkeypatch) -> list[str]:
    texts = []
    monkeypatch.setattr(Canvas, "label", lambda self, text, color, at: texts.append(text))
    return texts


def test_labels_name_class_and_score(image, metadata, monkeypatch):
    texts = texts_of(monkeypatch)
    draw(image, instances([square()] * 4, [1, 2, 17, -1], scores=[0.987, 0.5, 0.25, 1.0]), metadata)
    assert texts == ["ring 99%", "star 50%", "class 17 25%", "class -1 100%"]
    texts.clear()
    crowd = {"category_id": 0, "segmentation": [[0.0, 0, 50, 0, 50, 50]], "iscrowd": 1}
    draw(image, {"annotations": [crowd]}, Metadata(name="bare"))
    assert texts == ["class 0 crowd"]


def test_annotation_boxes_follow_their_mode(image, metadata):
    one = {"category_id": 0, "bbox": [50, 60, 100, 90], "bbox_mode": BoxMode.XYWH_ABS}
    other = {"category_id": 0, "bbox": [50, 60, 150, 150], "bbox_mode": BoxMode.XYXY_ABS}
    pictures = [draw(image, {"annotations": [a]}, metadata, color_by="class") for a in (one, other)]
    np.testing.assert_array_equal(*pictures)
    assert pixel(pictures[0], 149, 145) == RED


def test_labels_do_not_hide_one_another():
    def count(canvas: Canvas, color) -> int:
        return int((canvas.picture() == color).all(axis=2).sum())

    colors = [RED, GREEN, BLUE, SKY, GRASS]
    alone = []
    for color in colors:
        canvas = Canvas(np.zeros((450, 500, 3), np.uint8))
        canvas.label("person 99%", color, np.array([200, 200, 320, 320]))
        alone.append(count(canvas, color))
    together = Canvas(np.zeros((450, 500, 3), np.uint8))
    for color in colors:
        together.label("person 99%", color, np.array([200, 200, 320, 320]))
    assert min(alone) > 200
    assert [count(together, color) for color in colors] == alone
    for _ in range(60):
        together.label("person 99%", (255, 0, 255), np.array([200, 200, 320, 320]))
    assert [count(together, color) for color in colors] == alone  # what finds no room is left out


def test_label_does_not_hide_a_small_object():
    canvas = Canvas(np.zeros((450, 500, 3), np.uint8))
    canvas.mask(square(100, 80, 120, 98), RED, 1.0)
    canvas.box(np.array([100, 80, 120, 98]), RED)
    canvas.label("dining table", GREEN, np.array([100, 100, 400, 400]))  # would lie on it by default
    assert (canvas.picture()[80:98, 100:120] == RED).all()


@pytest.mark.parametrize(
    ("size", "scale"), [((400, 400), 1), ((399, 900), 2), ((100, 120), 4), ((1, 1), 400), ((10, 3000), 1), ((20, 500), 4)]
)
def test_small_images_are_enlarged(size, scale, metadata):
    picture = draw(np.zeros((*size, 3), np.uint8), instances([np.ones(size)], [0], size=size), metadata)
    assert picture.shape == (size[0] * scale, size[1] * scale, 3)


def test_enlarged_masks_and_boxes_stay_in_place(metadata):
    image = np.full((100, 100, 3), GREY, np.uint8)
    found = instances([square(20, 30, 60, 70, size=(100, 100))], [1], [[10, 20, 80, 90]], size=(100, 100))
    picture = draw(image, found, metadata, color_by="class")
    assert pixel(picture, 4 * 40, 4 * 50) == blended(GREEN)
    assert pixel(picture, 4 * 20, 4 * 50) == GREEN and pixel(picture, 4 * 60 - 1, 4 * 50) == GREEN
    assert pixel(picture, 4 * 10, 4 * 80) == GREEN and pixel(picture, 4 * 80 - 1, 4 * 80) == GREEN
    assert pixel(picture, 4 * 80, 4 * 80) == (GREY,) * 3


def test_images_of_other_kinds_are_refused(metadata):
    for wrong in (np.zeros((50, 50, 4), np.uint8), np.zeros((50, 50, 3)), np.zeros((0, 50, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            Canvas(wrong)


def test_semantic_map(image, metadata):
    labels = np.ones((450, 500), np.uint8)
    labels[:, 250:] = 2
    labels[400:] = 255
    picture = draw_semantic(image, labels, metadata)
    assert pixel(picture, 50, 50) == blended(SKY)
    assert pixel(picture, 450, 50) == blended(GRASS)
    assert pixel(picture, 50, 430) == (GREY,) * 3
    logits = torch.nn.functional.one_hot(torch.from_numpy(labels % 255).long(), 3).permute(2, 0, 1).float()
    picture = draw(image, {"sem_seg": logits}, metadata)
    assert pixel(picture, 50, 50) == blended(SKY)
    assert pixel(picture, 50, 430) == blended((0, 0, 0))


@pytest.fixture
def panoptic():
    segments = torch.zeros((450, 500), dtype=torch.int32)
    segments[100:200, 100:200] = 7
    segments[250:400, 100:400] = 70_000
    info = [{"id": 7, "category_id": 1, "isthing": True}, {"id": 70_000, "category_id": 1, "isthing": False}]
    return segments, info


def test_panoptic_map(image, metadata, panoptic):
    picture = draw(image, {"panoptic_seg": panoptic, "instances": None, "sem_seg": None}, metadata, "class")
    assert pixel(picture, 110, 190) == blended(GREEN)
    assert pixel(picture, 120, 390) == blended(SKY)
    assert pixel(picture, 10, 10) == (GREY,) * 3  # segment 0 is not in the list
    picture = draw_panoptic(image, *panoptic, metadata, "instance")
    assert pixel(picture, 110, 190) == blended(distinct_colors()[0])
    assert pixel(picture, 120, 390) == blended(SKY)


def test_panoptic_map_with_categories_in_its_ids(image, metadata):
    metadata.set(label_divisor=1000, thing_dataset_id_to_contiguous_id={31: 0, 33: 2})
    segments = np.full((450, 500), -1)
    segments[:100], segments[100:200] = 1000, 2004
    picture = draw_panoptic(image, segments, None, metadata, "class")
    assert pixel(picture, 10, 10) == blended(SKY)  # 1 is stuff
    assert pixel(picture, 10, 110) == blended(BLUE)  # 2 is a thing
    assert pixel(picture, 10, 300) == (GREY,) * 3


def test_keypoints(image, metadata):
    metadata.set(
        keypoint_names=("nose", "ear", "tail"),
        keypoint_connection_rules=[("nose", "ear", (1, 2, 3)), ("nose", "tail", (4, 5, 6))],
    )
    points = torch.tensor([[[100.5, 100.5, 0.9], [200.5, 100.5, 0.2], [100.5, 300.5, 0.01]]])
    found = Instances((450, 500), pred_keypoints=points, pred_classes=torch.tensor([0]))
    picture = draw(image, found, metadata, color_by="class")
    assert pixel(picture, 100, 100) == RED and pixel(picture, 200, 100) == RED
    assert pixel(picture, 150, 100) == (1, 2, 3)  # the line between two points that are seen
    assert pixel(picture, 100, 300) == (GREY,) * 3 and pixel(picture, 100, 200) == (GREY,) * 3

    truth = Instances((450, 500), gt_keypoints=Keypoints(torch.tensor([[[30.0, 30, 2], [60, 60, 0], [90, 90, 1]]])))
    truth.gt_classes = torch.tensor([1])
    record = {"annotations": [{"category_id": 1, "keypoints": [30, 30, 2, 60, 60, 0, 90, 90, 1]}]}
    picture = draw(image, truth, metadata, color_by="class")
    assert pixel(picture, 30, 30) == GREEN and pixel(picture, 60, 70) == (GREY,) * 3
    np.testing.assert_array_equal(picture, draw(image, record, metadata, color_by="class"))


def test_comparison_geometry(metadata):
    image = np.full((120, 200, 3), GREY, np.uint8)
    truth = {"annotations": [{"category_id": 0, "bbox": [10, 20, 60, 70], "bbox_mode": BoxMode.XYWH_ABS}]}
    found = instances([square(20, 20, 60, 60, size=(120, 200))], [1], scores=[0.4], size=(120, 200))
    picture = draw_comparison(image, truth, found, metadata, "class", titles=("expected", "found"))
    height, width = 4 * 120, 4 * 200
    assert picture.shape == (TITLE_HEIGHT + height, 2 * width + GAP, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[TITLE_HEIGHT:, :width], draw(image, truth, metadata, "class"))
    np.testing.assert_array_equal(picture[TITLE_HEIGHT:, width + GAP :], draw(image, found, metadata, "class"))
    assert (picture[:, width : width + GAP] == 255).all()
    for x in (0, width + GAP):
        assert picture[:TITLE_HEIGHT, x : x + 100].min() < 100, "no title"
    none = draw_comparison(image, truth, {"instances": found}, metadata, score_threshold=0.5)
    assert (none[TITLE_HEIGHT:, width + GAP :] == GREY).all(), "the threshold is not for the prediction"
    assert (none[TITLE_HEIGHT:, :width] != GREY).any()
    other = draw_comparison(image, found, found, metadata, score_threshold=0.5)
    assert (other[TITLE_HEIGHT:, :width] != GREY).any(), "the threshold is for the ground truth too"


def test_comparison_shows_ground_truth_of_the_predictions_kind(image, metadata, panoptic, tmp_path):
    ids = panoptic[0].numpy()
    Image.fromarray(np.dstack([ids % 256, ids // 256 % 256, ids // 65536]).astype(np.uint8)).save(tmp_path / "ids.png")
    Image.fromarray(np.full((450, 500), 2, np.uint8)).save(tmp_path / "labels.png")
    truth = {
        "annotations": [{"category_id": 2, "segmentation": square(10, 10, 90, 90)}],
        "pan_seg_file_name": str(tmp_path / "ids.png"),
        "segments_info": panoptic[1],
        "sem_seg_file_name": str(tmp_path / "labels.png"),
    }

    def left_of(prediction):
        return draw_comparison(image, truth, prediction, metadata, "class")[TITLE_HEIGHT:, :500]

    logits = torch.zeros((3, 450, 500))
    empty = instances([], [])
    expected = draw_panoptic(image, *panoptic, metadata, "class")
    np.testing.assert_array_equal(left_of({"panoptic_seg": panoptic, "instances": empty}), expected)
    np.testing.assert_array_equal(left_of({"sem_seg": logits}), draw_semantic(image, np.full((450, 500), 2), metadata))
    boxes = draw(image, {"annotations": truth["annotations"]}, metadata, "class")
    np.testing.assert_array_equal(left_of(empty), boxes)
    np.testing.assert_array_equal(left_of({"instances": empty, "sem_seg": logits}), boxes)


def test_contact_sheet():
    pictures = [np.full((h, w, 3), i, np.uint8) for i, (h, w) in enumerate([(40, 60), (20, 30), (40, 60)])]
    sheet = contact_sheet(pictures, columns=2)
    assert sheet.shape == (80 + GAP, 120 + GAP, 3)
    assert (sheet[:40, :60] == 0).all() and (sheet[40 + GAP :, :60] == 2).all()
    assert (sheet[10:30, 60 + GAP + 15 : 60 + GAP + 45] == 1).all()
    assert (sheet[40 + GAP :, 60:] == 255).all() and (sheet[:9, 60:] == 255).all()
    assert contact_sheet(pictures, columns=9).shape == (40, 180 + 2 * GAP, 3)
    with pytest.raises(ValueError, match="0"):
        contact_sheet([], columns=2)


def test_ground_truth_of_real_photographs(real_coco_root):
    folder = real_coco_root / "coco"
    records = load_coco_json(str(folder / "annotations/instances_train2017.json"), str(folder / "train2017"))
    for record in sorted(records, key=lambda r: -len(r["annotations"]))[:8]:
        image = read_image(record["file_name"], "RGB")
        before = copy.deepcopy(record)
        picture = draw(image, record, Metadata(name="photographs"))
        scale = picture.shape[0] // image.shape[0]
        assert picture.shape == (scale * image.shape[0], scale * image.shape[1], 3) and scale in (1, 2)
        assert str(record) == str(before), "drawing changed the record"


def test_generated_shapes(shapes_root):
    importlib.import_module("projects.data.builtin")  # registers the data set
    for record in DatasetCatalog.get("shapes_val_panoptic")[:2]:
        image = read_image(record["file_name"], "RGB")
        prediction = {"panoptic_seg": (torch.zeros(image.shape[:2], dtype=torch.int32), [])}
        picture = draw_comparison(image, record, prediction, Metadata(name="plain"))
        assert picture.shape[0] > 400


@pytest.mark.gpu
def test_results_on_a_gpu(image, metadata):
    found = instances([square()], [1], boxes=[[80, 120, 320, 380]], scores=[0.5])
    np.testing.assert_array_equal(draw(image, found.to("cuda"), metadata), draw(image, found, metadata))
