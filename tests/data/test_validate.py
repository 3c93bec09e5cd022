"""Every finding of the validator with a planted defect, and repaired copies that validate clean."""

import copy
import json
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import shapely
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from projects.data import builtin, validate_geometry
from projects.data.validate import validate_dataset, validate_file
from projects.data.validate_files import read_coco_json, write_repaired
from projects.data.validate_geometry import check_box, check_segmentation, clip_polygon
from projects.data.validate_report import NOTES, PROBLEMS
from projects.errors import DataError
from projects.evaluation.coco_files import load_ground_truth

REPO = Path(__file__).resolve().parents[2]
W, H = 160, 128
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def val_folder(shapes_root):
    return shapes_root / "shapes/coco"


@pytest.fixture(scope="module")
def clean(val_folder):
    return read_coco_json(val_folder / "annotations/instances_val.json")


@pytest.fixture
def check(tmp_path, val_folder):
    """Write a COCO dict, validate it, and validate its repaired copy; returns both reports."""

    def run(coco, read_images=False, image_root=val_folder / "val"):
        path, fixed = tmp_path / "planted.json", tmp_path / "fixed.json"
        path.write_text(json.dumps(coco))
        before = path.read_bytes()
        report = validate_file(path, image_root, read_images)
        write_repaired(report, fixed)
        assert path.read_bytes() == before
        return report, validate_file(fixed, image_root, read_images)

    return run


def counts(report):
    """kind -> number of findings, without the notes."""
    return {kind: len(texts) for kind, texts in report.findings.items() if kind in PROBLEMS}


def set_in(coco, index, **values):
    coco["annotations"][index].update(values)


def polygon_index(coco):
    return next(i for i, a in enumerate(coco["annotations"]) if isinstance(a["segmentation"], list))


# ---- one planted defect each ----


def plant_malformed_image(coco):
    del coco["images"][-1]["width"]
    return {"malformed-entry": 1, "unknown-image": sum(a["image_id"] == 1000012 for a in coco["annotations"])}


def plant_zero_height(coco):
    coco["images"][-1]["height"] = 0
    return {"malformed-entry": 1, "unknown-image": sum(a["image_id"] == 1000012 for a in coco["annotations"])}


def plant_malformed_annotation(coco):
    coco["annotations"][0] = ["not", "an", "object"]
    del coco["annotations"][1]["image_id"]
    set_in(coco, 2, category_id="star")
    return {"malformed-entry": 3}


def plant_duplicate_category(coco):
    coco["categories"].append({"id": 1, "name": "again"})
    return {"duplicate-category-id": 1}


def plant_duplicate_image(coco):
    coco["images"].append({**coco["images"][0], "file_name": coco["images"][1]["file_name"]})
    return {"duplicate-image-id": 1}


def plant_missing_image(coco):
    coco["images"][0]["file_name"] = "elsewhere.jpg"
    return {"missing-image": 1}


def plant_duplicate_annotation(coco):
    for index in (3, 4):
        set_in(coco, index, id=coco["annotations"][2]["id"])
    return {"duplicate-annotation-id": 2}


def plant_unknown_image(coco):
    set_in(coco, 0, image_id=77)
    return {"unknown-image": 1}


def plant_unknown_category(coco):
    set_in(coco, 0, category_id=0)
    set_in(coco, 1, category_id=9)
    return {"unknown-category": 2}


def plant_degenerate_boxes(coco):
    for index, box in enumerate(([5, 5, 0, 9], [5, 5, 9, -1], [NAN, 5, 9, 9], [5, INF, 9, 9], [5, 5, 9], None, "box")):
        set_in(coco, index, bbox=box)
    return {"degenerate-box": 7}


def plant_degenerate_box_without_mask(coco):
    set_in(coco, 0, bbox=[5, 5, 0, 9], segmentation=[])
    return {"degenerate-box": 1, "missing-mask": 1}


