"""Panoptic quality by hand on small maps, beside the Cityscapes script, and on real COCO images."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation.evalPanopticSemanticLabeling import pq_compute_single_core
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from projects.errors import ConfigError, DataError
from projects.evaluation import build_evaluator
from projects.evaluation.coco_panoptic import COCOPanopticQualityEvaluator
from projects.evaluation.panoptic_files import read_segment_map, segments_of_output, write_segment_map
from projects.evaluation.panoptic_quality import Tally, match_segments, panoptic_metrics, sum_tallies

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_panoptic_sample"
CAR, ROAD, SKY = 3, 7, 9
CATEGORIES = [
    {"id": CAR, "name": "car", "isthing": 1},
    {"id": ROAD, "name": "road", "isthing": 0},
    {"id": SKY, "name": "sky", "isthing": 0},
]


def strip(*runs: tuple[int, int]) -> np.ndarray:
    """A map of one row: so many pixels of an id, and so on."""
    return np.concatenate([np.full(pixels, i) for pixels, i in runs])[None]


def listed(crowd=(), **categories: int) -> list[dict]:
    return [{"id": int(i[1:]), "category_id": c, "iscrowd": int(int(i[1:]) in crowd)} for i, c in categories.items()]


def test_by_hand():
    """Truth: two cars of 10 pixels, a road of 20. Prediction: 8 of the first car, 5 of the second, the road and 5 more."""
    truth = strip((10, 1), (10, 2), (20, 3))
    predicted = strip((8, 11), (2, 0), (5, 12), (25, 13))
    tallies = match_segments(truth, listed(i1=CAR, i2=CAR, i3=ROAD), predicted, listed(i11=CAR, i12=CAR, i13=ROAD))
    # 8 / 10 matches; 5 / 10 does not (the IoU must exceed one half); 20 / 25 matches.
    assert tallies == {CAR: Tally(tp=1, fp=1, fn=1, iou=0.8), ROAD: Tally(tp=1, iou=0.8)}
    metrics = panoptic_metrics(tallies, CATEGORIES)
    assert metrics["PQ-car"] == pytest.approx(100 * 0.8 / 2)
    assert metrics["PQ-road"] == pytest.approx(80)
    assert np.isnan(metrics["PQ-sky"])
    assert [metrics[m] for m in ("PQ", "SQ", "RQ")] == pytest.approx([60, 80, 75])
    assert [metrics[m] for m in ("PQ_th", "SQ_th", "RQ_th")] == pytest.approx([40, 80, 50])
    assert [metrics[m] for m in ("PQ_st", "SQ_st", "RQ_st")] == pytest.approx([80, 80, 100])


def test_void_leaves_the_union_and_excuses_predictions():
    """A car of 6 pixels on 6 car and 6 void: IoU 1. Predictions on 3 void of 5 do not count, on 3 of 6 they do."""
    truth = strip((6, 1), (6, 0), (10, 2), (3, 0), (5, 3))
    segments = listed(i1=CAR, i2=ROAD, i3=SKY)
    excused = strip((12, 11), (8, 12), (2, 13), (3, 13), (5, 14))
    tallies = match_segments(truth, segments, excused, listed(i11=CAR, i12=ROAD, i13=CAR, i14=SKY))
    assert tallies == {CAR: Tally(tp=1, iou=1), ROAD: Tally(tp=1, iou=0.8), SKY: Tally(tp=1, iou=1)}
    counted = strip((12, 11), (7, 12), (3, 13), (3, 13), (5, 14))
    tallies = match_segments(truth, segments, counted, listed(i11=CAR, i12=ROAD, i13=CAR, i14=SKY))
    assert tallies[CAR] == Tally(tp=1, fp=1, iou=1)


def test_crowds_are_neither_matched_nor_missed_and_excuse_their_class():
    truth = strip((10, 1), (10, 2), (10, 3))
    segments = listed(crowd=(1, 2), i1=CAR, i2=CAR, i3=ROAD)
    predicted = strip((10, 11), (6, 12), (4, 13), (10, 14))
    tallies = match_segments(truth, segments, predicted, listed(i11=CAR, i12=CAR, i13=SKY, i14=ROAD))
    assert tallies == {SKY: Tally(fp=1), ROAD: Tally(tp=1, iou=1)}
    one_over_both = strip((4, 0), (12, 11), (4, 0), (10, 14))  # 6 pixels on either of the two crowds
    assert CAR not in match_segments(truth, segments, one_over_both, listed(i11=CAR, i14=ROAD))


def test_means_over_images_and_over_nothing():
    total = sum_tallies([{CAR: Tally(1, 0, 0, 0.9)}, {CAR: Tally(1, 1, 2, 0.7), SKY: Tally(0, 0, 1)}])
    assert total == {CAR: Tally(2, 1, 2, pytest.approx(1.6)), SKY: Tally(fn=1)}
    metrics = panoptic_metrics(total, CATEGORIES)
    assert metrics["PQ-car"] == pytest.approx(100 * 1.6 / 3.5) and metrics["PQ-sky"] == 0 and metrics["SQ_st"] == 0
    nothing = panoptic_metrics({}, CATEGORIES)
    assert all(np.isnan(value) for value in nothing.values()) and len(nothing) == 9 + 3


def test_maps_and_lists_that_disagree():
    ids, segments = strip((4, 1)), listed(i1=CAR)
    with pytest.raises(DataError, match=r"\(1, 5\).*\(1, 4\)"):
        match_segments(ids, segments, strip((5, 1)), segments)
    with pytest.raises(DataError, match=r"of the prediction holds the ids \[2\]"):
        match_segments(ids, segments, strip((3, 1), (1, 2)), segments)
    with pytest.raises(DataError, match=r"of the ground truth holds the ids \[1\]"):
        match_segments(ids, [], ids, segments)
    with pytest.raises(DataError, match=r"no pixel: \[5\]"):
        match_segments(ids, segments, ids, listed(i1=CAR, i5=CAR))
    assert match_segments(ids, listed(i1=CAR, i5=SKY), ids, segments)[SKY] == Tally(fn=1)


def test_maps_as_pictures(tmp_path):
    ids = np.array([[0, 255, 256], [65535, 65536, 256**3 - 1]])
    write_segment_map(tmp_path / "new" / "map.png", ids)
    assert (read_segment_map(tmp_path / "new" / "map.png") == ids).all()
    colors = np.array(Image.open(tmp_path / "new" / "map.png"))
    assert colors[1, 1].tolist() == [0, 0, 1] and colors[0, 2].tolist() == [0, 1, 0]
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "grey.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "grey.png").read_bytes()[:40])
    for name, message in (("grey", "three channels"), ("cut", "cannot be read"), ("nowhere", "cannot be read")):
        with pytest.raises(DataError, match=message):
            read_segment_map(tmp_path / f"{name}.png")


def test_both_forms_of_a_models_output():
    metadata = MetadataCatalog.get("forms_of_output")
    metadata.set(thing_dataset_id_to_contiguous_id={24: 0, 26: 1}, label_divisor=1000)
    ids = torch.tensor([[0, 1, 1000, 5000, 5000, -1]])
    segments, infos = segments_of_output((ids, None), metadata)
    assert segments.tolist() == [[1, 2, 3, 4, 4, 0]]
    assert [(s["id"], s["category_id"], s["isthing"]) for s in infos] == [
        (1, 0, True),
        (2, 0, True),
        (3, 1, True),
        (4, 5, False),
    ]
    listed_twice = [{"id": 9, "category_id": 5, "isthing": False, "area": 2}, {"id": 7, "category_id": 0, "isthing": True}]
    segments, infos = segments_of_output((torch.tensor([[0, 9, 9]]), listed_twice), metadata)
    assert segments.tolist() == [[0, 1, 1]] and infos == [{"id": 1, "category_id": 5, "isthing": False}]
    with pytest.raises(DataError, match=r"\[8\].*segments_info"):
        segments_of_output((torch.tensor([[0, 9, 8]]), listed_twice), metadata)
    MetadataCatalog.remove("forms_of_output")


def by_the_script(folder: Path, truth, segments, predicted, infos) -> dict[int, Tally]:
    """The tallies that Cityscapes' script, whose matching is panopticapi's, gives of an image."""
    write_segment_map(folder / "truth.png", truth)
    write_segment_map(folder / "predicted.png", predicted)
    annotations = [
        {
            "image_id": 1,
            "file_name": f"{name}.png",
            "segments_info": [dict(s, area=int((ids == s["id"]).sum())) for s in listing],
        }
        for name, ids, listing in (("truth", truth, segments), ("predicted", predicted, infos))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = pq_compute_single_core(0, [annotations], str(folder), str(folder), {c["id"]: c for c in CATEGORIES})
    found = {c: Tally(part.tp, part.fp, part.fn, pytest.approx(part.iou)) for c, part in theirs.pq_per_cat.items()}
    return {c: t for c, t in found.items() if t.tp + t.fp + t.fn}


def test_two_crowds_of_a_class_excuse_together_and_in_the_script_the_last_alone(tmp_path):
    """A car of 12 pixels, 6 on either crowd. The docstring of coco_panoptic.py states the departure."""
    truth, predicted = strip((10, 1), (10, 2), (10, 3)), strip((4, 0), (12, 11), (4, 0), (10, 14))
    segments, infos = listed(crowd=(1, 2), i1=CAR, i2=CAR, i3=ROAD), listed(i11=CAR, i14=ROAD)
    ours = match_segments(truth, segments, predicted, infos)
    assert ours == {ROAD: Tally(tp=1, iou=1)}
    assert by_the_script(tmp_path, truth, segments, predicted, infos) == ours | {CAR: Tally(fp=1)}
    one = [dict(s, iscrowd=0) if s["id"] == 2 else s for s in segments]
    assert by_the_script(tmp_path, truth, one, predicted, infos) == match_segments(truth, one, predicted, infos)


@pytest.mark.parametrize("seed", range(6))
def test_same_counts_as_the_cityscapes_script(seed, tmp_path):
    """Random blocks with void, one crowd of a class at most."""
    rng = np.random.default_rng(seed)

    def random_map(offset):
        ids = np.zeros((48, 64), int)
        infos = []
        for i in range(1, 12):
            y, x = rng.integers(0, 40), rng.integers(0, 56)
            ids[y : y + rng.integers(8, 30), x : x + rng.integers(8, 40)] = i + offset
        for i in np.unique(ids[ids > 0]).tolist():
            infos.append({"id": i, "category_id": int(rng.choice([CAR, ROAD, SKY])), "iscrowd": 0})
        return ids, infos

    truth, segments = random_map(0)
    for k in (CAR, SKY):
        next((s for s in segments if s["category_id"] == k), {})["iscrowd"] = 1
    moved = np.roll(truth, (1, 2), (0, 1))
    predicted = np.where(moved > 0, moved + 100, 0)
    infos = [dict(s, id=s["id"] + 100) for s in segments]
    patch, patch_infos = random_map(200)
    place = (slice(10, 30), slice(10, 40))
    predicted[place] = patch[place]
    infos = [s for s in (*infos, *patch_infos) if (predicted == s["id"]).any()]
    ours = match_segments(truth, segments, predicted, infos)
    assert by_the_script(tmp_path, truth, segments, predicted, infos) == ours
    assert sum(t.tp for t in ours.values()) and sum(t.fp for t in ours.values()) and sum(t.fn for t in ours.values())


@pytest.fixture
def coco_sample(tmp_path):
    """The real sample, registered as Detectron2 registers COCO's panoptic sets: things and stuff numbered apart."""
    if not SAMPLE.is_dir():
        pytest.skip("needs a sample of COCO's panoptic annotations in ../shared/data/coco_panoptic_sample")
    content = json.loads((SAMPLE / "panoptic_examples.json").read_text())
    content["categories"] = json.loads((SAMPLE / "panoptic_coco_categories.json").read_text())
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    classes = {
        f"{kind}_dataset_id_to_contiguous_id": {
            c["id"]: i for i, c in enumerate(c for c in content["categories"] if c["isthing"] == (kind == "thing"))
        }
        for kind in ("thing", "stuff")
    }
    name = "coco_panoptic_sample"
    MetadataCatalog.get(name).set(
        panoptic_json=str(tmp_path / "panoptic.json"), panoptic_root=str(SAMPLE / "panoptic_examples"), **classes
    )
    yield name, content
    MetadataCatalog.remove(name)


