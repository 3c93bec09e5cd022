"""The shapes data set: the same bytes always, and the same truth in all its formats."""

import hashlib
import importlib
import json
import runpy
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util

from projects.data import builtin, shapes, shapes_writers
from projects.data.shapes import generate_shapes, scene_of
from projects.data.shapes_outlines import OUTLINES, Placement
from projects.data.shapes_scene import UNLABELLED, Instance, Scene, draw_scene
from projects.data.shapes_writers import CITIES, CITYSCAPES_IDS, image_id, mask_to_polygons
from projects.errors import DataError

REPO = Path(__file__).resolve().parents[2]
THINGS, STUFF = 8, 3


@pytest.fixture(scope="module")
def folder(shapes_root):
    return shapes_root / "shapes"


@pytest.fixture
def registered(shapes_root):
    """The catalogs point at the small set again after a test that moved them."""
    builtin.register_shapes(shapes_root)
    yield shapes_root
    builtin.register_shapes(shapes_root)


def read(path):
    return np.asarray(Image.open(path))


def annotations_of(folder, split, kind="instances"):
    return json.loads((folder / f"coco/annotations/{kind}_{split}.json").read_text())


def decode(annotation, shape):
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, *shape))
    return mask_util.decode(segmentation).astype(bool)


def holes(mask):
    """Number of holes in a mask: background regions that do not reach the border."""
    _, labels = cv2.connectedComponents(np.pad(~mask, 1, constant_values=True).astype(np.uint8), connectivity=4)
    return labels.max() - 1


# ---- one scene ----


def test_a_scene_depends_on_its_seed_alone():
    first, again, other = draw_scene(5), draw_scene(5), draw_scene(6)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.owner, again.owner)
    assert np.array_equal(first.semantic, again.semantic) and first.instances == again.instances
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("size", [(160, 128), (256, 192), (64, 64)])
def test_scene_fields(size):
    for seed in range(4):
        scene = draw_scene(seed, size, group=True, clutter=True)
        assert scene.image.shape == (size[1], size[0], 3) and scene.image.dtype == np.uint8
        assert scene.owner.shape == scene.semantic.shape == (size[1], size[0])
        assert scene.owner.max() == len(scene.instances) <= 11
        for k, instance in enumerate(scene.instances):
            mask = scene.owner == k + 1
            assert mask.sum() >= 40
            assert (scene.semantic[mask] == instance.category).all()
        background = scene.semantic[scene.owner == 0]
        assert set(np.unique(background)) <= {8, 9, 10, UNLABELLED}


def test_scene_without_objects():
    scene = draw_scene(3, objects=False, group=True)
    assert scene.instances == () and scene.owner.max() == 0


def test_coverage_of_a_square_is_its_area_pixel_by_pixel():
    corners = np.array([[0.5, 1.0], [2.5, 1.0], [2.5, 3.0], [0.5, 3.0]])
    coverage = Placement([corners], (1.0, 0.0), np.eye(2), 1.0).coverage((5, 4))
    expected = np.zeros((4, 5))
    expected[1:3, 1:4] = [0.5, 1, 0.5]
    assert np.abs(coverage - expected).max() < 0.3  # the outline itself is drawn, an eighth of a pixel wide
    assert coverage[:, 0].max() == 0 and coverage[1, 2] == 1


@pytest.mark.parametrize("name", ["ring", "frame"])
def test_outlines_with_holes(name):
    outline = OUTLINES[name](np.random.default_rng(0))
    coverage = Placement(outline, (30.0, 30.0), 20 * np.eye(2), 20.0).coverage((60, 60))
    assert coverage[30, 30] == 0 and holes(coverage >= 0.5) == 1


# ---- the formats agree ----


