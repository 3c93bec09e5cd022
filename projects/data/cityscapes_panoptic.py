"""Cityscapes' panoptic maps, written by `cityscapesscripts.preparation.createPanopticImgs`, and read again.

    gtFine/cityscapes_panoptic_{split}.json
    gtFine/cityscapes_panoptic_{split}/{city}_{seq}_{frame}_gtFine_panoptic.png     id = R + 256 G + 256^2 B

An id is a value of instanceIds.png. Classes that the benchmark ignores are 0 (void). The JSON's entries belong to an image
by their "image_id"; the file names under its "images" are not those of the images.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

from projects.errors import DataError

from .cityscapes_files import ImageFiles, is_known, list_split, read_map
from .cityscapes_labels import LABEL_OF_TRAIN_ID, THINGS
from .id_maps import image_size
from .reading import read_all

PREPARE_COMMAND = "python tools/prepare_cityscapes.py"


def places(root: str, split: str) -> dict[str, str]:
    """The metadata that says where the maps of a split lie."""
    folder = os.path.join(root, "gtFine", f"cityscapes_panoptic_{split}")
    return {"panoptic_root": folder, "panoptic_json": folder + ".json"}


def add_segments(records: list[dict], root: str, split: str) -> None:
    """Add "pan_seg_file_name" and "segments_info" (see :mod:`.cityscapes`) to the records of a split.

    Raises DataError: a JSON that is missing, damaged, or older than instance ids; an image without an entry or map; an
    unknown class.
    """
    where = places(root, split)
    remedy = f"Write it with: {PREPARE_COMMAND} --folder {root} --splits {split}"
    entries = _read_entries(where["panoptic_json"], remedy)
    written = os.stat(where["panoptic_json"]).st_mtime_ns
    for record in records:
        if _is_outdated(written, record["instance_ids_file_name"]):
            raise DataError(f"{where['panoptic_json']} is older than {record['instance_ids_file_name']}. {remedy}")
        entry = entries.get(record["image_id"])
        if entry is None:
            raise DataError(f"{where['panoptic_json']} has no entry for image {record['image_id']}. {remedy}")
        record["pan_seg_file_name"] = os.path.join(where["panoptic_root"], entry["file_name"])
        if not os.path.isfile(record["pan_seg_file_name"]):
            raise DataError(f"The panoptic map {record['pan_seg_file_name']} does not exist. {remedy}")
        record["segments_info"] = [_segment(segment, where["panoptic_json"]) for segment in entry["segments_info"]]


def _read_entries(path: str, remedy: str) -> dict[str, dict]:
    """image_id -> entry of the panoptic JSON."""
    try:
        return {entry["image_id"]: entry for entry in json.loads(Path(path).read_bytes())["annotations"]}
    except FileNotFoundError:
        raise DataError(f"The panoptic annotations {os.path.abspath(path)} do not exist. {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no panoptic JSON ({type(error).__name__}: {error}). {remedy} --force") from error


def _segment(segment: dict, path: str) -> dict:
    label = segment["category_id"]
    if label not in LABEL_OF_TRAIN_ID:
        raise DataError(f"{path}: segment {segment['id']} is of the label id {label}, which the benchmark does not evaluate.")
    classes = THINGS if label in THINGS else LABEL_OF_TRAIN_ID
    return {**segment, "category_id": classes.index(label), "isthing": label in THINGS}


def write_panoptic(
    root: str | os.PathLike,
    split: str,
    force: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> bool:
    """Write the panoptic maps and JSON of a split, the same bytes as `createPanopticImgs` does.

    Args:
        root: the folder that holds leftImg8bit/ and gtFine/.
        split: "train" or "val".
        force: write them even if they are complete and younger than the instance ids.
        workers, progress: as for :func:`.reading.read_all`.

    Returns:
        False where nothing had to be done.

    Raises:
        DataError: missing, damaged or unknown annotations; a place that cannot be written.
    """
    files = list_split(root, split)
    where = {key: Path(path) for key, path in places(os.fspath(root), split).items()}
    if not force and _is_complete(files, where):
        return False
    maps, index = where["panoptic_root"], where["panoptic_json"]
    try:
        with tempfile.TemporaryDirectory(prefix=f"{maps.name}.", dir=maps.parent) as partial:
            new_maps, new_index = Path(partial, "maps"), Path(partial, "index.json")
            new_maps.mkdir()
            jobs = [(f, Path(partial, f.name), split) for f in files]
            parts = read_all(_convert, jobs, f"Panoptic maps of {split}", workers, progress)
            for _, folder, _ in jobs:
                for path in (folder / "out" / maps.name).iterdir():
                    path.rename(new_maps / path.name)
            merged = {key: sum((part[key] for part in parts), []) for key in ("images", "annotations")}
            new_index.write_text(json.dumps({**parts[0], **merged}, sort_keys=True, indent=4))
            index.unlink(missing_ok=True)
            shutil.rmtree(maps, ignore_errors=True)
            new_maps.rename(maps)
            new_index.rename(index)  # last: with it the split is complete
    except OSError as error:
        raise DataError(f"Could not write the panoptic maps below {maps.parent}: {error}.") from error
    return True


def _is_complete(files: list[ImageFiles], where: dict[str, Path]) -> bool:
    """Whether all images have entries and maps, younger than their instance ids."""
    try:
        entries = _read_entries(str(where["panoptic_json"]), "")
        written = where["panoptic_json"].stat().st_mtime_ns
    except (DataError, OSError):
        return False
    return entries.keys() >= {f.name for f in files} and all(
        (where["panoptic_root"] / entries[f.name]["file_name"]).is_file() and not _is_outdated(written, f.instance_ids)
        for f in files
    )


def _is_outdated(written: int, instance_ids: str) -> bool:
    """Whether instance ids have changed since the panoptic JSON was written (time in ns)."""
    return os.stat(instance_ids).st_mtime_ns > written


def _convert(job: tuple[ImageFiles, Path, str]) -> dict:
    """Run `createPanopticImgs` on one image, in a folder of its own, and return the JSON that it writes."""
    files, folder, split = job
    read_map(files.instance_ids, *image_size(files.image), is_known)  # the script would stumble, or name no file
    source, out = Path(files.instance_ids).absolute(), folder / "out"
    link = folder / "in" / split / source.parent.name / source.name
    link.parent.mkdir(parents=True)
    link.symlink_to(source)
    out.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        convert2panoptic(str(folder / "in"), str(out), setNames=[split])
    return json.loads(next(out.glob("*.json")).read_text())
