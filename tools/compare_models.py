#!/usr/bin/env python
"""Pictures of two models side by side: image, ground truth, model A, model B.

    python tools/compare_models.py --a output/dsg/config.yaml output/dsg/model_final.pth \\
        --b output/baseline/config.yaml output/baseline/model_final.pth --count 12 --output comparison
    python tools/compare_models.py --dataset coco_2017_val --a results_a.json --b results_b.json --output comparison

A model is a config and its weights, or a file in COCO's results format, and both are shown on one data set (default: the first
of DATASETS.TEST of the first config). The pictures are of --images, or of the --count images where the two differ most.

The difference of two models in an image: their objects of the same class are paired, best IoU first (of the masks, or of boxes
where there are no masks), and the difference is 1 - 2 * (sum of the pairs' IoU) / (objects of A + objects of B): 0 where they
agree to the pixel, 1 where they have nothing in common. Objects are what is drawn: instances of at least --score-threshold,
segments of a panoptic output, the regions of the classes of a semantic one.

Leaves in --output a picture per image, numbered by its place, and differences.json with the difference in every image.
"""

import argparse
import heapq
import itertools
import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util
from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from projects import get_cfg, load_config
from projects.data.check import check_datasets
from projects.drawables import Drawable, from_instances
from projects.engine.launch import guarded
from projects.errors import ConfigError, DataError
from projects.evaluation.coco_files import load_results, write_json_atomically
from projects.evaluation.panoptic_files import segments_of_output
from projects.evaluation.pictures import drawable_truth, records_to_draw
from projects.predictor import BatchedPredictor
from projects.visualization import contact_sheet, draw, of_same_kind, titled


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for model in "ab":
        parser.add_argument(
            f"--{model}", nargs="+", required=True, metavar="FILE", help="CONFIG WEIGHTS, or RESULTS.json in COCO's format"
        )
    parser.add_argument(
        "--dataset", nargs="+", default=[], metavar="NAME", help="a registered data set, or NAME ANNOTATIONS.json IMAGE_FOLDER"
    )
    parser.add_argument("--names", nargs=2, help="titles of the two models (default: A and B, with the names of their files)")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="IMAGE", help="file names, with or without folder and suffix"
    )
    parser.add_argument("--count", type=int, default=12, help="without --images: how many pictures (default: 12)")
    parser.add_argument("--output", required=True, type=Path, help="folder for the pictures and differences.json")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="leave out what scores lower (default: 0.5)")
    parser.add_argument("--color-by", choices=("instance", "class"), default="instance")
    parser.add_argument("--columns", type=int, default=4, help="of a picture (default: 4; 2 suits wide images)")
    parser.add_argument("--batch-size", type=int, default=1, help="images per call of a model (default: 1)")
    parser.add_argument("--trust", action="store_true", help="load weights that may run code")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if not 0 <= args.score_threshold <= 1:
        raise ConfigError(f"--score-threshold is {args.score_threshold}; scores lie between 0 and 1.")
    if args.count < 1 or args.columns < 1:
        raise ConfigError(f"--count and --columns must be at least 1, not {args.count} and {args.columns}.")
    args.titles = args.names or titles_of(args.a, args.b)
    args.names = args.names or ["A", "B"]
    get_cfg()  # registers the data sets
    name = dataset_name(args)
    sources = [open_source(files, name, args) for files in (args.a, args.b)]
    records, metadata = records_to_draw(name), MetadataCatalog.get(name)
    if args.images:
        records = [find_record(records, image) for image in args.images]
    rows, shown = compare(records, [source(records, metadata) for source in sources], metadata, args)
    args.output.mkdir(parents=True, exist_ok=True)
    for place, (record, outputs) in enumerate(shown, start=1):
        picture = draw_row(record, outputs, metadata, args)
        cv2.imwrite(str(args.output / f"{place:03}_{Path(record['file_name']).stem}.png"), picture[:, :, ::-1])
    write_json_atomically(rows, args.output / "differences.json")
    print(tabulate(rows[: len(shown)], headers="keys", tablefmt="pipe", floatfmt=".3f"))
    if not any(row[f"objects of {name}"] for row in rows for name in args.names):
        print(
            f"Neither model has an object that scores {args.score_threshold} or more: a lower --score-threshold may show some."
        )
    print(f"{len(shown)} pictures of {len(rows)} images of {name} in {args.output.resolve()}")
    return 0