def plant_missing_masks(coco):
    set_in(coco, 0, segmentation=[])
    set_in(coco, 1, segmentation=None)
    del coco["annotations"][2]["segmentation"]
    return {"missing-mask": 3}


def plant_missing_areas(coco):
    set_in(coco, 0, area=None)
    del coco["annotations"][1]["area"]
    return {"no-area": 2}


def plant_box_outside(coco):
    for index, box in enumerate(([-3, 2, 9, 9], [150, 2, 11, 9], [2, 120, 9, 8.2], [200, 5, 9, 9])):
        set_in(coco, index, bbox=box)
    return {"box-outside": 4}


def plant_bad_polygons(coco):
    index = polygon_index(coco)
    good = coco["annotations"][index]["segmentation"]
    bad = [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, NAN, 5, 6], [[1, 2], [3, 4], [5, 6]], "polygon", []]
    set_in(coco, index, segmentation=bad + good)
    return {"bad-polygon": len(bad)}


def plant_only_bad_polygons(coco):
    set_in(coco, 0, segmentation=[[1, 2, 3, 4]])
    set_in(coco, 1, segmentation="polygons")
    return {"bad-polygon": 2}


def plant_polygon_outside(coco):
    set_in(coco, 0, segmentation=[[-5, 10, 20, 10, 20, 30]], bbox=[0, 10, 20, 20])
    set_in(coco, 1, segmentation=[[150, 100, 190, 100, 150, 140]], bbox=[150, 100, 10, 28])
    set_in(coco, 2, segmentation=[[200, 10, 220, 10, 220, 30], [5, 5, 20, 5, 20, 20]], bbox=[5, 5, 15, 15])
    return {"polygon-outside": 3}


def plant_polygon_wholly_outside(coco):
    set_in(coco, 0, segmentation=[[200, 10, 220, 10, 220, 30]])
    return {"polygon-outside": 1}


def plant_rle_size(coco):
    set_in(coco, 0, segmentation={"size": [W, H], "counts": [5, 6, W * H - 11]})
    return {"rle-size": 1}


def plant_bad_rle(coco):
    size = [H, W]
    whole = mask_util.encode(np.asfortranarray(np.eye(H, W, dtype=np.uint8)))["counts"].decode()
    broken = ([5, 6], [5, -6, W * H + 1], [5, "6", W * H - 11], "", whole[:-1], "\u20ac" + whole, 7, None, [2**70])
    for index, value in enumerate(broken):
        set_in(coco, index, segmentation={"size": size, "counts": value})
    return {"bad-rle": len(broken)}


def plant_empty_masks(coco):
    set_in(coco, 0, segmentation={"size": [H, W], "counts": [H * W]})
    set_in(coco, 1, segmentation=mask_to_rle(np.zeros((H, W), np.uint8)))
    set_in(coco, 2, segmentation=[[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]])
    return {"empty-mask": 3}


def mask_to_rle(mask):
    rle = mask_util.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


DEFECTS = {name[6:]: function for name, function in list(globals().items()) if name.startswith("plant_")}


@pytest.mark.parametrize("plant", DEFECTS.values(), ids=DEFECTS.keys())
def test_planted_defect_is_found_counted_and_repaired(check, clean, plant):
    coco = copy.deepcopy(clean)
    expected = plant(coco)
    report, after = check(coco)
    assert counts(report) == expected
    assert report.problems == sum(expected.values()) and sum(report.changes.values()) > 0
    assert counts(after) == {}


def test_all_defects_together(check, clean):
    """Each in annotations of its own; what was sound comes through unchanged."""
    coco, spoiled = {**clean, "annotations": []}, 0
    for k, plant in enumerate(DEFECTS.values()):
        part = copy.deepcopy(clean)
        plant(part)
        for annotation in part["annotations"]:
            if annotation not in clean["annotations"]:
                if isinstance(annotation, dict):
                    annotation["id"] = 10**9 * (k + 1) + len(coco["annotations"])
                coco["annotations"].append(annotation)
                spoiled += 1
    coco["annotations"] += copy.deepcopy(clean["annotations"])
    report, after = check(coco)
    assert spoiled >= 30 and counts(after) == {}
    assert report.repaired["annotations"][-len(clean["annotations"]) :] == clean["annotations"]