def outputs_of(content, metadata, root) -> list[dict]:
    """The ground truth as a model's outputs."""
    isthing = {c["id"]: bool(c["isthing"]) for c in content["categories"]}
    outputs = []
    for annotation in content["annotations"]:
        ids = torch.from_numpy(read_segment_map(root / annotation["file_name"]))
        infos = []
        for s in annotation["segments_info"]:
            kind = "thing" if isthing[s["category_id"]] else "stuff"
            k = metadata.get(f"{kind}_dataset_id_to_contiguous_id")[s["category_id"]]
            infos.append({"id": s["id"], "isthing": kind == "thing", "category_id": k})
        outputs.append({"panoptic_seg": (ids, infos)})
    return outputs


def test_real_coco_images(coco_sample, run_evaluator):
    name, content = coco_sample
    metadata, inputs = MetadataCatalog.get(name), [{"image_id": a["image_id"]} for a in content["annotations"]]
    outputs = outputs_of(content, metadata, SAMPLE / "panoptic_examples")
    evaluator = COCOPanopticQualityEvaluator(name)
    metrics = run_evaluator(evaluator, inputs, outputs)["panoptic_seg"]
    assert {metrics[f"{m}{s}"] for m in ("PQ", "SQ", "RQ") for s in ("", "_th", "_st")} == {100.0}
    present = {k: v for k, v in metrics.items() if "-" in k and not np.isnan(v)}
    segments = [s for a in content["annotations"] for s in a["segments_info"] if not s["iscrowd"]]
    assert len(present) == len({s["category_id"] for s in segments}) and len(segments) == 47

    # Merge the two largest persons of the first image. With areas a > b and no overlap the union of both has an IoU of
    # a / (a + b) > 1/2 with the larger one and matches it; the smaller one is missed: of n persons n - 1 match, one is missed.
    person = next(c["id"] for c in content["categories"] if c["name"] == "person")
    isthing = {c["id"]: bool(c["isthing"]) for c in content["categories"]}
    persons = [s for s in segments if s["category_id"] == person]
    n = len(persons)
    of_first = [s for s in content["annotations"][0]["segments_info"] if s["category_id"] == person and not s["iscrowd"]]
    large, small = sorted(of_first, key=lambda s: -s["area"])[:2]
    ids, infos = outputs[0]["panoptic_seg"]
    a, b = (int((ids == s["id"]).sum()) for s in (large, small))
    assert a > b > 0 and n > 2
    merged = torch.where(ids == small["id"], large["id"], ids)
    outputs[0]["panoptic_seg"] = (merged, [s for s in infos if s["id"] != small["id"]])
    metrics = run_evaluator(evaluator, inputs, outputs)["panoptic_seg"]
    pq = 100 * (n - 2 + a / (a + b)) / (n - 1 + 1 / 2)
    assert metrics["PQ-person"] == pytest.approx(pq)
    categories = len(present)
    things = len({s["category_id"] for s in segments if isthing[s["category_id"]]})
    assert metrics["PQ"] == pytest.approx(100 - (100 - pq) / categories)
    assert metrics["PQ_th"] == pytest.approx(100 - (100 - pq) / things)
    assert metrics["PQ_st"] == 100


