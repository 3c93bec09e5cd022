"""Cityscapes' loader on folders of a few drawn pixels, and on the generated shapes, whose COCO version must agree."""

import json
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import id2label, trainId2label
from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.structures import BitMasks, BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from projects import load_config
from projects.data import builtin, cityscapes_files  # noqa: F401  builtin registers the data sets
from projects.data.check import check_datasets
from projects.data.cityscapes import SPLITS, TASKS, load_cityscapes, register_cityscapes
from projects.data.cityscapes_panoptic import write_panoptic
from projects.data.id_maps import read_id_map
from projects.data.loader import load_records, seeded
from projects.data.mapper import InstanceMapper
from projects.data.validate import validate_dataset
from projects.errors import ConfigError, DataError

REPO = Path(__file__).resolve().parents[2]
SIZE = 24, 32  # height, width
THINGS = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
FIRST, SECOND = "aachen_000000_000019", "bochum_000001_000019"


def drawn() -> np.ndarray:
    """Instance ids with everything that is special."""
    ids = np.full(SIZE, 7, np.int32)  # road
    ids[:6] = 23  # sky
    ids[8:16, 2:12] = 26000  # a car with a hole
    ids[10:13, 5:9] = 7
    ids[9:12, 14:17] = ids[18:22, 20:25] = 24003  # a person in two parts
    ids[2:20, 28] = 33001  # a bicycle one pixel wide
    ids[23, 31] = 31000  # a train of one pixel, the last of the image
    ids[17:20, 3:8] = 26  # a group of cars
    ids[21:23, 1:9] = 29000  # a caravan
    ids[21:23, 10:12] = 30  # a group of trailers
    ids[23, 0] = 0
    return ids


EXPECTED = {  # instance id -> class among the 8, class among the 10, box
    26000: (2, 2, [2, 8, 12, 16]),
    24003: (0, 0, [14, 9, 25, 22]),
    33001: (7, 9, [28, 2, 29, 20]),
    31000: (5, 7, [31, 23, 32, 24]),
    26: (2, 2, [3, 17, 8, 20]),
    29000: (None, 5, [1, 21, 9, 23]),
    30: (None, 6, [10, 21, 12, 23]),
}


def write_image(root: Path, ids: np.ndarray, split="val", name=FIRST, truth=True) -> None:
    """An image with its annotations, in Cityscapes' folders."""
    for folder in ("leftImg8bit", "gtFine") if truth else ("leftImg8bit",):
        (root / folder / split / name.split("_")[0]).mkdir(parents=True, exist_ok=True)
    stem = f"{split}/{name.split('_')[0]}/{name}"
    picture = np.random.RandomState(0).randint(0, 255, (*ids.shape, 3), dtype=np.uint8)
    Image.fromarray(picture).save(root / f"leftImg8bit/{stem}_leftImg8bit.png")
    if truth:
        labels = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
        Image.fromarray(labels).save(root / f"gtFine/{stem}_gtFine_labelIds.png")
        Image.fromarray(ids.astype(np.uint16)).save(root / f"gtFine/{stem}_gtFine_instanceIds.png")


def truth_file(root: Path, kind="instanceIds", name=FIRST, split="val") -> Path:
    return root / f"gtFine/{split}/{name.split('_')[0]}/{name}_gtFine_{kind}.png"


def decode(annotation: dict) -> np.ndarray:
    return mask_util.decode(annotation["segmentation"]).astype(bool)