def test_clean_data_is_clean_and_the_copy_equal(check, clean):
    report, after = check(clean, read_images=True)
    assert report.problems == 0 and report.repaired == clean and not report.changes
    assert list(report.findings) == ["no-objects"] and after.findings == report.findings
    assert "no-objects" in report.table()


def test_broken_pictures(check, clean, val_folder, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(val_folder / "val", folder)
    names = [image["file_name"] for image in clean["images"]]
    (folder / names[0]).write_bytes((folder / names[0]).read_bytes()[:2000])
    (folder / names[1]).write_bytes(b"no picture")
    Image.open(folder / names[2]).crop((0, 0, 80, 128)).save(folder / names[2])
    turned = Image.open(folder / names[3])
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees: 128x160 as training reads it
    turned.save(folder / names[3], exif=exif)
    (folder / names[4]).unlink()
    report, after = check(clean, True, folder)
    assert counts(report) == {"unreadable-image": 2, "image-size": 2, "missing-image": 1}
    assert counts(after) == {} and len(report.repaired["images"]) == len(names) - 5
    assert "160x128" in report.findings["image-size"][0] and names[2] in report.findings["image-size"][0]
    assert counts(check(clean, False, folder)[0]) == {"missing-image": 1}
    assert check(clean, False, None)[0].problems == 0


def test_repairs_change_no_more_than_needed(check, clean):
    coco = copy.deepcopy(clean)
    set_in(coco, 0, bbox=[-4.5, 3, 10, 12], note="kept")
    set_in(coco, 1, segmentation=[[150, 10, 170, 10, 170, 30, 150, 30]])
    set_in(coco, 2, bbox=[0, 0, 0, 0], segmentation=[[10, 20, 14, 20, 14, 26, 10, 26]])
    coco["extra"] = {"anything": 1}
    repaired = check(coco)[0].repaired
    assert repaired["extra"] == {"anything": 1} and len(repaired["annotations"]) == len(clean["annotations"])
    first, second, third = repaired["annotations"][:3]
    assert first["bbox"] == [0, 3, 5.5, 12] and first["note"] == "kept"
    assert second["area"] == 200
    points = np.reshape(second["segmentation"][0], (-1, 2))
    assert points.min(0).tolist() == [150, 10] and points.max(0).tolist() == [160, 30]
    assert third["bbox"] == [10, 20, 4, 6]
    assert repaired["annotations"][3:] == clean["annotations"][3:]


def test_boxes_alone_are_legal(check, clean):
    coco = copy.deepcopy(clean)
    for annotation in coco["annotations"]:
        del annotation["segmentation"]
    report, after = check(coco)
    assert report.problems == 0 and report.repaired == coco and "no-mask" in after.table()
    del coco["annotations"][0]["area"]
    box = coco["annotations"][0]["bbox"]
    assert check(coco)[0].repaired["annotations"][0]["area"] == box[2] * box[3]


def test_image_ids_of_text_are_a_problem_in_a_file(check, clean):
    """COCO's evaluation wants numbers; nothing is dropped for it."""
    coco = copy.deepcopy(clean)
    for entry, key in [(i, "id") for i in coco["images"]] + [(a, "image_id") for a in coco["annotations"]]:
        if entry[key] == 1000001:
            entry[key] = "first"
    report, _ = check(coco)
    assert counts(report) == {"image-id-no-number": 1} and report.repaired == coco
    with pytest.raises(DataError, match="must be integers"):
        load_ground_truth(coco, ["bbox"])


def test_boxes_may_exceed_by_rounding():
    assert check_box([0, 0, W + 0.05, H], W, H) == ([], [0, 0, W + 0.05, H])
    problems, box = check_box([0, 0, W + 0.5, H], W, H)
    assert problems[0][0] == "box-outside" and box == [0, 0, W, H]


def test_one_pixel_masks_are_legal():
    mask = np.zeros((H, W), np.uint8)
    mask[-1, -1] = 1
    assert check_segmentation(mask_to_rle(mask), W, H)[0] == []
    polygon = [W - 1, H - 1, W, H - 1, W, H, W - 1, H]
    assert check_segmentation([polygon], W, H) == ([], [polygon])


# ---- geometry ----


def test_clip_polygon_by_hand():
    triangle = np.array([[-2.0, 1.0], [2.0, 1.0], [2.0, 5.0]])  # its slanted edge crosses x = 0 at y = 3
    clipped = clip_polygon(triangle, 10, 10)
    assert {tuple(p) for p in clipped} == {(0, 1), (2, 1), (2, 5), (0, 3)}
    assert len(clip_polygon(triangle - 20, 10, 10)) == 0


def test_clip_polygon_against_shapely():
    rng = np.random.default_rng(0)
    for _ in range(100):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radii = rng.uniform(5, 40, 9)[:, None]  # concave, never crossing itself
        points = rng.uniform(-10, 50, 2) + radii * np.stack([np.cos(angles), np.sin(angles)], 1)
        expected = shapely.Polygon(points).buffer(0).intersection(shapely.box(0, 0, 40, 30)).area
        if not shapely.Polygon(points).is_valid:
            continue
        x, y = clip_polygon(points, 40, 30).T if expected else (np.zeros(3), np.zeros(3))
        area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
        assert area == pytest.approx(expected, abs=1e-6)


def test_rle_runs_are_decoded_as_pycocotools_encodes_them():
    rng = np.random.default_rng(1)
    for density in (0, 0.001, 0.02, 0.5, 1):
        mask = rng.random((300, 211)) < density
        flat = mask.T.ravel()
        ends = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *ends, flat.size]).tolist()
        expected = [0, *runs] if flat[0] else runs
        assert validate_geometry._decode_counts(mask_to_rle(mask.astype(np.uint8))["counts"]) == expected