def titles_of(a: list[str], b: list[str]) -> list[str]:
    """ "A: " and "B: " with the names of the configs (of the weights, where both have the same config), short but different.

    A run's config.yaml goes by its folder.
    """
    which = -1 if Path(a[0]).resolve() == Path(b[0]).resolve() else 0
    parts = [Path(files[which]).resolve().with_suffix("").parts for files in (a, b)]
    parts = [names[:-1] if names[-1] == "config" else names for names in parts]
    different = (n for n in range(1, max(map(len, parts))) if parts[0][-n:] != parts[1][-n:])
    count = next(different, 1)
    return [f"{letter}: {'/'.join(names[-count:])}" for letter, names in zip("AB", parts, strict=True)]


def dataset_name(args: argparse.Namespace) -> str:
    """The data set to compare on; registers one that is given by its files."""
    if len(args.dataset) == 3:
        name, json_file, image_root = args.dataset
        if name in DatasetCatalog.list():
            raise ConfigError(f"--dataset: there is a data set '{name}' already. Choose another name.")
        register_coco_instances(name, {}, json_file, image_root)
        return name
    if len(args.dataset) == 1:
        return args.dataset[0]
    configs = [load_config(files[0]) for files in (args.a, args.b) if len(files) == 2]
    names = [name for cfg in configs for name in cfg.DATASETS.TEST]
    if args.dataset or not names:
        raise ConfigError("Name the data set with --dataset NAME, or --dataset NAME ANNOTATIONS.json IMAGE_FOLDER.")
    return names[0]


def open_source(files: list[str], name: str, args: argparse.Namespace):
    """A model or file of results as a function: records, metadata -> an output for each record."""
    if len(files) == 1:
        results = load_results(files[0])
        check_datasets(load_config("", ["DATASETS.TEST", (name,)]), set(), evaluation_only=True)
        return lambda records, metadata: from_results(files[0], results, records, metadata)
    if len(files) != 2:
        raise ConfigError(f"A model is CONFIG WEIGHTS or RESULTS.json; found {' '.join(files)}.")
    config, weights = files
    cfg = load_config(config, ["MODEL.WEIGHTS", weights, "DATASETS.TEST", (name,)])
    check_datasets(cfg, set(), evaluation_only=True)  # weights of other classes are refused below
    predictor = BatchedPredictor(cfg, args.batch_size, trust=args.trust)
    return lambda records, metadata: from_model(predictor, records)


def from_model(predictor: BatchedPredictor, records: Iterable[dict]) -> Iterator[dict]:
    for file_name, output in predictor(record["file_name"] for record in records):
        if isinstance(output, Exception):
            raise DataError(f"The image {file_name} cannot be read: {output}.") from output
        panoptic = output.get("panoptic_seg")
        output = {key: value.to("cpu") for key, value in output.items() if key in ("instances", "sem_seg")}
        yield output if panoptic is None else {**output, "panoptic_seg": (panoptic[0].cpu(), panoptic[1])}


def from_results(path: str, results: list[dict], records: list[dict], metadata: Metadata) -> Iterator[dict]:
    """Detections in COCO's results format as "instances", one per record."""
    of_image = defaultdict(list)
    for result in results:
        of_image[result["image_id"]].append(result)
    if of_image and not of_image.keys() & {record["image_id"] for record in records}:
        raise DataError(
            f"{path} has detections in {len(of_image)} images, but in none of the {len(records)} that are to be compared. Name "
            "the data set and split that they were made on with --dataset."
        )
    positions = {i: i for i in range(len(metadata.get("thing_classes", ())))}  # ids of a data set that is no COCO file
    classes = metadata.get("thing_dataset_id_to_contiguous_id", positions)
    if not classes:
        raise DataError(f"{path} has detections, but {metadata.name} has no classes of things.")
    unknown = {result["category_id"] for result in results} - classes.keys()
    if unknown:
        raise DataError(f"{path} has the category ids {sorted(unknown)[:5]}, which {metadata.name} does not have.")
    for record in records:
        found = of_image[record["image_id"]]
        boxes = torch.tensor([box_of(path, result) for result in found], dtype=torch.float32).reshape(-1, 4)
        instances = Instances(
            (record["height"], record["width"]),
            pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)),
            scores=torch.tensor([float(result["score"]) for result in found]),
            pred_classes=torch.tensor([classes[result["category_id"]] for result in found], dtype=torch.int64),
        )
        if found and all("segmentation" in result for result in found):
            instances.pred_masks_rle = [result["segmentation"] for result in found]
        yield {"instances": instances}


def box_of(path: str, result: dict) -> list[float]:
    """The box of a detection, [x, y, width, height] in image pixels; that of its mask where there is no other."""
    if "bbox" in result:
        return result["bbox"]
    if "segmentation" not in result:
        raise DataError(f"{path} has a detection in image {result['image_id']} with neither 'bbox' nor 'segmentation'.")
    return mask_util.toBbox(result["segmentation"]).tolist()