def load(root: Path, task="instance", split="val") -> list[dict]:
    return load_cityscapes(str(root), split, TASKS[task])


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder of two images: the drawn one, and one of road only."""
    write_image(tmp_path / "cityscapes", drawn())
    write_image(tmp_path / "cityscapes", np.full(SIZE, 7), name=SECOND)
    return tmp_path / "cityscapes"


# ---- instances ----


@pytest.mark.parametrize("task, column", [("instance", 0), ("instance10", 1)])
def test_every_object_survives_with_its_mask_class_and_box(root, task, column):
    first, second = load(root, task)
    assert second["annotations"] == []
    found = {}
    for annotation in first["annotations"]:
        mask = decode(annotation)
        (value,) = set(drawn()[mask].tolist())
        assert np.array_equal(mask, drawn() == value), "holes and parts belong to the mask"
        assert annotation["bbox_mode"] == BoxMode.XYXY_ABS and annotation["iscrowd"] == (value < 1000)
        found[value] = (annotation["category_id"], annotation["bbox"])
    assert found == {i: (row[column], row[2]) for i, row in EXPECTED.items() if row[column] is not None}
    assert len(first["annotations"]) == len(found)


def test_records_name_their_files(root):
    first, second = load(root)
    assert (first["image_id"], second["image_id"]) == (FIRST, SECOND)
    assert (first["height"], first["width"]) == SIZE
    assert first["file_name"] == str(root / f"leftImg8bit/val/aachen/{FIRST}_leftImg8bit.png")
    assert first["instance_ids_file_name"] == str(truth_file(root))
    assert first["label_ids_file_name"] == str(truth_file(root, "labelIds"))
    assert [record["image_id"] for record in load(root, "instance10")] == [1, 2]


def test_8_and_16_bits_are_read_alike_also_as_pixels_of_32(root, monkeypatch):
    """A PNG has 16 bits at most, and there are versions of Pillow that give such a one as 32 (mode I)."""
    expected = load(root)
    path, opened = truth_file(root), Image.open
    assert opened(path).mode == "I;16"
    os.utime(path)  # it is read again
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda file: opened(file).convert("I") if str(file) == str(path) else opened(file))
        assert read_id_map(str(path)).dtype == np.int32 and load(root) == expected
    Image.fromarray(np.full(SIZE, 26, np.uint8)).save(path)
    (group,) = load(root)[0]["annotations"]
    assert group["iscrowd"] == 1 and group["bbox"] == [0, 0, 32, 24] and decode(group).all()


def test_highest_instance_number(root):
    write_image(root, np.where(drawn() == 26000, 33999, drawn()))
    assert sorted(a["category_id"] for a in load(root)[0]["annotations"]) == [0, 2, 5, 7, 7]


def test_test_split_has_no_annotations(root):
    write_image(root, drawn(), split="test", name="berlin_000000_000019")  # placeholders, as the benchmark has them
    write_image(root, drawn(), split="test", name="bielefeld_000000_000019", truth=False)
    for task in TASKS:
        records = load(root, task, "test")
        assert [set(record) for record in records] == [{"file_name", "image_id", "height", "width"}] * 2
    shutil.rmtree(root / "gtFine")
    assert len(load(root, split="test")) == 2


def test_numbered_records_become_coco_ground_truth(root):
    register_cityscapes(root, "drawn", ("val",))
    coco = convert_to_coco_dict("drawn_instance10_val")
    assert [c["id"] for c in coco["categories"]] == [24, 25, 26, 27, 28, 29, 30, 31, 32, 33]
    rows = {(a["category_id"], a["iscrowd"], a["area"], tuple(a["bbox"])) for a in coco["annotations"]}
    assert (26, 0, 68.0, (2.0, 8.0, 10.0, 8.0)) in rows and (26, 1, 15.0, (3.0, 17.0, 5.0, 3.0)) in rows
    assert len(rows) == 7 and {a["image_id"] for a in coco["annotations"]} == {1}


def test_groups_are_not_trained_on(root):
    cfg = load_config("", ["MODEL.MASK_ON", True])
    mapped = InstanceMapper(cfg, True, augmentations=[])(load(root)[0])["instances"]
    assert sorted(mapped.gt_classes.tolist()) == [0, 2, 5, 7] and isinstance(mapped.gt_masks, BitMasks)
    areas = {int(c): int(m.sum()) for c, m in zip(mapped.gt_classes, mapped.gt_masks.tensor, strict=True)}
    assert areas == {0: 9 + 20, 2: 80 - 12, 5: 1, 7: 18}


# ---- registration ----


@pytest.mark.parametrize("prefix, splits", [("cityscapes", SPLITS), ("shapes_cityscapes", ("train", "val"))])
def test_registered_names_and_metadata(prefix, splits):
    for split in splits:
        kinds = {task: MetadataCatalog.get(f"{prefix}_{task}_{split}") for task in TASKS}
        for task, metadata in kinds.items():
            assert f"{prefix}_{task}_{split}" in DatasetCatalog.list()
            assert metadata.split == split
            assert metadata.image_dir.endswith(f"cityscapes/leftImg8bit/{split}")
            assert metadata.gt_dir.endswith(f"cityscapes/gtFine/{split}")
            assert metadata.evaluator_type == f"cityscapes_{task}"
        for task in ("instance", "panoptic"):
            metadata = kinds[task]
            assert metadata.thing_classes == THINGS
            assert metadata.thing_dataset_id_to_contiguous_id == {24: 0, 25: 1, 26: 2, 27: 3, 28: 4, 31: 5, 32: 6, 33: 7}
            assert metadata.thing_colors[2] == [0, 0, 142]
        assert kinds["instance10"].thing_classes == [*THINGS[:5], "caravan", "trailer", *THINGS[5:]]
        for task in ("semantic", "panoptic"):
            metadata = kinds[task]
            assert metadata.stuff_classes == [trainId2label[i].name for i in range(19)]
            assert metadata.label_id_of_train_id == [trainId2label[i].id for i in range(19)]
            assert metadata.ignore_label == 255 and len(metadata.stuff_colors) == 19
            assert all(id2label[i].trainId == k for i, k in metadata.stuff_dataset_id_to_contiguous_id.items())
        assert kinds["semantic"].get("thing_classes") is None and kinds["instance"].get("stuff_classes") is None


def test_classes_come_from_the_data_set_and_missing_data_is_said(root, monkeypatch):
    register_cityscapes(root, "drawn", ("val",))
    for task, classes in (("instance", (8, 54)), ("instance10", (10, 54)), ("panoptic", (8, 19))):  # 54: the default
        if task == "panoptic":
            write_panoptic(root, "val", progress=False)
        cfg = load_config("", ["DATASETS.TRAIN", (f"drawn_{task}_val",)])
        check_datasets(cfg, set())
        assert classes == (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        assert len(load_records(cfg)) == 1, "images without instances are left out, as Detectron2 does"
    cfg = load_config("", ["DATASETS.TRAIN", ("drawn_instance_val", "drawn_instance10_val")])
    with pytest.raises(ConfigError, match="different thing_classes"):
        check_datasets(cfg, set())
    shutil.rmtree(root / "gtFine")
    with pytest.raises(DataError, match="folder gtFine/val is missing"):
        check_datasets(load_config("", ["DATASETS.TEST", ("drawn_instance_val",)]), set(), evaluation_only=True)


def test_shapes_agree_with_their_coco_version(shapes_root):
    for split in ("train", "val"):
        coco = DatasetCatalog.get(f"shapes_{split}")
        numbered = DatasetCatalog.get(f"shapes_cityscapes_instance10_{split}")
        cityscapes = DatasetCatalog.get(f"shapes_cityscapes_instance_{split}")
        assert len(cityscapes) == len(coco) == len(numbered)
        for record, same in zip(cityscapes, numbered, strict=True):
            twin = coco[int(record["image_id"].split("_")[1])]
            assert len(record["annotations"]) == len(same["annotations"]) == len(twin["annotations"])
            expected = {}
            for a in twin["annotations"]:
                segmentation = a["segmentation"]
                if isinstance(segmentation, list):
                    segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, record["height"], record["width"]))
                box = BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
                expected[mask_util.decode(segmentation).tobytes()] = (a["category_id"], a["iscrowd"], box)
            for a in record["annotations"]:
                row = (a["category_id"], a["iscrowd"], a["bbox"])
                assert expected[mask_util.decode(a["segmentation"]).tobytes()] == row


# ---- semantic labels ----


@pytest.fixture
def both_maps(root):
    """The record as it is registered, and one whose map holds train ids already, by the scripts' table."""
    record = load(root, "semantic")[0]
    table = np.array([id2label[i].trainId if i in id2label else 255 for i in range(256)], np.uint8)
    path = root / "train_ids.png"
    Image.fromarray(table[np.asarray(Image.open(record["label_ids_file_name"]))]).save(path)
    plain = {key: value for key, value in record.items() if key != "sem_seg_table"} | {"sem_seg_file_name": str(path)}
    return record, plain