# ---- files ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "cut off"),
        ("", "cut off"),
        ("\x00\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "found a list"),
        ("3", "found a int"),
        ('{"images": [], "annotations": []}', "'categories' is missing"),
        ('{"images": {}, "annotations": [], "categories": []}', "'images' is a dict"),
    ],
)
def test_files_that_are_no_coco_files(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        validate_file(tmp_path / "a.json")


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        validate_file(tmp_path / "absent.json")
    (tmp_path / "a.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DataError, match="image folder"):
        validate_file(tmp_path / "a.json", tmp_path / "absent")
    with pytest.raises(DataError, match="--image-root"):
        validate_file(tmp_path / "a.json", read_images=True)
    assert validate_file(tmp_path / "a.json").problems == 0


def test_the_original_is_never_overwritten(tmp_path, clean):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(clean))
    before = path.read_bytes()
    os.symlink(path, tmp_path / "link.json")
    os.link(path, tmp_path / "hard.json")
    report = validate_file(path)
    for out in (path, tmp_path / "link.json", tmp_path / "hard.json", tmp_path / "x/../a.json"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="is the data set itself"):
            write_repaired(report, out)
    assert path.read_bytes() == before


def test_the_copy_is_written_whole_or_not_at_all(tmp_path, clean):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(clean))
    report, out = validate_file(path), tmp_path / "out.json"
    out.write_text("earlier")
    report.repaired["images"].append(object())  # cannot be written
    with pytest.raises(TypeError):
        write_repaired(report, out)
    assert out.read_text() == "earlier" and sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "out.json"]
    with pytest.raises(DataError, match="Could not write"):
        write_repaired(validate_file(path), path / "b.json")


# ---- registered data sets ----


@pytest.mark.parametrize("variant", ["", "_stuff", "_panoptic"])
def test_registered_sets_are_clean(shapes_root, variant):
    builtin.register_shapes(shapes_root)
    report = validate_dataset(f"shapes_val{variant}", read_images=True)
    assert counts(report) == {} and report.images == 12