def test_shapes_in_coco_format(shapes_root, perfect_coco, run_evaluator, caplog):
    """Boxes, masks and PQ of the ground truth; of a model without a panoptic output boxes and masks."""
    records, outputs = perfect_coco
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    evaluator = build_evaluator(cfg, "shapes_val_panoptic", None)
    results = run_evaluator(evaluator, records, outputs)
    assert list(results) == ["bbox", "segm", "panoptic_seg"]
    assert results["segm"]["AP"] == pytest.approx(100) and results["panoptic_seg"]["PQ"] == 100
    results = run_evaluator(evaluator, records, [{"instances": output["instances"]} for output in outputs])
    assert list(results) == ["bbox", "segm"] and "does not give it: panoptic_seg" in caplog.text


@pytest.fixture
def perfect_coco(shapes_root, perfect):
    from projects.data import builtin  # noqa: F401  registers it

    records = DatasetCatalog.get("shapes_val_panoptic")
    return records, [perfect(record) for record in records]


def test_ground_truth_that_cannot_be_used(tmp_path):
    metadata = MetadataCatalog.get("broken_panoptic")
    metadata.set(panoptic_json=str(tmp_path / "p.json"), panoptic_root=str(tmp_path))
    metadata.set(thing_dataset_id_to_contiguous_id={8: 1, CAR: 0}, stuff_dataset_id_to_contiguous_id={ROAD: 0, SKY: 1})
    images = [{"id": 5, "file_name": "5.jpg", "height": 1, "width": 4}]
    output = {"panoptic_seg": (torch.ones(1, 4, dtype=torch.int32), [{"id": 1, "isthing": True, "category_id": 0}])}
    try:
        for content, message in (
            ("{}", "categories"),
            ('{"categories": [], "annotations": [{}]}', "segments_info"),
            ("[", "not JSON"),
        ):
            (tmp_path / "p.json").write_text(content)
            with pytest.raises(DataError, match=message):
                COCOPanopticQualityEvaluator("broken_panoptic")
        (tmp_path / "p.json").write_text(json.dumps({"categories": CATEGORIES, "images": images, "annotations": []}))
        with pytest.raises(DataError, match="no annotation of the image 5.jpg"):
            COCOPanopticQualityEvaluator("broken_panoptic").process([{"image_id": 5}], [output])
        (tmp_path / "p.json").write_text(json.dumps({"categories": CATEGORIES, "images": images}))
        with pytest.raises(ConfigError, match="no ground truth.*output_dir"):
            COCOPanopticQualityEvaluator("broken_panoptic")
        evaluator = COCOPanopticQualityEvaluator("broken_panoptic", str(tmp_path / "out"))
        evaluator.process([{"image_id": 5}], [output])
        assert evaluator.evaluate() == {}
        written = json.loads((tmp_path / "out/coco_panoptic/predictions.json").read_text())["annotations"]
        assert written == [{"image_id": 5, "file_name": "5.png", "segments_info": [{"id": 1, "category_id": CAR}]}]
        assert (read_segment_map(tmp_path / "out/coco_panoptic/predictions/5.png") == 1).all()
    finally:
        MetadataCatalog.remove("broken_panoptic")
