"""The evaluation on huddled instances: selection against brute force, pooled AP by hand and against another implementation."""

import importlib.util
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from dsg.huddled import (
    T_O,
    T_P,
    best_of_each_image,
    huddled_table,
    largest_overlaps,
    match,
    pooled_ap,
    select_images,
    share_with_overlaps,
)
from projects.errors import DataError
from projects.evaluation.coco_files import load_ground_truth
from projects.evaluation.coco_metrics import run_coco_eval

SIDE = 60


def rle_of(box) -> dict:
    """A box of whole pixels in an image of SIDE x SIDE as compressed RLE."""
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    rle = mask_util.encode(mask)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def truth_of(images: list[list[tuple]]):
    """Ground truth of images given as lists of (box, class, crowd)."""
    annotations = [
        {"image_id": i, "bbox": list(map(float, box)), "category_id": k, "iscrowd": int(crowd), "area": float(box[2] * box[3]),
         "segmentation": rle_of(box)}
        for i, objects in enumerate(images)
        for box, k, crowd in objects
    ]  # fmt: skip
    dataset = {
        "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(len(images))],
        "categories": [{"id": k, "name": str(k)} for k in (1, 2, 3)],
        "annotations": [dict(a, id=n + 1) for n, a in enumerate(annotations)],
    }
    return load_ground_truth(dataset, ["bbox", "segm"])


# ---- Which images ---------------------------------------------------------------------------------------------------


def iou(a, b) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return inside / (a[2] * a[3] + b[2] * b[3] - inside)


def selected_by_hand(images, t_o, t_p) -> list[int]:
    chosen = []
    for i, objects in enumerate(images):
        boxes = [box for box, _, crowd in objects if not crowd]
        huddled = 0
        for a, box in enumerate(boxes):
            largest = 0.0
            for b, other in enumerate(boxes):
                if a != b:
                    largest = max(largest, iou(box, other))
            huddled += largest > t_o
        if boxes and huddled / len(boxes) > t_p or not boxes and t_o == -1:
            chosen.append(i)
    return chosen