def test_unknown_name_suggests_one(shapes_root):
    with pytest.raises(DataError, match=r"no data set 'shape_train'\. Did you mean shapes_train.*\? Give a"):
        validate_dataset("shape_train")


@pytest.fixture
def moved(shapes_root, tmp_path):
    """A copy of the small data set under the registered names; the catalogs are put back afterwards."""
    shutil.copytree(shapes_root / "shapes/coco", tmp_path / "shapes/coco")
    builtin.register_shapes(tmp_path)
    yield tmp_path / "shapes/coco"
    builtin.register_shapes(shapes_root)


def test_maps(moved):
    maps, panoptic = moved / "stuffthingmaps/val", moved / "panoptic_val"
    (maps / "000001000001.png").unlink()
    (maps / "000001000002.png").write_bytes(b"no picture")
    pixels = np.array(Image.open(maps / "000001000003.png"))
    pixels[0, :3] = [11, 254, 255]
    Image.fromarray(pixels).save(maps / "000001000003.png")
    (panoptic / "000001000006.png").unlink()
    rgb = np.array(Image.open(panoptic / "000001000002.png"))
    rgb[0, 0] = [1, 2, 3]
    Image.fromarray(rgb).save(panoptic / "000001000002.png")
    Image.fromarray(rgb[:, :80]).save(panoptic / "000001000003.png")
    Image.fromarray(np.zeros_like(rgb)).save(panoptic / "000001000004.png")
    Image.fromarray(rgb[..., 0]).save(panoptic / "000001000005.png")

    report = validate_dataset("shapes_val_panoptic", read_images=True)
    assert counts(report) == {"missing-map": 2, "bad-map": 2, "unknown-map-id": 4}
    texts = report.findings["unknown-map-id"]
    assert "image 1000003" in texts[1] and "[11, 254]" in texts[1]
    assert f"[{1 + 2 * 256 + 3 * 65536}]" in texts[0]
    assert "segments without a pixel" in texts[2] and "one channel" in texts[3]
    assert counts(validate_dataset("shapes_val_stuff", read_images=True)) == {
        "missing-map": 1,
        "bad-map": 1,
        "unknown-map-id": 1,
    }
    assert counts(validate_dataset("shapes_val_panoptic")) == {"missing-map": 2}


def test_a_loader_that_fails_is_reported_beside_the_findings(moved):
    path = moved / "annotations/instances_val.json"
    coco = read_coco_json(path)
    set_in(coco, 1, id=coco["annotations"][0]["id"])
    path.write_text(json.dumps(coco))
    report = validate_dataset("shapes_val_stuff")
    assert counts(report) == {"duplicate-annotation-id": 1, "loader-fails": 1}
    assert "not unique" in report.findings["loader-fails"][0]


def test_missing_registered_files(moved):
    (moved / "annotations/instances_val.json").unlink()
    with pytest.raises(DataError, match="prepare_shapes.py"):
        validate_dataset("shapes_val")
    with pytest.raises(DataError, match="coco_2017_val.*DETECTRON2_DATASETS"):
        validate_dataset("coco_2017_val")


def test_records_of_a_function(val_folder, tmp_path):
    """A data set without an annotation file: boxes in either mode, whole paths, no sizes for semantic records."""
    picture = str(val_folder / "val/000001000001.jpg")
    size = {"width": W, "height": H}
    box = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "segmentation": [[5, 5, 9, 5, 9, 9]]}
    records = [
        {"file_name": picture, "image_id": 3, **size, "annotations": [{**box, "bbox": [5, 5, 9, 9]}]},
        {"file_name": picture, "image_id": 4, **size, "annotations": [{**box, "bbox": [150, 5, 165, 9]}]},
        {"file_name": picture, "sem_seg_file_name": str(tmp_path / "absent.png")},
    ]
    DatasetCatalog.register("own", lambda: records)
    MetadataCatalog.get("own").set(thing_classes=["thing"])
    try:
        report = validate_dataset("own")
        assert counts(report) == {"box-outside": 1, "missing-map": 1}
        assert report.repaired["annotations"][1]["bbox"] == [150, 5, 10, 4]
        write_repaired(report, tmp_path / "own.json")
        assert counts(validate_file(tmp_path / "own.json", "/")) == {}
    finally:
        DatasetCatalog.remove("own")
        MetadataCatalog.remove("own")


