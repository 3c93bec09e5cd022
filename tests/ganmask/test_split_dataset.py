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