BOX = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 30), st.integers(1, 30))
IMAGES = st.lists(st.lists(st.tuples(BOX, st.sampled_from([1, 2, 3]), st.booleans()), max_size=5), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(IMAGES)
def test_selection_is_that_of_brute_force(images):
    overlaps = largest_overlaps(truth_of(images))
    for t_o, t_p in itertools.product(T_O, T_P):
        if not (t_o == -1 and t_p > 0):
            assert select_images(overlaps, t_o, t_p) == selected_by_hand(images, t_o, t_p)
    assert share_with_overlaps(overlaps) == len(selected_by_hand(images, 0, 0)) / len(images)
    for low, high in itertools.pairwise(T_O):  # stricter thresholds select fewer
        assert set(select_images(overlaps, high, 0.2)) <= set(select_images(overlaps, low, 0.2))


def test_selection_by_hand():
    square = (0, 0, 10, 10)
    images = [
        [(square, 1, False), ((0, 0, 10, 5), 2, False), ((30, 30, 5, 5), 1, False)],  # IoU 0.5 across classes; 2 of 3 huddled
        [(square, 1, False), ((10, 0, 10, 10), 1, False)],  # they only touch
        [(square, 1, False), (square, 1, True)],  # a crowd is not compared
        [(square, 1, True)],  # and not counted
        [],
    ]
    overlaps = largest_overlaps(truth_of(images))
    assert [found.tolist() for found in overlaps.values()] == [[0.5, 0.5, 0], [0, 0], [0], [], []]
    assert select_images(overlaps, -1, 0) == [0, 1, 2, 3, 4]
    assert select_images(overlaps, 0.0, 0.0) == select_images(overlaps, 0.4, 0.5) == [0]
    assert select_images(overlaps, 0.5, 0.0) == []  # above, not at
    assert select_images(overlaps, 0.4, 0.67) == []
    assert share_with_overlaps(overlaps) == 0.2


def test_boxes_without_area_do_not_overlap():
    images = [[((5, 5, 1, 1), 1, False), ((5, 5, 1, 1), 1, False)]]
    coco_gt = truth_of(images)
    for annotation in coco_gt.dataset["annotations"]:
        annotation["bbox"] = [5.0, 5.0, 0.0, 0.0]
    assert largest_overlaps(coco_gt)[0].tolist() == [0, 0]


def test_share_of_real_photographs(real_coco_root):
    """Pycocotools' own reading of the sample, box by box."""
    from pycocotools.coco import COCO

    path = real_coco_root / "coco/annotations/instances_train2017.json"
    coco = COCO(str(path))
    images = [[(a["bbox"], a["category_id"], a["iscrowd"]) for a in coco.loadAnns(coco.getAnnIds(i))] for i in coco.getImgIds()]
    overlaps = largest_overlaps(load_ground_truth(str(path), ["bbox"]))
    assert len(overlaps) == 50
    for t_o, t_p in ((0.0, 0.0), (0.1, 0.3), (0.5, 0.0)):
        assert len(select_images(overlaps, t_o, t_p)) == len(selected_by_hand(images, t_o, t_p))
    assert 0.5 < share_with_overlaps(overlaps) < 1


# ---- AP over all instances ------------------------------------------------------------------------------------------


def result(image, box, category, score):
    shape = {"bbox": list(map(float, box)), "segmentation": rle_of(box)}
    return {"image_id": image, "category_id": category, "score": score, **shape}


def test_pooled_ap_by_hand():
    """Three objects of two classes; by score: right (class 1), wrong, right (class 2); the third is missed.

    Precision by recall: 1 up to 1/3 (places 0 to 33 of 101), 2/3 up to 2/3 (34 to 66), 0 beyond.
    """
    a, b, c = (0, 0, 10, 10), (20, 0, 10, 10), (40, 0, 10, 10)
    coco_gt = truth_of([[(a, 1, False), (b, 2, False)], [(c, 1, False)]])
    found = [result(0, b, 2, 0.5), result(0, a, 1, 0.9), result(1, (0, 30, 10, 10), 1, 0.7)]
    for task in ("bbox", "segm"):
        matches = match(coco_gt, found, task)
        assert pooled_ap(matches.values()) == pytest.approx(100 * (34 * 1 + 33 * 2 / 3) / 101)
        assert pooled_ap([matches[0]]) == pytest.approx(100)
        assert pooled_ap([matches[1]]) == 0
    # Averaged over classes it is another number: class 1 has one of its two objects, class 2 its only one.
    assert run_coco_eval(coco_gt, found, "bbox").stats[0] == pytest.approx((51 / 101 + 1) / 2)
    assert pooled_ap(match(coco_gt, [], "bbox").values()) == 0
    assert math.isnan(pooled_ap([]))


def test_matching_stays_within_the_class_and_crowds_do_not_count():
    a, crowd = (0, 0, 10, 10), (20, 20, 30, 30)
    coco_gt = truth_of([[(a, 1, False), (crowd, 1, True)]])
    right, other_class, on_crowd = result(0, a, 1, 0.5), result(0, a, 2, 0.9), result(0, (25, 25, 10, 10), 1, 0.8)
    assert pooled_ap(match(coco_gt, [right], "bbox").values()) == pytest.approx(100)
    assert pooled_ap(match(coco_gt, [right, on_crowd], "bbox").values()) == pytest.approx(100)
    assert pooled_ap(match(coco_gt, [right, other_class], "bbox").values()) == pytest.approx(50)


@pytest.mark.filterwarnings("ignore:Found annotation id 0")
def test_what_counts_neither_way():
    """A crowd with the id 0, which COCO's matching takes for no match; a box of negative area, which no range of areas has."""
    a, crowd = (0, 0, 10, 10), (20, 20, 30, 30)
    coco_gt = truth_of([[(crowd, 1, True), (a, 1, False)]])
    for annotation in coco_gt.dataset["annotations"]:
        annotation["id"] -= 1
    coco_gt = load_ground_truth(coco_gt.dataset, ["bbox"])
    found = [result(0, crowd, 1, 0.9), result(0, a, 1, 0.5)]
    assert run_coco_eval(coco_gt, found, "bbox").stats[0] == pytest.approx(1)
    assert pooled_ap(match(coco_gt, found, "bbox").values()) == pytest.approx(100)
    coco_gt = truth_of([[(a, 1, False)]])
    found = [dict(result(0, a, 1, 0.9), bbox=[5.0, 5.0, -3.0, 4.0]), result(0, a, 1, 0.5)]
    assert run_coco_eval(coco_gt, found, "bbox").stats[0] == pytest.approx(1)
    assert pooled_ap(match(coco_gt, found, "bbox").values()) == pytest.approx(100)


def test_of_an_image_the_hundred_best_count_over_all_classes():
    found = [dict(image_id=i, category_id=1 + n % 3, score=(n * 37 % 151) / 151, n=n) for i in (0, 1) for n in range(150)]
    best = best_of_each_image(found)
    assert [sum(r["image_id"] == i for r in best) for i in (0, 1)] == [100, 100]
    assert min(r["score"] for r in best) > sorted(r["score"] for r in found)[-201]
    assert [r["n"] for r in best_of_each_image([dict(image_id=0, score=0.5, n=n) for n in range(120)])] == list(range(100))
    a = (0, 0, 10, 10)
    coco_gt = truth_of([[(a, 1, False)]])
    many = [result(0, (30, 30, 5, 5), 2, 0.9) for _ in range(100)]
    assert pooled_ap(match(coco_gt, [*many, result(0, a, 1, 0.8)], "bbox").values()) == 0
    unknown = [dict(r, category_id=9) for r in many]  # takes no place among them
    assert pooled_ap(match(coco_gt, [*unknown, result(0, a, 1, 0.8)], "bbox").values()) == pytest.approx(100)


def made_up(seed: int, images: int = 25):
    """Random objects, crowds, and detections near them."""
    chance = random.Random(seed)

    def box():
        return (chance.randrange(30), chance.randrange(30), chance.randrange(4, 30), chance.randrange(4, 30))

    objects = [
        [(box(), chance.randint(1, 3), chance.random() < 0.1) for _ in range(chance.randrange(6))] for _ in range(images)
    ]
    results = []
    for i, of_image in enumerate(objects):
        for place, k, _ in of_image:
            for _ in range(chance.randrange(3)):
                near = tuple(max(v + chance.randint(-2, 2), least) for v, least in zip(place, (0, 0, 1, 1), strict=True))
                results.append(result(i, near, k if chance.random() < 0.8 else chance.randint(1, 3), chance.random()))
        results += [result(i, box(), chance.randint(1, 3), chance.random()) for _ in range(chance.randrange(3))]
    return objects, results


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_pooled_ap_is_that_of_one_class_when_every_class_of_an_image_is_an_image_of_its_own(seed, task):
    """faster-coco-eval on the same objects, renumbered: (image, class) -> image, all classes -> one. Matching then stays
    within the class, and the AP of the one class is the AP over all instances."""
    objects, results = made_up(seed)
    matches = match(truth_of(objects), results, task)
    split = truth_of(
        [[(box, 1, crowd) for box, k, crowd in of_image if k == kind] for of_image in objects for kind in (1, 2, 3)]
    )
    renumbered = [dict(r, image_id=3 * r["image_id"] + r["category_id"] - 1, category_id=1) for r in results]
    expected = run_coco_eval(split, renumbered, task).stats[0]
    assert 0.05 < expected < 0.95
    assert pooled_ap(matches.values()) == pytest.approx(100 * expected)
    some = range(5, 14)
    ids = [3 * i + k for i in some for k in range(3)]
    expected = run_coco_eval(split, renumbered, task, img_ids=ids).stats[0]
    assert pooled_ap(matches[i] for i in some) == pytest.approx(100 * expected)


def test_table_has_a_cell_for_every_pair_of_thresholds():
    objects, results = made_up(3)
    coco_gt = truth_of(objects)
    overlaps, matches = largest_overlaps(coco_gt), {"bbox": match(coco_gt, results, "bbox")}
    table = huddled_table(overlaps, matches)
    assert len(table) == 1 + 6 * 6 and table[-1, 0]["images"] == 25
    for (t_o, t_p), cell in table.items():
        images = selected_by_hand(objects, t_o, t_p)
        assert cell["images"] == len(images)
        assert cell["bbox"] == pytest.approx(pooled_ap(matches["bbox"][i] for i in images), nan_ok=True)


# ---- The tool -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("huddled_ap", Path(__file__).resolve().parents[2] / "tools/huddled_ap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tool_prints_the_differences(tool, tmp_path, capsys):
    objects, results = made_up(4)
    coco_gt = truth_of(objects)
    files = {name: str(tmp_path / f"{name}.json") for name in ("gt", "a", "b", "table")}
    perfect = [result(i, box, k, 0.9) for i, of_image in enumerate(objects) for box, k, crowd in of_image if not crowd]
    for name, content in (("gt", coco_gt.dataset), ("a", results), ("b", perfect)):
        Path(files[name]).write_text(json.dumps(content))
    command = ["--gt", files["gt"], "--baseline", files["a"], "--results", files["b"], "--json", files["table"]]
    assert tool.main(tool.parse_args(command)) == 0
    printed = capsys.readouterr().out
    overlaps = largest_overlaps(coco_gt)
    assert printed.startswith(f"25 images; in {100 * share_with_overlaps(overlaps):.1f}% of them")
    base = {task: match(coco_gt, results, task) for task in ("bbox", "segm")}
    gain = " / ".join(f"{100 - pooled_ap(base[task].values()):+.1f}" for task in ("bbox", "segm"))
    row = printed[printed.index("box / mask AP, results - baseline") :].splitlines()[4]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["-1.0", gain, "-", "-", "-", "-", "-"]
    images = select_images(overlaps, 0.3, 0.2)
    (cell,) = [c for c in json.loads(Path(files["table"]).read_text())["cells"] if (c["T_O"], c["T_P"]) == (0.3, 0.2)]
    assert cell["results"] == {"images": len(images), "bbox": pytest.approx(100), "segm": pytest.approx(100)}
    assert cell["baseline"]["bbox"] == pytest.approx(pooled_ap(base["bbox"][i] for i in images))
    Path(files["gt"]).write_text(json.dumps(truth_of([objects[0]]).dataset))
    Path(files["a"]).write_text("[]")
    assert tool.main(tool.parse_args([*command[:4], "--results", files["a"], "--json", files["table"]])) == 0
    assert "nan" in (printed := capsys.readouterr().out) and "+nan" not in printed
    (cell,) = [c for c in json.loads(Path(files["table"]).read_text())["cells"] if (c["T_O"], c["T_P"]) == (0.5, 0.5)]
    assert cell["baseline"] == {"images": 0, "bbox": None, "segm": None}


def test_tool_names_what_it_cannot_use(tool, tmp_path):
    dataset = truth_of([[((0, 0, 9, 9), 1, False)]]).dataset
    gt, results = tmp_path / "gt.json", tmp_path / "results.json"
    command = tool.parse_args(["--gt", str(gt), "--baseline", str(results), "--results", str(results)])
    gt.write_text(json.dumps({**dataset, "annotations": []}))
    with pytest.raises(DataError, match="no annotations"):
        tool.main(command)
    results.write_text("[]")
    without_box = [{key: value for key, value in a.items() if key != "bbox"} for a in dataset["annotations"]]
    gt.write_text(json.dumps({**dataset, "annotations": without_box}))
    masks = tool.parse_args(["--gt", str(gt), "--baseline", str(results), "--results", str(results), "--tasks", "segm"])
    with pytest.raises(DataError, match="Annotation 1 has no 'bbox'"):
        tool.main(masks)
    gt.write_text(json.dumps(dataset))
    results.write_text("{}")
    with pytest.raises(DataError, match="expected a list, found an object"):
        tool.main(command)