# ---- the command ----


def test_command_line(tmp_path, clean, val_folder, run_script, capsys):
    coco = copy.deepcopy(clean)
    set_in(coco, 0, bbox=[-5, 3, 10, 12])
    path, out = tmp_path / "a.json", tmp_path / "out/fixed.json"
    path.write_text(json.dumps(coco))
    arguments = (path, "--image-root", val_folder / "val", "--read-images")
    found = run_script("tools/validate_dataset.py", *arguments, "--fix", out)
    assert found.returncode == 1, found.stderr
    assert "box-outside" in found.stdout and "box clipped" in found.stdout and "Traceback" not in found.stderr

    main = runpy.run_path(str(REPO / "tools/validate_dataset.py"))["main"]
    assert main([str(a) for a in (out, *arguments[1:], "--json")]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == 0
    for refused in ([path, "--fix", path], [path.with_name("b.json")], ["no_such_set"], ["own", "--image-root", "."]):
        assert main([str(a) for a in refused]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("error: ")


def test_table_and_json_of_every_kind(check, clean):
    coco = copy.deepcopy(clean)
    for plant in (plant_box_outside, plant_duplicate_category):
        plant(coco)
    report, _ = check(coco)
    table = report.table()
    assert "box-outside" in table and "\n" in table and " 4 " in table
    assert table.count("leaves the image") == 3  # the first three of four
    findings = report.as_dict()["findings"]
    assert findings["box-outside"]["count"] == 4 == len(findings["box-outside"]["texts"])
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert not set(PROBLEMS) & set(NOTES)


# ---- real photographs ----


def test_real_coco(real_coco_root, check):
    """Five groups as uncompressed RLE, one picture without annotation: clean; and spoiled as a hand would spoil it."""
    coco = read_coco_json(real_coco_root / "coco/annotations/instances_train2017.json")
    root = real_coco_root / "coco/train2017"
    report, _ = check(coco, True, root)
    assert report.problems == 0 and report.repaired == coco
    assert report.findings == {"no-objects": ["image 262284"]}

    crowd = [a for a in coco["annotations"] if a["iscrowd"]]
    assert len(crowd) == 5
    crowd[0]["segmentation"]["counts"].pop()
    crowd[1]["segmentation"]["size"].reverse()
    coco["annotations"][7]["bbox"][0] -= 1000
    report, after = check(coco, False, root)
    assert counts(report) == {"bad-rle": 1, "rle-size": 1, "box-outside": 1} and counts(after) == {}
    assert len(report.repaired["annotations"]) == 468


def test_masks_in_every_form_that_detectron2_takes(tmp_path):
    """Arrays, RLE with counts as bytes, and polygons as arrays are no defects, and can be written as JSON."""
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(tmp_path / "image.png")
    mask = np.zeros((H, W), np.uint8)
    mask[10:20, 30:50] = 1
    forms = [mask, mask_util.encode(np.asfortranarray(mask)), [np.array([30.0, 10, 50, 10, 50, 20, 30, 20])]]
    annotations = [
        {"bbox": [30, 10, 20, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "segmentation": form} for form in forms
    ]
    record = {"file_name": str(tmp_path / "image.png"), "image_id": 1, "height": H, "width": W, "annotations": annotations}
    name = "records_with_every_form_of_mask"
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["thing"])
    try:
        report = validate_dataset(name)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert report.problems == 0, report.findings
    assert len(json.loads(json.dumps(report.repaired))["annotations"]) == 3