def find_record(records: list[dict], image: str) -> dict:
    """The record of an image that is named by its path, its file name, or the file name without suffix."""
    found = [
        record
        for record in records
        if image in (Path(record["file_name"]).name, Path(record["file_name"]).stem)
        or Path(image).resolve() == Path(record["file_name"]).resolve()
    ]
    if len(found) != 1:
        example = Path(records[0]["file_name"]).name if records else "none"
        raise DataError(f"--images {image}: the data set has {len(found)} such images, not one. A name is like {example}.")
    return found[0]


def compare(
    records: list[dict], outputs: list[Iterator[dict]], metadata: Metadata, args: argparse.Namespace
) -> tuple[list[dict], list[tuple[dict, list[dict]]]]:
    """Go over the images once.

    Returns:
        a row per image for differences.json, the largest difference first; and the images to be drawn with the outputs of A and
        B: in the order of --images, or the first ones of the rows.
    """
    rows, kept = [], []
    wanted = len(records) if args.images else args.count
    order = itertools.count()  # breaks ties, in favour of the earlier image
    pairs = zip(records, *outputs, strict=True)
    for record, *pair in tqdm(pairs, total=len(records), desc="images", unit="img", disable=None):
        size = record["height"], record["width"]
        objects = [objects_of(output, size, metadata, args.score_threshold) for output in pair]
        value, number = difference(*objects, size), next(order)
        numbers = {f"objects of {name}": len(found) for name, found in zip(args.names, objects, strict=True)}
        rows.append({"image": Path(record["file_name"]).name, "difference": value, **numbers})
        heapq.heappush(kept, (-number if args.images else value, -number, record, pair))
        if len(kept) > wanted:
            heapq.heappop(kept)
    kept.sort(reverse=True)
    return sorted(rows, key=lambda row: -row["difference"]), [(record, pair) for *_, record, pair in kept]


def objects_of(output: dict, size: tuple[int, int], metadata: Metadata, score_threshold: float) -> list[Drawable]:
    """What :func:`projects.visualization.draw` would draw of a model's output."""
    if "panoptic_seg" in output:
        ids, infos = segments_of_output(output["panoptic_seg"], metadata)
        kinds = ("thing" if s["isthing"] else "stuff" for s in infos)
        return [Drawable(kind, s["category_id"], mask=ids == s["id"]) for kind, s in zip(kinds, infos, strict=True)]
    if "instances" in output:
        return from_instances(output["instances"], size, score_threshold)
    labels = output["sem_seg"].argmax(dim=0).numpy()
    return [Drawable("stuff", int(k), mask=labels == k) for k in np.unique(labels)]


def difference(a: list[Drawable], b: list[Drawable], size: tuple[int, int]) -> float:
    """In [0, 1], as the head of this file says; 0 where neither model has an object."""
    if not (a and b):
        return float(bool(a or b))
    overlap = mask_util.iou([run_lengths(o, size) for o in a], [run_lengths(o, size) for o in b], [0] * len(b))
    for i, j in itertools.product(range(len(a)), range(len(b))):
        if (a[i].kind, a[i].class_id) != (b[j].kind, b[j].class_id):
            overlap[i, j] = 0
    total = 0.0
    while overlap.any():
        i, j = np.unravel_index(overlap.argmax(), overlap.shape)
        total += float(overlap[i, j])
        overlap[i], overlap[:, j] = 0, 0
    return 1 - 2 * total / (len(a) + len(b))


def run_lengths(found: Drawable, size: tuple[int, int]) -> dict:
    """COCO's RLE of an object's mask, or of its box where it has none."""
    if found.mask is not None:
        return mask_util.encode(np.asfortranarray(found.mask, dtype=np.uint8))
    x0, y0, x1, y1 = found.box.astype(float)
    return mask_util.frPyObjects(np.array([[x0, y0, x1 - x0, y1 - y0]]), *size)[0]


def draw_row(record: dict, outputs: list[dict], metadata: Metadata, args: argparse.Namespace) -> np.ndarray:
    """(height, width, 3) RGB: the image, the ground truth if there is one, A, B."""
    image, truth = read_image(record["file_name"], "RGB"), drawable_truth(record)
    panels = [titled(draw(image, {"annotations": []}, metadata), Path(record["file_name"]).name)]
    if truth is not None:
        panels.append(titled(draw(image, of_same_kind(truth, outputs[0]), metadata, args.color_by), "ground truth"))
    for title, output in zip(args.titles, outputs, strict=True):
        panels.append(titled(draw(image, output, metadata, args.color_by, args.score_threshold), title))
    return contact_sheet(panels, args.columns)


if __name__ == "__main__":
    sys.exit(guarded(main, parse_args()))