@pytest.mark.parametrize("split", ["train", "val"])
def test_formats_agree_pixel_by_pixel(folder, split):
    instances, panoptic = annotations_of(folder, split), annotations_of(folder, split, "panoptic")
    by_image = {image["id"]: [] for image in instances["images"]}
    for annotation in instances["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    isthing = {c["id"]: c["isthing"] for c in panoptic["categories"]}
    for index, (image, pan) in enumerate(zip(instances["images"], panoptic["annotations"], strict=True)):
        scene = scene_of(split, index)
        number, shape = image["id"], (image["height"], image["width"])
        assert number == pan["image_id"] == image_id(split, index)

        city = CITIES[split][index % len(CITIES[split])]
        stem = f"{split}/{city}/{city}_{index:06}_000019"
        picture = read(folder / f"coco/{split}/{image['file_name']}")
        assert np.array_equal(picture, read(folder / f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png"))
        assert np.abs(picture.astype(int) - scene.image).mean() < 6  # JPEG

        semantic = read(folder / f"coco/stuffthingmaps/{split}/{number:012}.png")
        assert np.array_equal(semantic, scene.semantic)
        rgb = read(folder / f"coco/panoptic_{split}/{pan['file_name']}").astype(int)
        segments = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        label_ids = read(folder / f"cityscapes/gtFine/{stem}_gtFine_labelIds.png")
        instance_ids = read(folder / f"cityscapes/gtFine/{stem}_gtFine_instanceIds.png").astype(int)
        assert segments.shape == label_ids.shape == instance_ids.shape == shape

        to_cityscapes = np.zeros(256, int)
        to_cityscapes[: len(CITYSCAPES_IDS)] = CITYSCAPES_IDS
        assert np.array_equal(label_ids, to_cityscapes[semantic])
        assert np.array_equal(np.where(instance_ids < 1000, instance_ids, instance_ids // 1000), label_ids)

        things = {s["id"]: s for s in pan["segments_info"] if isthing[s["category_id"]]}
        assert set(np.unique(segments)) - {0} == {s["id"] for s in pan["segments_info"]}
        assert np.array_equal(segments == 0, semantic == UNLABELLED)
        for segment in pan["segments_info"]:
            mask = segments == segment["id"]
            assert (semantic[mask] == segment["category_id"] - 1).all()
            assert mask.sum() == segment["area"] and tight_box(mask) == segment["bbox"]

        assert len(by_image[number]) == len(scene.instances) == len(things)
        for k, annotation in enumerate(by_image[number]):
            mask = decode(annotation, shape)
            assert np.array_equal(mask, scene.owner == k + 1)
            assert annotation["area"] == mask.sum() and annotation["bbox"] == tight_box(mask)
            assert (semantic[mask] == annotation["category_id"] - 1).all()
            (segment,) = np.unique(segments[mask])
            assert np.array_equal(mask, segments == segment)
            assert things[segment]["iscrowd"] == annotation["iscrowd"] == scene.instances[k].is_group
            (value,) = np.unique(instance_ids[mask])
            assert np.array_equal(mask, instance_ids == value)
            assert (value < 1000) == bool(annotation["iscrowd"])
        assert len(np.unique(instance_ids[instance_ids >= 1000])) == sum(not i.is_group for i in scene.instances)


def tight_box(mask):
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]


def test_everything_occurs(folder):
    """All classes, groups, unlabelled pixels, empty pictures, holes, instances in two parts, polygons and RLEs."""
    found_holes = parts = 0
    for split in ("train", "val"):
        annotations = annotations_of(folder, split)["annotations"]
        assert {a["category_id"] for a in annotations} == set(range(1, THINGS + 1))
        assert {type(a["segmentation"]) for a in annotations} == {list, dict}
        assert any(a["iscrowd"] for a in annotations)
        for annotation in annotations:
            mask = decode(annotation, (128, 160))
            if not annotation["iscrowd"]:
                found_holes += holes(mask) > 0
                parts += cv2.connectedComponents(mask.astype(np.uint8))[0] > 2
        maps = [read(p) for p in (folder / f"coco/stuffthingmaps/{split}").iterdir()]
        assert set(np.unique(maps)) == {*range(THINGS + STUFF), UNLABELLED}
    assert found_holes >= 10 and parts >= 3
    val = annotations_of(folder, "val")
    assert len({a["image_id"] for a in val["annotations"]}) == len(val["images"]) - 1


def test_holes_survive_writing(tmp_path):
    owner = np.zeros((64, 64), np.int32)
    cv2.circle(owner, (30, 30), 20, 1, 7)
    owner[28:33] = np.where(owner[28:33] == 1, 2, 0)  # cut in two by a second instance of the same class
    semantic = np.where(owner > 0, 6, 9).astype(np.uint8)
    ring = owner == 1
    scene = Scene(np.zeros((64, 64, 3), np.uint8), owner, semantic, (Instance(6, False), Instance(6, False)))
    entry = shapes_writers.write_scene(tmp_path, "train", 0, scene)
    assert np.array_equal(decode(entry["annotations"][0], (64, 64)), ring)

    owner[owner == 2] = 1
    whole = Scene(scene.image, owner, semantic, (Instance(6, False),))
    (annotation,) = shapes_writers.write_scene(tmp_path, "train", 0, whole)["annotations"]
    assert isinstance(annotation["segmentation"], dict)
    assert holes(decode(annotation, (64, 64))) == 1 == holes(owner == 1)


def test_mask_to_polygons_by_hand():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1] = True  # an L of three pixels: (1, 1), (1, 2), (2, 2)
    mask[2, 2] = True
    (polygon,) = mask_to_polygons(mask)
    corners = {(polygon[i], polygon[i + 1]) for i in range(0, len(polygon), 2)}
    assert corners == {(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (1, 3)} and len(polygon) == 12


def test_mask_to_polygons_is_exact_without_holes_and_corner_contacts():
    rng = np.random.default_rng(0)
    for _ in range(50):
        grid = cv2.resize(rng.standard_normal((6, 7), np.float32), (42, 36), interpolation=cv2.INTER_CUBIC)
        mask = grid > 0.3
        polygons = mask_to_polygons(mask)
        filled = mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, *mask.shape))).astype(bool)
        assert (filled & mask).sum() == mask.sum() or holes(~mask) > 0
        if holes(mask) == 0:
            assert np.array_equal(filled, mask)


# ---- the files ----


def test_same_bytes_for_any_number_of_workers(tmp_path):
    sets = [generate_shapes(tmp_path / str(n), 9, 8, (64, 72), seed=3, workers=n, progress=False) for n in (1, 2)]
    manifests = [(folder / "manifest.json").read_bytes() for folder in sets]
    assert manifests[0] == manifests[1]
    files = {p.relative_to(sets[0]) for p in sets[0].rglob("*") if p.is_file()}
    assert len(files) == 17 * 6 + 4 + 1
    for path in files:
        assert len({(folder / path).read_bytes() for folder in sets}) == 1, path


def test_seed_and_size_change_the_pictures(tmp_path):
    a, b = (generate_shapes(tmp_path / str(s), 1, 1, (64, 64), seed=s, progress=False) for s in (0, 1))
    name = "coco/train/000000000001.jpg"
    assert read(a / name).shape == (64, 64, 3)
    assert (a / name).read_bytes() != (b / name).read_bytes()


def test_a_larger_set_begins_with_the_smaller_one(tmp_path, folder):
    small = generate_shapes(tmp_path, 2, 1, progress=False)
    for path in (p.relative_to(small) for p in small.rglob("*.png")):
        assert (small / path).read_bytes() == (folder / path).read_bytes()


def test_manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["parameters"] == {"train": 24, "val": 12, "size": [160, 128], "seed": 0}
    assert manifest["version"] == shapes.GENERATOR_VERSION
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    made_from_them = ("cityscapes/.cache/", "cityscapes/gtFine/cityscapes_panoptic_")  # what loading and preparing leave
    assert {name for name in files if not name.startswith(made_from_them)} == set(manifest["files"])
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    for split in ("train", "val"):
        annotations, numbers = annotations_of(folder, split), manifest["numbers"][split]
        crowd = sum(a["iscrowd"] for a in annotations["annotations"])
        assert numbers["images"] == len(annotations["images"]) and numbers["groups"] == crowd
        assert sum(numbers["instances"].values()) == len(annotations["annotations"]) - crowd


@pytest.fixture
def tiny(tmp_path):
    return generate_shapes(tmp_path, 2, 1, (64, 64), progress=False)


def test_a_complete_set_is_left_alone(tiny):
    before = {p: p.stat().st_mtime_ns for p in tiny.rglob("*")}
    assert generate_shapes(tiny.parent, 2, 1, (64, 64), progress=False) == tiny
    assert {p: p.stat().st_mtime_ns for p in tiny.rglob("*")} == before


def test_another_set_is_an_error_unless_forced(tiny):
    with pytest.raises(DataError) as refused:
        generate_shapes(tiny.parent, 3, 1, (64, 80), seed=7, progress=False)
    for part in (
        "holds 2 training and 1 validation pictures of 64 x 64 pixels (seed 0,",
        "wanted were 3 training and 1 validation pictures of 64 x 80 pixels (seed 7,",
        "To keep it, ask for it: --train 2 --val 1 --size 64 64 --seed 0.",
        f"prepare_shapes.py --root {tiny.parent} --train 3 --val 1 --size 64 80 --seed 7 --force",
    ):
        assert part in str(refused.value)
    assert "{" not in str(refused.value)
    generate_shapes(tiny.parent, 2, 1, (64, 64), seed=7, force=True, progress=False)
    assert json.loads((tiny / "manifest.json").read_text())["parameters"]["seed"] == 7
    assert not (tiny.parent / "shapes.partial").exists()


@pytest.mark.parametrize("harm", ["missing", "changed", "no manifest", "broken manifest"])
def test_a_damaged_set_is_an_error_unless_forced(tiny, harm):
    picture = tiny / "coco/train/000000000001.jpg"
    whole = picture.read_bytes()
    if harm == "missing":
        picture.unlink()
    elif harm == "changed":
        picture.write_bytes(whole[:-1])
    elif harm == "no manifest":
        (tiny / "manifest.json").unlink()
    else:
        (tiny / "manifest.json").write_text("[1")
    with pytest.raises(DataError, match="--force"):
        generate_shapes(tiny.parent, 2, 1, (64, 64), progress=False)
    generate_shapes(tiny.parent, 2, 1, (64, 64), force=True, progress=False)
    assert picture.read_bytes() == whole


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/thesis.tex").write_text("x")
    for force in (False, True):
        with pytest.raises(DataError):
            generate_shapes(tmp_path, 1, 1, force=force, progress=False)
    assert (tmp_path / "shapes/thesis.tex").read_text() == "x"


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return shapes_writers.write_scene(*args)

    monkeypatch.setattr(shapes, "write_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_shapes(tmp_path, 4, 1, (64, 64), workers=1, progress=False)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_what_a_killed_run_left_does_not_disturb(tmp_path):
    (tmp_path / "shapes.partial/coco/train").mkdir(parents=True)
    (tmp_path / "shapes.partial/coco/train/000000999999.jpg").write_text("half")
    folder = generate_shapes(tmp_path, 1, 1, (64, 64), progress=False)
    assert [p.name for p in (folder / "coco/train").iterdir()] == ["000000000001.jpg"]
    assert not (tmp_path / "shapes.partial").exists()


@pytest.mark.parametrize(
    "arguments",
    [{"train": 0}, {"val": 0}, {"size": (160, 32)}, {"size": (160,)}, {"seed": -1}, {"workers": 0}],
)
def test_wrong_arguments(tmp_path, arguments):
    with pytest.raises(DataError):
        generate_shapes(tmp_path, **{"train": 1, "val": 1, **arguments}, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Could not write"):
        generate_shapes(tmp_path / "file", 1, 1, progress=False)


def test_command_line(tmp_path, run_script, capsys):
    arguments = ("--root", tmp_path, "--train", 2, "--val", 1, "--size", 64, 64)
    done = run_script("tools/prepare_shapes.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "train: 2 images" in done.stdout and (tmp_path / "shapes/manifest.json").is_file()
    main = runpy.run_path(str(REPO / "tools/prepare_shapes.py"))["main"]
    assert main([*map(str, arguments), "--seed", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and "--force" in printed.err


# ---- in Detectron2's catalogs and in cityscapesscripts ----


def test_registered_records(registered):
    importlib.reload(builtin)  # as a second import would
    for split, images in (("train", 24), ("val", 12)):
        plain = DatasetCatalog.get(f"shapes_{split}")
        assert len(plain) == images
        stuff, panoptic = (
            DatasetCatalog.get(f"shapes_{split}_stuff"),
            DatasetCatalog.get(f"shapes_{split}_panoptic"),
        )
        for a, b, c in zip(plain, stuff, panoptic, strict=True):
            assert a["annotations"] == b["annotations"] == c["annotations"]
            assert read(a["file_name"]).shape[:2] == (a["height"], a["width"])
            assert b["sem_seg_file_name"] == c["sem_seg_file_name"]
            semantic, rgb = read(c["sem_seg_file_name"]), read(c["pan_seg_file_name"]).astype(int)
            for segment in c["segments_info"]:
                mask = rgb @ np.array([1, 256, 65536]) == segment["id"]
                assert mask.sum() == segment["area"]
                assert (semantic[mask] == segment["category_id"]).all()
                assert segment["isthing"] == (segment["category_id"] < THINGS)


@pytest.mark.parametrize("variant", ["", "_stuff", "_panoptic"])
def test_metadata(registered, variant):
    metadata = MetadataCatalog.get(f"shapes_val{variant}")
    assert metadata.thing_classes == list(OUTLINES) and len(metadata.thing_colors) == THINGS
    assert metadata.stuff_classes == [*OUTLINES, "sky", "wall", "ground"] and len(metadata.stuff_colors) == 11
    assert metadata.thing_dataset_id_to_contiguous_id == {i + 1: i for i in range(THINGS)}
    assert metadata.stuff_dataset_id_to_contiguous_id == {i + 1: i for i in range(THINGS + STUFF)}
    assert metadata.evaluator_type == ("coco_panoptic_seg" if variant == "_panoptic" else "coco")


def test_detectron2_maps_and_draws_every_record(registered):
    """Its mapper takes polygons and RLE, groups and empty pictures; its visualizer takes the metadata."""
    from detectron2.data import DatasetMapper
    from detectron2.utils.visualizer import Visualizer

    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="RGB", use_instance_mask=True,
                           instance_mask_format="bitmask")  # fmt: skip
    for record in DatasetCatalog.get("shapes_val_panoptic"):
        mapped = mapper(record)
        areas = [decode(a, (128, 160)).sum() for a in record["annotations"] if not a["iscrowd"]]
        masks = mapped["instances"].gt_masks.tensor if areas else np.zeros((0, 1, 1))
        assert [int(m.sum()) for m in masks] == areas
        assert mapped["sem_seg"].shape == (128, 160)
    record = DatasetCatalog.get("shapes_val_stuff")[3]
    visualizer = Visualizer(read(record["file_name"]), MetadataCatalog.get("shapes_val_stuff"))
    drawn = visualizer.draw_dataset_dict(record)
    assert drawn.get_image().shape == (128, 160, 3)


def test_missing_folder_names_the_folder_and_the_command(registered, tmp_path):
    builtin.register_shapes(tmp_path)
    with pytest.raises(DataError, match=rf"{tmp_path}/shapes.*python tools/prepare_shapes.py --root {tmp_path}"):
        DatasetCatalog.get("shapes_train")
    shutil.copytree(registered / "shapes/coco", tmp_path / "shapes/coco")
    shutil.rmtree(tmp_path / "shapes/coco/panoptic_val")
    assert len(DatasetCatalog.get("shapes_val_stuff")) == 12
    builtin.register_shapes(tmp_path)
    with pytest.raises(DataError, match=rf"python tools/prepare_shapes.py --root {tmp_path} --force, which replaces"):
        DatasetCatalog.get("shapes_val_panoptic")
    with pytest.raises(DataError, match="coco/panoptic_val is missing"):
        DatasetCatalog.get("shapes_val_panoptic")


def test_cityscapesscripts_evaluates_the_truth_as_perfect(folder, tmp_path, monkeypatch, capsys):
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as evaluation

    root = folder / "cityscapes/gtFine/val"
    truths = sorted(str(p) for p in root.glob("*/*_gtFine_instanceIds.png"))
    predictions = []
    for path in truths:
        ids, name = read(path), path.split("/")[-1].replace("_gtFine_instanceIds.png", "")
        lines = []
        for value in np.unique(ids[ids >= 1000]):
            Image.fromarray((ids == value).astype(np.uint8) * 255).save(tmp_path / f"{name}_{value}.png")
            lines.append(f"{name}_{value}.png {value // 1000} 1.0\n")
        (tmp_path / f"{name}.txt").write_text("".join(lines))
        predictions.append(str(tmp_path / f"{name}.txt"))
    args = evaluation.args
    args.predictionPath, args.quiet, args.JSONOutput = str(tmp_path), True, False
    args.gtInstancesFile = str(tmp_path / "gtInstances.json")
    monkeypatch.chdir(tmp_path)  # it leaves a file where it runs
    evaluation.setInstanceLabels(args)
    averages = evaluation.evaluateImgLists(predictions, truths, args)["averages"]
    assert averages["allAp"] == pytest.approx(1.0)
    assert all(c["ap"] == pytest.approx(1.0) for c in averages["classes"].values())


def test_cityscapesscripts_makes_the_same_panoptic_segments(folder, tmp_path, capsys):
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

    (tmp_path / "out").mkdir()
    convert2panoptic(str(folder / "cityscapes/gtFine"), str(tmp_path / "out"), False, ["val"])
    made = json.loads((tmp_path / "out/cityscapes_panoptic_val.json").read_text())["annotations"]
    ours = annotations_of(folder, "val", "panoptic")["annotations"]
    keys = ("area", "bbox", "iscrowd")
    for a, b in zip(made, ours, strict=True):
        theirs = sorted((s["category_id"], *(s[k] for k in keys)) for s in a["segments_info"])
        mapped = sorted((CITYSCAPES_IDS[s["category_id"] - 1], *(s[k] for k in keys)) for s in b["segments_info"])
        assert theirs == mapped