@pytest.mark.parametrize("is_train", [True, False])
def test_label_ids_become_train_ids_through_augmentation(both_maps, is_train):
    sizes = ["INPUT.MIN_SIZE_TRAIN", (17, 41), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TEST", 19]
    mapper = InstanceMapper(load_config("", sizes), is_train)
    seen = set()
    for draw in range(8):
        samples = []
        for record in both_maps:
            with seeded(0, draw):
                samples.append(mapper(record))
        assert "sem_seg_table" not in samples[0] and samples[0]["sem_seg"].dtype == torch.int64
        assert torch.equal(samples[0]["sem_seg"], samples[1]["sem_seg"])
        assert samples[0]["sem_seg"].shape == samples[0]["image"].shape[1:]
        seen |= set(samples[0]["sem_seg"].unique().tolist())
    assert seen >= {0, 10, 11, 13, 18, 255} and seen <= {*range(19), 255}


def test_table_sees_every_pixel_once(both_maps):
    record, _ = both_maps
    sem_seg = InstanceMapper(load_config(""), True, augmentations=[])(record)["sem_seg"].numpy()
    labels = np.where(drawn() < 1000, drawn(), drawn() // 1000)
    assert np.array_equal(sem_seg, np.vectorize(lambda i: id2label[i].trainId)(labels))
    assert sem_seg[23, 0] == 255 and sem_seg[21, 1] == 255  # unlabelled; caravan
    assert record["sem_seg_table"][34:] == b"\xff" * 222, "with what Detectron2's main branch pads"


def test_padding_is_ignored(both_maps):
    sem_seg = InstanceMapper(load_config(""), True, augmentations=[T.FixedSizeCrop((40, 40))])(both_maps[0])["sem_seg"]
    assert sem_seg.shape == (40, 40) and (sem_seg[24:] == 255).all() and (sem_seg[:, 32:] == 255).all()
    assert (sem_seg[:6, :28] == 10).all()


# ---- panoptic ----


def test_panoptic_files_are_those_of_the_scripts(shapes_root, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    shutil.copytree(shapes_root / "shapes/cityscapes/leftImg8bit/val", ours / "leftImg8bit/val")
    shutil.copytree(shapes_root / "shapes/cityscapes/gtFine/val", ours / "gtFine/val")
    theirs.mkdir()
    convert2panoptic(str(ours / "gtFine"), str(theirs), setNames=["val"])
    before = sorted(os.listdir("."))
    assert write_panoptic(ours, "val", workers=2) is True
    assert sorted(os.listdir(".")) == before
    files = {path.relative_to(theirs) for path in theirs.rglob("*.*")}
    assert len(files) == 13
    for path in files:
        assert (ours / "gtFine" / path).read_bytes() == (theirs / path).read_bytes()
    assert sorted(os.listdir(ours / "gtFine")) == ["cityscapes_panoptic_val", "cityscapes_panoptic_val.json", "val"]


def test_panoptic_records(root):
    write_panoptic(root, "val", progress=False)
    first, second = load(root, "panoptic")
    assert [a["category_id"] for a in first["annotations"]] == [a["category_id"] for a in load(root)[0]["annotations"]]
    assert first["sem_seg_file_name"] == first["label_ids_file_name"] and len(first["sem_seg_table"]) == 256
    rgb = np.asarray(Image.open(first["pan_seg_file_name"])).astype(int)
    segments = rgb @ np.array([1, 256, 65536])
    assert np.array_equal(segments, np.where(np.isin(drawn(), [0, 29000, 30]), 0, drawn())), "what is not evaluated is void"
    found = {s["id"]: (s["category_id"], s["isthing"], s["iscrowd"]) for s in first["segments_info"]}
    assert found == {
        7: (0, False, 0),
        23: (10, False, 0),
        26: (2, True, 1),
        24003: (0, True, 0),
        26000: (2, True, 0),
        31000: (5, True, 0),
        33001: (7, True, 0),
    }
    assert [s["category_id"] for s in second["segments_info"]] == [0]


def test_panoptic_files_are_written_when_needed(root, capsys):
    panoptic = root / "gtFine/cityscapes_panoptic_val.json"
    assert write_panoptic(root, "val", workers=0, progress=False) is True
    assert capsys.readouterr().out == "", "the scripts print"
    written = panoptic.stat().st_mtime_ns
    assert write_panoptic(root, "val", progress=False) is False and panoptic.stat().st_mtime_ns == written
    assert write_panoptic(root, "val", force=True, progress=False) is True
    (root / f"gtFine/cityscapes_panoptic_val/{SECOND}_gtFine_panoptic.png").unlink()
    assert write_panoptic(root, "val", progress=False) is True
    write_image(root, np.where(drawn() == 26000, 27000, drawn()))
    os.utime(truth_file(root), ns=(panoptic.stat().st_mtime_ns + 1,) * 2)
    assert write_panoptic(root, "val", progress=False) is True
    assert 27000 in {s["id"] for s in load(root, "panoptic")[0]["segments_info"]}
    write_image(root, drawn(), name="ulm_000000_000019")
    os.utime(truth_file(root, name="ulm_000000_000019"), ns=(0, 0))
    assert write_panoptic(root, "val", progress=False) is True and len(load(root, "panoptic")) == 3


def test_panoptic_errors_say_what_to_do(root):
    command = f"python tools/prepare_cityscapes.py --folder {root} --splits val"
    with pytest.raises(DataError, match=f"cityscapes_panoptic_val.json do not exist.*{command}"):
        load(root, "panoptic")
    write_panoptic(root, "val", progress=False)
    file = root / "gtFine/cityscapes_panoptic_val.json"
    whole = json.loads(file.read_text())
    file.write_text(file.read_text()[:-40])
    with pytest.raises(DataError, match=f"no panoptic JSON.*{command} --force"):
        load(root, "panoptic")
    file.write_text(json.dumps({**whole, "annotations": whole["annotations"][:1]}))
    with pytest.raises(DataError, match=f"no entry for image {SECOND}.*{command}"):
        load(root, "panoptic")
    whole["annotations"][0]["segments_info"][0]["category_id"] = 29
    file.write_text(json.dumps(whole))
    with pytest.raises(DataError, match="segment 7 is of the label id 29"):
        load(root, "panoptic")
    whole["annotations"][0]["segments_info"][0]["category_id"] = 7
    file.write_text(json.dumps(whole))
    (root / f"gtFine/cityscapes_panoptic_val/{SECOND}_gtFine_panoptic.png").unlink()
    with pytest.raises(DataError, match=f"{SECOND}_gtFine_panoptic.png does not exist.*{command}"):
        load(root, "panoptic")


def test_panoptic_files_that_are_older_than_the_instances(root):
    write_panoptic(root, "val", progress=False)
    written = (root / "gtFine/cityscapes_panoptic_val.json").stat().st_mtime_ns
    os.utime(truth_file(root, name=SECOND), ns=(written + 1,) * 2)
    command = f"python tools/prepare_cityscapes.py --folder {root} --splits val"
    with pytest.raises(DataError, match=f"panoptic_val.json is older than {truth_file(root, name=SECOND)}.*{command}"):
        load(root, "panoptic")
    assert len(load(root)) == 2
    write_panoptic(root, "val", progress=False)
    assert len(load(root, "panoptic")) == 2


def test_tool(root, run_script, capsys):
    arguments = ["--folder", str(root), "--splits", "val"]
    done = run_script("tools/prepare_cityscapes.py", *arguments)
    assert done.returncode == 0 and "cityscapes_panoptic_val.json: written" in done.stdout, done.stderr
    main = runpy.run_path(str(REPO / "tools/prepare_cityscapes.py"))["main"]
    assert main([*arguments, "--workers", "1"]) == 0 and "is complete" in capsys.readouterr().out
    truth_file(root).write_bytes(truth_file(root).read_bytes()[:80])
    assert main([*arguments, "--force"]) == 2 and f"error: {truth_file(root)}" in capsys.readouterr().err
    assert sorted(os.listdir(root / "gtFine")) == ["cityscapes_panoptic_val", "cityscapes_panoptic_val.json", "val"]


# ---- what can be wrong ----


def test_missing_folders_are_named(tmp_path, root):
    for split, folder in (("train", "leftImg8bit/train"), ("test", "leftImg8bit/test")):
        with pytest.raises(DataError, match=rf"{split} split.*{root}, but the folder {folder} is missing.*docs/datasets.md"):
            load(root, split=split)
    (root / "leftImg8bit/train/aachen").mkdir(parents=True)
    (root / "gtFine/train").mkdir()
    with pytest.raises(DataError, match=f"{root}/leftImg8bit/train has no images"):
        load(root, split="train")
    register_cityscapes(tmp_path / "shapes/cityscapes", "nowhere", ("val",), "Generate it with: python tools/prepare_shapes.py")
    with pytest.raises(DataError, match="Generate it with: python tools/prepare_shapes.py"):
        DatasetCatalog.get("nowhere_instance_val")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["instanceIds", "labelIds"])
def test_image_without_its_annotation(root, kind, task):
    truth_file(root, kind).unlink()
    with pytest.raises(DataError, match=f"1 annotations of the val split are missing.*{FIRST}_gtFine_{kind}.png"):
        load(root, task)


@pytest.mark.parametrize("value", [99001, 40, 34000, 7001, 1000, 999])
def test_unknown_ids(root, value):
    ids = drawn()
    ids[0, 0] = value
    Image.fromarray(ids).save(truth_file(root), "TIFF")
    with pytest.raises(DataError, match=rf"{FIRST}_gtFine_instanceIds.png has ids of no known class: {value}\."):
        load(root)
    with pytest.raises(DataError, match=rf"{FIRST}_gtFine_instanceIds.png has ids of no known class: {value}\."):
        write_panoptic(root, "val", progress=False)


def test_unknown_label_id(root):
    Image.fromarray(np.full(SIZE, 34, np.uint8)).save(truth_file(root, "labelIds"))
    with pytest.raises(DataError, match=rf"{FIRST}_gtFine_labelIds.png has ids of no known class: 34\."):
        load(root, "semantic")


@pytest.mark.parametrize("kind", ["instanceIds", "labelIds", "leftImg8bit"])
def test_damaged_files_are_named(root, kind):
    path = root / f"leftImg8bit/val/aachen/{FIRST}_leftImg8bit.png" if kind == "leftImg8bit" else truth_file(root, kind)
    path.write_bytes(path.read_bytes()[: 20 if kind == "leftImg8bit" else 60])  # of the image only the header is looked at
    with pytest.raises(DataError, match=f"{path} cannot be read"):
        load(root)


@pytest.mark.parametrize("kind", ["instanceIds", "labelIds"])
def test_maps_of_another_size(root, kind):
    Image.fromarray(np.full((24, 33), 7, np.uint8)).save(truth_file(root, kind))
    with pytest.raises(DataError, match=f"{FIRST}_gtFine_{kind}.png is 33x24 pixels, but its image is 32x24"):
        load(root)


def test_map_of_colours(root):
    Image.fromarray(np.random.RandomState(0).randint(0, 9, (*SIZE, 3), dtype=np.uint8)).save(truth_file(root))
    with pytest.raises(DataError, match=f"{FIRST}_gtFine_instanceIds.png: expected one channel"):
        load(root)


def test_several_damaged_files_are_reported_together(root):
    for name in (FIRST, SECOND):
        truth_file(root, name=name).write_bytes(b"no picture")
    with pytest.raises(DataError, match=f"(?s)2 of 2 files.*{FIRST}_gtFine.*{SECOND}_gtFine"):
        load(root)


# ---- the cache ----


def test_cache_is_used_and_is_plain_json(root, monkeypatch):
    expected = load(root)
    content = json.loads((root / ".cache/val.json").read_text())
    assert len(content["values"]) == 2 and len(content["key"]["files"]) == 6
    monkeypatch.setattr(cityscapes_files, "scan_image", None)  # would fail if it were called
    assert load(root) == expected
    moved = root.with_name("moved")
    root.rename(moved)
    assert [r["annotations"] for r in load(moved)] == [r["annotations"] for r in expected]


@pytest.mark.parametrize("change", ["time", "size", "new image", "format"])
def test_cache_goes_with_its_files(root, change, monkeypatch):
    path = truth_file(root)
    path.write_bytes(path.read_bytes().ljust(1000, b"\0"))
    load(root)
    before = path.stat()
    if change == "time":
        Image.fromarray(np.where(drawn() == 26000, 27000, drawn()).astype(np.uint16)).save(path)
        path.write_bytes(path.read_bytes().ljust(1000, b"\0"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert path.stat().st_size == before.st_size
    elif change == "size":
        Image.fromarray(np.full(SIZE, 27000, np.uint16)).save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size != before.st_size
    elif change == "new image":
        write_image(root, np.full(SIZE, 27000), name="ulm_000000_000019")
    else:
        monkeypatch.setattr(cityscapes_files, "FORMAT", 0)
        monkeypatch.setattr(cityscapes_files, "scan_image", lambda files: {"width": 1, "height": 1, "objects": []})
        assert {record["width"] for record in load(root)} == {1}
        return
    assert 3 in {a["category_id"] for record in load(root) for a in record["annotations"]}


def test_records_of_two_loads_share_nothing(root, monkeypatch):
    (root / ".cache").write_text("")  # so that what was read is kept in memory
    first = load(root)[0]["annotations"]
    expected = json.dumps(first)
    for annotation in first:
        annotation["bbox"][0] = annotation["segmentation"]["counts"] = None
    assert json.dumps(load(root)[0]["annotations"]) == expected


# ---- validate_dataset ----


def test_validation_knows_the_data_sets(root):
    register_cityscapes(root, "drawn", ("val",))
    write_panoptic(root, "val", progress=False)
    for task in TASKS:
        report = validate_dataset(f"drawn_{task}_val", read_images=True)
        assert (report.images, report.problems) == (2, 0), report.table()
        assert report.annotations == {"instance": 5, "instance10": 7, "semantic": 0, "panoptic": 5}[task]
    (root / f"leftImg8bit/val/aachen/{FIRST}_leftImg8bit.png").write_bytes(
        (root / f"leftImg8bit/val/aachen/{FIRST}_leftImg8bit.png").read_bytes()[:200]
    )
    report = validate_dataset("drawn_instance_val", read_images=True)
    assert report.findings["unreadable-image"][0].startswith(f"image {FIRST}: ")
    shutil.copy(
        root / f"gtFine/cityscapes_panoptic_val/{FIRST}_gtFine_panoptic.png",
        root / f"gtFine/cityscapes_panoptic_val/{SECOND}_gtFine_panoptic.png",
    )
    report = validate_dataset("drawn_panoptic_val", read_images=True)
    assert [text.split(":")[0] for text in report.findings["unknown-map-id"]] == [f"image {SECOND}"]
