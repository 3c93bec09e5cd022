"""tools/compare_models.py: the difference by hand, the choice of images, the pictures, and what a user may get wrong."""

import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util

from projects.data import builtin  # noqa: F401  registers the data sets
from projects.drawables import Drawable
from projects.engine.launch import guarded
from projects.errors import DataError
from projects.modeling.build import build_model
from projects.visualization import GAP, TITLE_HEIGHT, draw

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_models", REPO / "tools/compare_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, shapes_root, tmp_path):
    """``run("--a", ..., ...)`` on shapes_val -> (exit code, rows of differences.json, names of the pictures)."""

    def run(*args):
        folder = tmp_path / "comparison"
        arguments = [*map(str, args), "--output", str(folder)]
        code = guarded(
            tool.main, tool.parse_args(arguments if "--dataset" in arguments else ["--dataset", "shapes_val", *arguments])
        )
        if code:
            return code, None, None
        return code, json.loads((folder / "differences.json").read_text()), sorted(p.name for p in folder.glob("*.png"))

    return run


@pytest.fixture
def results(shapes_root) -> list[dict]:
    """The ground truth of shapes_val as detections."""
    content = json.loads((shapes_root / "shapes/coco/annotations/instances_val.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    found = []
    for a in content["annotations"]:
        rle = a["segmentation"]
        if isinstance(rle, list):
            rle = mask_util.merge(mask_util.frPyObjects(rle, *sizes[a["image_id"]]))
            rle = {"size": rle["size"], "counts": rle["counts"].decode()}
        kept = {key: a[key] for key in ("image_id", "category_id", "bbox")}
        found.append({**kept, "segmentation": rle, "score": 0.9})
    return found


def write(path: Path, results: list[dict]) -> Path:
    path.write_text(json.dumps(results))
    return path


def bar(x0: int, x1: int, class_id: int = 0, kind: str = "thing") -> Drawable:
    """Columns x0 to x1 of an image of 4 x 100."""
    mask = np.zeros((4, 100), bool)
    mask[:, x0:x1] = True
    return Drawable(kind, class_id, mask=mask)


def test_difference_by_hand(tool):
    size = (4, 100)

    def difference(a, b):
        assert tool.difference(a, b, size) == pytest.approx(tool.difference(b, a, size))
        return tool.difference(a, b, size)

    a = [bar(0, 20), bar(40, 60)]
    assert difference(a, a) == 0 and difference([], []) == 0 and difference(a, []) == 1
    assert difference(a, [bar(40, 60), bar(10, 30)]) == pytest.approx(1 - 2 * (1 + 1 / 3) / 4)
    assert difference(a, [bar(40, 60), bar(0, 20, class_id=1), bar(80, 90)]) == pytest.approx(1 - 2 * 1 / 5)
    assert difference([bar(0, 20)], [bar(0, 20, kind="stuff")]) == 1
    # (0, 20) fits (0, 16) best with 16 / 20, and is then no longer there for (0, 25).
    assert difference([bar(0, 20), bar(10, 40)], [bar(0, 16), bar(0, 25)]) == pytest.approx(1 - 2 * (0.8 + 15 / 40) / 4)
    # The best pair first, wherever it stands: the second of A takes the second of B.
    assert difference([bar(0, 15), bar(0, 20)], [bar(90, 91), bar(0, 20)]) == pytest.approx(1 - 2 * 1 / 4)
    assert difference([bar(0, 20)], [Drawable("thing", 0, box=np.array([10, 0, 20, 4]))]) == pytest.approx(1 - 2 * 0.5 / 2)


def test_objects_are_what_is_drawn(tool):
    metadata = MetadataCatalog.get("compared")
    instances = Instances((4, 100), pred_boxes=Boxes(torch.zeros(2, 4)), scores=torch.tensor([0.6, 0.4]))
    instances.pred_classes = torch.tensor([3, 4])
    semantic = torch.zeros(3, 4, 100)
    semantic[2, :, 50:] = 1
    ids = torch.zeros(4, 100, dtype=torch.int32)
    ids[:, :30] = 7
    infos = [{"id": 7, "isthing": False, "category_id": 5}]
    output = {"panoptic_seg": (ids, infos), "instances": instances, "sem_seg": semantic}

    def found(*keys):
        objects = tool.objects_of({key: output[key] for key in keys}, (4, 100), metadata, 0.5)
        return [(o.kind, o.class_id, None if o.mask is None else int(o.mask.sum())) for o in objects]

    assert found("panoptic_seg", "instances", "sem_seg") == [("stuff", 5, 120)]
    assert found("instances", "sem_seg") == [("thing", 3, None)]
    assert found("sem_seg") == [("stuff", 0, 200), ("stuff", 2, 200)]


def test_two_files_of_results(run, results, tmp_path, capsys):
    """B lacks all objects of one image and half of those of another."""
    records = DatasetCatalog.get("shapes_val")
    ids = [record["image_id"] for record in records]
    of_second = [r for r in results if r["image_id"] == ids[1]]
    dropped = [r for r in results if r["image_id"] == ids[4]] + of_second[: len(of_second) // 2]
    a, b = write(tmp_path / "a.json", results), write(tmp_path / "b.json", [r for r in results if r not in dropped])
    code, rows, pictures = run("--a", a, "--b", b, "--count", 2, "--names", "Full", "Less")
    names = [Path(records[i]["file_name"]).stem for i in (4, 1)]
    assert code == 0 and pictures == [f"001_{names[0]}.png", f"002_{names[1]}.png"]
    n, m = len(of_second), len(of_second) // 2
    assert [row["image"] for row in rows[:2]] == [f"{name}.jpg" for name in names] and len(rows) == len(records)
    assert [row["difference"] for row in rows[:3]] == [1, pytest.approx(1 - 2 * (n - m) / (2 * n - m)), 0]
    assert rows[1]["objects of Full"] == n and rows[1]["objects of Less"] == n - m
    assert f"2 pictures of {len(records)} images" in capsys.readouterr().out

    width, height = records[4]["width"], records[4]["height"]
    panels = panels_of(tmp_path / "comparison" / pictures[0])
    image = cv2.imread(records[4]["file_name"])[:, :, ::-1]
    bare = draw(image, {"annotations": []}, MetadataCatalog.get("shapes_val"))
    assert panels[0].shape[:2] == (height * panels[0].shape[1] // width, panels[0].shape[1])
    assert (panels[0] == bare).all() and (panels[3] == bare).all()  # B found nothing
    assert not (panels[1] == bare).all() and not (panels[2] == bare).all()

    write(tmp_path / "low.json", [{**r, "score": 0.2} for r in results])
    run("--a", tmp_path / "low.json", "--b", tmp_path / "low.json")
    assert "Neither model has an object that scores 0.5 or more" in capsys.readouterr().out


def panels_of(path: Path) -> list[np.ndarray]:
    """Image, ground truth, A and B of a picture, without their titles."""
    picture = cv2.imread(str(path))[TITLE_HEIGHT:, :, ::-1]
    width = (picture.shape[1] - 3 * GAP) // 4
    return [picture[:, i * (width + GAP) :][:, :width] for i in range(4)]


@pytest.mark.parametrize(
    ("a", "b", "titles"),
    [
        ("configs/dsg/shapes_dsg.yaml w.pth", "configs/baseline/mask.yaml w.pth", ["A: shapes_dsg", "B: mask"]),
        ("output/dsg/x/config.yaml w.pth", "output/dsg/y/config.yaml w.pth", ["A: x", "B: y"]),
        ("rows/x/seed1/config.yaml w.pth", "rows/y/seed1/config.yaml w.pth", ["A: x/seed1", "B: y/seed1"]),
        ("x.yaml one/model_final.pth", "x.yaml two/model_final.pth", ["A: one/model_final", "B: two/model_final"]),
        ("x.yaml w.pth", "results.json", ["A: x", "B: results"]),
        ("x.yaml w.pth", "x.yaml w.pth", ["A: w", "B: w"]),
    ],
)
def test_titles_tell_the_models_apart(tool, a, b, titles):
    assert tool.titles_of(a.split(), b.split()) == titles


def test_pictures_have_the_titles(run, results, tool, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tool, "titled", lambda picture, title: seen.append(title) or picture)
    a, b = write(tmp_path / "a.json", results), write(tmp_path / "b.json", results)
    assert run("--a", a, "--b", b, "--count", 1)[0] == 0 and seen[2:] == ["A: a", "B: b"]
    assert run("--a", a, "--b", b, "--count", 1, "--names", "One", "Two")[0] == 0 and seen[-2:] == ["One", "Two"]


def test_results_as_instances(tool):
    metadata = MetadataCatalog.get("compared")
    metadata.thing_dataset_id_to_contiguous_id = {5: 0, 9: 1}
    result = {"image_id": 3, "category_id": 9, "bbox": [10, 20, 30, 40], "score": 0.5}
    records = [{"image_id": i, "height": 80, "width": 100} for i in (2, 3)]
    empty, found = (output["instances"] for output in tool.from_results("a.json", [result], records, metadata))
    assert len(empty) == 0 and found.image_size == (80, 100)
    assert found.pred_boxes.tensor.tolist() == [[10, 20, 40, 60]] and found.pred_classes.tolist() == [1]


def test_results_without_boxes_take_those_of_their_masks(run, results, tmp_path):
    masks = [{key: value for key, value in r.items() if key != "bbox"} for r in results]
    a, b = write(tmp_path / "a.json", results), write(tmp_path / "b.json", masks)
    code, rows, _ = run("--a", a, "--b", b, "--count", 1)
    assert code == 0 and {row["difference"] for row in rows} == {0} and any(row["objects of B"] for row in rows)


def test_boxes_of_masks_by_hand(tool, encode_square):
    result = {"image_id": 3, "category_id": 1, "score": 0.5, "segmentation": encode_square}
    assert tool.box_of("a.json", result) == [2, 3, 5, 4]
    assert tool.box_of("a.json", {**result, "bbox": [0, 0, 9, 9]}) == [0, 0, 9, 9]


@pytest.fixture
def encode_square() -> dict:
    mask = np.zeros((20, 30), np.uint8, order="F")
    mask[3:7, 2:7] = 1
    return mask_util.encode(mask)


def test_a_data_set_that_is_no_coco_file(tool):
    """Its ids are positions among the classes."""
    metadata, records = MetadataCatalog.get("compared_records"), [{"image_id": 3, "height": 80, "width": 100}]
    result = {"image_id": 3, "category_id": 1, "bbox": [10, 20, 30, 40], "score": 0.5}
    with pytest.raises(DataError, match="compared_records has no classes of things"):
        next(tool.from_results("a.json", [result], records, metadata))
    metadata.thing_classes = ["one", "two"]
    (output,) = tool.from_results("a.json", [result], records, metadata)
    assert output["instances"].pred_classes.tolist() == [1]
    with pytest.raises(DataError, match=r"category ids \[2\]"):
        next(tool.from_results("a.json", [dict(result, category_id=2)], records, metadata))
    MetadataCatalog.remove("compared_records")


def test_chosen_images_in_the_order_given(run, results, tmp_path):
    records = DatasetCatalog.get("shapes_val")
    files = [Path(records[i]["file_name"]) for i in (5, 0, 3)]
    boxes = [{key: value for key, value in r.items() if key != "segmentation"} for r in results]
    first = records[5]["image_id"]  # where the two agree: it comes first all the same
    weaker = [dict(r, score=0.9 if r["image_id"] == first else 0.3) for r in boxes]
    a, b = write(tmp_path / "a.json", boxes), write(tmp_path / "b.json", weaker)
    code, rows, pictures = run("--a", a, "--b", b, "--images", files[0], files[1].name, files[2].stem)
    assert code == 0 and pictures == [f"{i:03}_{file.stem}.png" for i, file in enumerate(files, start=1)]
    assert [row["difference"] for row in rows] == [1, 1, 0] and [row["objects of B"] > 0 for row in rows] == [
        False,
        False,
        True,
    ]
    bare, _, a_found, b_found = panels_of(tmp_path / "comparison" / pictures[1])
    assert (b_found == bare).all() and not (a_found == bare).all()  # what scores less is not drawn
    _, rows, _ = run("--a", a, "--b", b, "--images", files[1], "--score-threshold", 0.3)
    assert rows[0]["difference"] == 0 and rows[0]["objects of B"] > 0


def test_a_model_and_a_file_on_own_data(run, tiny_cfg, shapes_root, results, tmp_path, capsys):
    cfg = tiny_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 4)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    model, file = ["--a", tmp_path / "config.yaml", tmp_path / "model.pth"], ["--b", write(tmp_path / "b.json", results)]
    own = ["own_compared", shapes_root / "shapes/coco/annotations/instances_val.json", shapes_root / "shapes/coco/val"]
    code, rows, pictures = run(*model, *file, "--dataset", *own, "--score-threshold", 0, "--count", 3, "--columns", 2)
    assert code == 0 and len(pictures) == 3 and len(rows) == 12
    assert all(row["objects of A"] > 0 for row in rows) and all(0 <= row["difference"] <= 1 for row in rows)
    code, again, _ = run(*model, *file, "--dataset", "own_compared", "--score-threshold", 0, "--batch-size", 1)
    assert code == 0 and again == rows
    other = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    other["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(4, 32)
    torch.save({"model": other}, tmp_path / "model.pth")
    assert run(*model, *file)[0] == 2 and "do not fit this config" in capsys.readouterr().err
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove("own_compared")


def test_what_can_be_wrong(run, tool, results, tmp_path, capsys, shapes_root):
    good = write(tmp_path / "good.json", results)
    foreign = write(tmp_path / "foreign.json", [dict(results[0], image_id=7)])
    unknown = write(tmp_path / "unknown.json", [dict(results[0], category_id=77)])
    (tmp_path / "object.json").write_text("{}")
    lacking = {
        key: write(tmp_path / f"no_{key}.json", [{k: v for k, v in results[0].items() if k != key}])
        for key in ("image_id", "category_id", "score")
    }
    shapeless = write(tmp_path / "shapeless.json", [{k: results[0][k] for k in ("image_id", "category_id", "score")}])
    for args, message in (
        (["--a", good, "--b", foreign], "in none of the 12"),
        (["--a", good, "--b", unknown], r"category ids [77]"),
        (["--a", good, "--b", tmp_path / "object.json"], "expected a list"),
        (["--a", good, "--b", tmp_path / "nowhere.json"], "Cannot read"),
        *((["--a", good, "--b", file], f"no usable {key}") for key, file in lacking.items()),
        (["--a", good, "--b", shapeless], "neither 'bbox' nor 'segmentation'"),
        (["--a", good, "--b", "x", "y", "z"], "CONFIG WEIGHTS or RESULTS.json"),
        (["--a", good, "--b", "nowhere.yaml", "model.pth"], "no config file 'nowhere.yaml'"),
        (["--a", good, "--b", good, "--images", "nobody"], "0 such images"),
        (["--a", good, "--b", good, "--score-threshold", 2], "between 0 and 1"),
        (["--a", good, "--b", good, "--count", 0], "at least 1"),
        (["--a", good, "--b", good, "--dataset", "shapes_vall"], "Did you mean shapes_val"),
        (["--a", good, "--b", good, "--dataset", "one", "two"], "--dataset NAME ANNOTATIONS.json"),
        (["--a", good, "--b", good, "--dataset", "shapes_val", good, "x"], "'shapes_val' already"),
    ):
        assert run(*args)[0] == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    with pytest.raises(SystemExit) as done:
        tool.parse_args(["--help"])
    assert done.value.code == 0 and "--images" in capsys.readouterr().out
