"""tools/split_dataset.py: the 90 : 10 split with one image of every phone model for validation."""

import json
import runpy
from pathlib import Path

import pytest

from projects.errors import ConfigError, DataError

SCRIPT = Path(__file__).resolve().parents[2] / "tools/split_dataset.py"
tool = runpy.run_path(str(SCRIPT))
choose_validation = tool["choose_validation"]
NAMES = [f"{model}_{i}.png" for model, count in (("iPhone_4", 1), ("S8", 30), ("Pixel", 69)) for i in range(count)]


def test_every_model_is_in_validation():
    chosen = choose_validation(NAMES, 0.1, seed=0, group=r"(.*)_\d+")
    assert len(chosen) == 10 and {name.rsplit("_", 1)[0] for name in chosen} == {"iPhone_4", "S8", "Pixel"}
    assert chosen == choose_validation(NAMES[::-1], 0.1, seed=0, group=r"(.*)_\d+")
    assert chosen != choose_validation(NAMES, 0.1, seed=1, group=r"(.*)_\d+")
    assert len(choose_validation(NAMES, 0.25, seed=0)) == 25


def test_many_small_groups_come_before_the_part():
    names = [f"m{i % 7}_{i}.png" for i in range(14)]
    chosen = choose_validation(names, 0.1, seed=0, group="m(.)")
    assert sorted(name[:2] for name in chosen) == [f"m{i}" for i in range(7)]
    with pytest.raises(DataError, match="all would be for validation"):
        choose_validation(names, 0.1, seed=0, group="(.*)")


def test_bad_arguments():
    with pytest.raises(ConfigError, match="--val is 10"):
        choose_validation(NAMES, 10, seed=0)
    with pytest.raises(ConfigError, match="not a regular expression"):
        choose_validation(NAMES, 0.1, seed=0, group="(")


def test_the_phone_folder(tmp_path):
    photos, root = tmp_path / "photos", tmp_path / "phone"
    photos.mkdir()
    for name in NAMES:
        (photos / name).write_text(name)
    content = {
        "images": [{"id": i, "file_name": name, "width": 4, "height": 3} for i, name in enumerate(NAMES)],
        "annotations": [{"id": i, "image_id": i // 2, "category_id": 1} for i in range(2 * len(NAMES))],
        "categories": [{"id": 1, "name": "battery"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))

    def run(*more) -> int:
        arguments = [tmp_path / "all.json", "--root", root, "--group", r"(.*)_\d+", *more]
        return tool["main"](tool["parse_args"](list(map(str, arguments))))

    for seed in (1, 0):  # the second split takes the place of the first
        assert run("--images", photos, "--seed", seed) == 0
    found = {part: json.loads((root / f"annotations/instances_phone_{part}.json").read_text()) for part in ("train", "val")}
    assert [len(part["images"]) for part in found.values()] == [90, 10]
    for name, part in found.items():
        names = {image["file_name"] for image in part["images"]}
        assert names == {path.name for path in (root / "images" / name).iterdir()}
        assert all((root / "images" / name / file).read_text() == file for file in names)
        ids = {image["id"] for image in part["images"]}
        assert len(part["annotations"]) == 2 * len(ids) and {a["image_id"] for a in part["annotations"]} == ids
        assert part["categories"] == content["categories"]
    with pytest.raises(DataError, match="100 images are not in"):
        run("--images", tmp_path)


@pytest.fixture
def phone(tmp_path):
    """``phone(names, root, images)`` runs the tool on photos/<name>, which are made before; relative to the test's folder."""

    def run(names: list[str], root: str, images: str, annotations: str = "all.json") -> int:
        (tmp_path / annotations).parent.mkdir(parents=True, exist_ok=True)
        content = {"images": [{"id": i, "file_name": name} for i, name in enumerate(names)], "annotations": []}
        (tmp_path / annotations).write_text(json.dumps(content))
        arguments = [tmp_path / annotations, "--root", tmp_path / root, "--images", tmp_path / images]
        return tool["main"](tool["parse_args"](list(map(str, arguments))))

    return run


def photos(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("below", ["", "new"])
def test_originals_in_the_folders_of_the_parts_survive(phone, tmp_path, part, below):
    names, folder = [f"{i}.png" for i in range(10)], tmp_path / "phone/images" / part / below
    photos(folder, names)
    with pytest.raises(DataError, match="is an original where the split writes"):
        phone(names, "phone", f"phone/images/{part}/{below}")
    if not below:  # the same folder by another name
        (tmp_path / "link").symlink_to(folder)
        with pytest.raises(DataError, match="is an original where the split writes"):
            phone(names, "phone", "link")
        with pytest.raises(DataError, match="is an original where the split writes"):
            phone([f"{part}/{name}" for name in names], "phone", "phone/images")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: name for name in names}


@pytest.mark.parametrize("name", ["../secret.png", "{}/photos/0.png", "a/../../secret.png"])
def test_names_that_lead_elsewhere_are_refused(phone, tmp_path, name):
    names = [f"{i}.png" for i in range(10)]
    photos(tmp_path / "photos", names)
    (tmp_path / "secret.png").write_text("secret")
    with pytest.raises(DataError, match="expected names below --images"):
        phone([*names, name.format(tmp_path)], "phone", "photos")
    assert (tmp_path / "secret.png").read_text() == "secret" and not (tmp_path / "phone").exists()
    assert len(list((tmp_path / "photos").iterdir())) == 10


def test_annotations_of_all_images_are_not_replaced_by_a_part(phone, tmp_path):
    names, place = [f"{i}.png" for i in range(10)], "phone/annotations/instances_phone_train.json"
    photos(tmp_path / "photos", names)
    with pytest.raises(DataError, match="instances_phone_train.json' is an original"):
        phone(names, "phone", "photos", place)
    assert len(json.loads((tmp_path / place).read_text())["images"]) == 10


def test_an_image_that_is_in_its_place_stays(tmp_path):
    source, link = tmp_path / "a.png", tmp_path / "b.png"
    source.write_text("a")
    link.hardlink_to(source)
    for target in (source, link):
        tool["place"](source, target)
    (tmp_path / "c.png").write_text("older")
    tool["place"](source, tmp_path / "c.png")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.png": "a", "b.png": "a", "c.png": "a"}
