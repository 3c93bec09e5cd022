"""The Cityscapes evaluators where something is missing, wrong or double; splits without ground truth; several processes."""

import json
import os
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from PIL import Image

from projects.data.cityscapes import register_cityscapes
from projects.errors import ConfigError, DataError
from projects.evaluation import build_evaluator
from projects.evaluation.by_output import EvaluatorsByOutput
from projects.evaluation.cityscapes_instance import CityscapesInstanceEvaluator
from projects.evaluation.cityscapes_panoptic import CityscapesPanopticEvaluator
from projects.evaluation.cityscapes_semantic import CityscapesSemanticEvaluator
from projects.evaluation.panoptic_files import read_segment_map

NAME = "shapes_cityscapes_panoptic_val"
BY_OUTPUT = {
    "instances": CityscapesInstanceEvaluator,
    "sem_seg": CityscapesSemanticEvaluator,
    "panoptic_seg": CityscapesPanopticEvaluator,
}


@pytest.fixture
def few(val_records, perfect, monkeypatch):
    """(records, perfect outputs) of three images, which are all that the data set has; the third is without objects."""
    records = [val_records[i] for i in (0, 1, 7)]
    assert not [a for a in records[2]["annotations"] if not a["iscrowd"]]
    monkeypatch.setitem(DatasetCatalog.data, NAME, lambda: records)
    return records, [perfect(record) for record in records]


@pytest.fixture
def copied(cityscapes_root, tmp_path):
    """A copy of the data set, registered as "copied_<task>_<split>", to be damaged; its test split has val's images."""
    folder = tmp_path / "copied"
    shutil.copytree(cityscapes_root, folder)
    shutil.copytree(folder / "leftImg8bit/val", folder / "leftImg8bit/test")
    register_cityscapes(folder, "copied")
    yield folder
    for name in [name for name in DatasetCatalog.list() if name.startswith("copied_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("key", BY_OUTPUT)
def test_an_unknown_and_a_missing_image(few, run_evaluator, key):
    records, outputs = few
    evaluator = BY_OUTPUT[key](NAME)
    with pytest.raises(DataError, match="prediction for the image 'nowhere_000000_000019'"):
        evaluator.process([dict(records[0], image_id="nowhere_000000_000019")], outputs[:1])
    with pytest.raises(DataError, match=f"1 of the 3 images.*{records[2]['image_id']}"):
        run_evaluator(evaluator, records[:2], outputs[:2])


@pytest.mark.parametrize("key", BY_OUTPUT)
def test_of_two_predictions_for_an_image_the_later_one_counts(few, perfect, run_evaluator, key):
    records, outputs = few
    empty = perfect(records[2])
    expected = run_evaluator(BY_OUTPUT[key](NAME), records, [outputs[0], empty, outputs[2]])
    again = run_evaluator(BY_OUTPUT[key](NAME), [records[1], *records], [outputs[1], outputs[0], empty, outputs[2]])
    np.testing.assert_equal(again, expected)
    assert run_evaluator(BY_OUTPUT[key](NAME), records, outputs) != expected


def test_two_detections_on_one_object(few, run_evaluator):
    """The benchmark: the weaker is a false positive. All scores are equal here, so precision at full recall is n / (n + 1)."""
    records, outputs = few
    classes = torch.cat([output["instances"].pred_classes for output in outputs])
    k = int(outputs[0]["instances"].pred_classes[0])
    n = int((classes == k).sum())
    outputs[0]["instances"] = outputs[0]["instances"][[0, *range(len(outputs[0]["instances"]))]]
    metrics = run_evaluator(CityscapesInstanceEvaluator(NAME), records, outputs)["segm"]
    name = MetadataCatalog.get(NAME).thing_classes[k]
    assert metrics[f"AP-{name}"] == pytest.approx(100 * (1 + n / (n + 1)) / 2)


def test_no_detections_and_no_ground_truth(few, run_evaluator, caplog):
    records, outputs = few
    for output in outputs:
        output["instances"] = output["instances"][:0]
        output["panoptic_seg"] = (torch.zeros_like(output["panoptic_seg"][0]), [])
    evaluator = CityscapesInstanceEvaluator(NAME)
    metrics = run_evaluator(evaluator, records, outputs)["segm"]
    present = {int(i) // 1000 for r in records for i in np.unique(Image.open(r["instance_ids_file_name"])) if i >= 1000}
    assert (metrics["AP"], metrics["AP50"]) == (0, 0)
    assert "AP50 is 0.0: no instance of the benchmark's classes has a match of IoU 0.5. The model found 0 of" in caplog.text
    classes = MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id
    for label_id, k in classes.items():
        ap = metrics[f"AP-{MetadataCatalog.get(NAME).thing_classes[k]}"]
        assert ap == 0 if label_id in present else np.isnan(ap)
    metrics = run_evaluator(CityscapesPanopticEvaluator(NAME), records, outputs)["panoptic_seg"]
    assert (metrics["PQ"], metrics["SQ_th"], metrics["RQ_st"]) == (0, 0, 0)
    evaluator.records = {records[2]["image_id"]: evaluator.records[records[2]["image_id"]]}
    assert all(np.isnan(value) for value in run_evaluator(evaluator, records[2:], outputs[2:])["segm"].values())


def test_detections_without_pixels_or_score_do_not_count(few, run_evaluator, caplog):
    records, outputs = few
    instances = outputs[0]["instances"]
    outputs[0]["instances"] = instances[[0, 0, *range(len(instances))]]
    outputs[0]["instances"].pred_masks[0] = False
    outputs[0]["instances"].scores[1] = float("nan")
    assert run_evaluator(CityscapesInstanceEvaluator(NAME), records, outputs)["segm"]["AP"] == 100
    assert "1 of" in caplog.text and "not finite" in caplog.text


def test_outputs_that_do_not_fit(few):
    records, outputs = few
    instance, semantic, panoptic = (evaluator(NAME) for evaluator in BY_OUTPUT.values())
    instances = outputs[0]["instances"]
    with pytest.raises(ConfigError, match="11 semantic classes.* has 19"):
        semantic.process(records[:1], [{"sem_seg": outputs[0]["sem_seg"][:11]}])
    with pytest.raises(DataError, match="original image's size"):
        semantic.process(records[:1], [{"sem_seg": outputs[0]["sem_seg"][:, ::2, ::2]}])
    ids, infos = outputs[0]["panoptic_seg"]
    with pytest.raises(DataError, match="original image's size"):
        panoptic.process(records[:1], [{"panoptic_seg": (ids[1:], infos)}])
    with pytest.raises(ConfigError, match="label_divisor"):
        panoptic.process(records[:1], [{"panoptic_seg": (ids, None)}])
    with pytest.raises(DataError, match=f"{infos[0]['id']}.*segments_info"):
        panoptic.process(records[:1], [{"panoptic_seg": (ids, infos[1:])}])
    instances.pred_classes[0] = 8
    with pytest.raises(ConfigError, match="thing class 8, .* has 8"):
        instance.process(records[:1], [{"instances": instances}])
    with pytest.raises(ConfigError, match="stuff class 19, .* has 19"):
        panoptic.process(records[:1], [{"panoptic_seg": (ids, [dict(s, isthing=False, category_id=19) for s in infos])}])
    instances.remove("pred_masks")
    with pytest.raises(ConfigError, match="MODEL.MASK_ON"):
        instance.process(records[:1], [{"instances": instances}])


def test_a_model_with_some_of_the_outputs(few, run_evaluator, caplog):
    records, outputs = few
    evaluator = build_evaluator(get_cfg(), NAME, None)
    assert isinstance(evaluator, EvaluatorsByOutput)
    results = run_evaluator(evaluator, records, [{"instances": output["instances"]} for output in outputs])
    assert list(results) == ["segm"]
    assert caplog.text.count("not evaluated, since the model does not give it: sem_seg, panoptic_seg.") == 1
    with pytest.raises(ConfigError, match=r"evaluated by instances, sem_seg, panoptic_seg; this model returns \['proposals'\]"):
        run_evaluator(evaluator, records, [{"proposals": None}] * 3)
    for name, key in (("instance", "instances"), ("semantic", "sem_seg")):
        evaluator = build_evaluator(get_cfg(), f"shapes_cityscapes_{name}_val", None)
        assert list(evaluator.evaluators) == [key]


def test_damaged_ground_truth(copied, perfect):
    record = DatasetCatalog.get("copied_panoptic_val")[0]
    output = perfect(record)
    for key, evaluator in {key: evaluator("copied_panoptic_val") for key, evaluator in BY_OUTPUT.items()}.items():
        path = record[{"panoptic_seg": "pan_seg_file_name"}.get(key, evaluator.truth)]
        with open(path, "rb") as file:
            content = file.read()
        with open(path, "wb") as file:
            file.write(content[:100])
        with pytest.raises(DataError, match="cannot score"):
            evaluator.process([record], [output])
        with open(path, "wb") as file:
            file.write(content)
    records = DatasetCatalog.get("copied_instance_val")
    del records[3]["instance_ids_file_name"]
    DatasetCatalog.pop("copied_instance_val")
    DatasetCatalog.register("copied_instance_val", lambda: records)
    with pytest.raises(DataError, match="1 of 12 images have no ground truth"):
        CityscapesInstanceEvaluator("copied_instance_val")


def test_nothing_is_left_behind(few, run_evaluator, tmp_path, monkeypatch):
    records, outputs = few
    temporary, here = tmp_path / "temporary", tmp_path / "here"
    for folder in (temporary, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("CITYSCAPES_EXPORT_DIR", str(tmp_path / "nowhere"))
    for name in [name for name in sys.modules if name.startswith("cityscapesscripts.evaluation.")]:
        monkeypatch.delitem(sys.modules, name)  # they read the environment when they are imported
    evaluator = build_evaluator(get_cfg(), NAME, str(tmp_path / "output"))
    assert os.environ["CITYSCAPES_EXPORT_DIR"] == str(tmp_path / "nowhere")
    assert run_evaluator(evaluator, records, outputs)["segm"]["AP"] == 100
    script = sys.modules["cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling"]
    assert not os.path.exists(script.args.gtInstancesFile) and script.args.quiet is False
    assert os.listdir(here) == os.listdir(temporary) == [] and not (tmp_path / "output").exists()


def test_without_the_benchmarks_package(val_records, monkeypatch):
    monkeypatch.setitem(sys.modules, "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", None)
    with pytest.raises(ConfigError, match="pip install cityscapesscripts"):
        build_evaluator(get_cfg(), NAME, None)


def test_a_split_without_ground_truth(copied, perfect, val_records, run_evaluator, tmp_path, caplog, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    name, output_dir = "copied_panoptic_test", tmp_path / "output"
    with pytest.raises(ConfigError, match="Give an output_dir"):
        build_evaluator(get_cfg(), name, None)
    records, outputs = DatasetCatalog.get(name), [perfect(record) for record in val_records]
    stale = output_dir / "cityscapes_instance" / "stale.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier evaluation")
    evaluator = build_evaluator(get_cfg(), name, str(output_dir))
    with caplog.at_level("INFO", logger="projects"):
        assert run_evaluator(evaluator, records, outputs) == {}
    assert os.listdir(tmp_path / "temporary") == []
    check_submission(output_dir, val_records, outputs)
    for folder in sorted(os.listdir(output_dir)):
        assert f"the predictions are in {output_dir / folder}" in caplog.text
    assert not stale.exists()
    with pytest.raises(DataError, match="1 of the 12 images"):
        run_evaluator(build_evaluator(get_cfg(), name, str(output_dir)), records[1:], outputs[1:])


def test_ten_classes_without_ground_truth(copied, perfect, val_records, run_evaluator, tmp_path):
    name = "copied_instance10_test"
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    numbered = DatasetCatalog.get("copied_instance10_val")
    outputs = [perfect({**record, **ten}) for record, ten in zip(val_records, numbered, strict=True)]
    assert run_evaluator(build_evaluator(cfg, name, str(tmp_path / "output")), DatasetCatalog.get(name), outputs) == {}
    written = json.loads((tmp_path / "output/coco_instances_results.json").read_text())
    assert len(written) == sum(len(output["instances"]) for output in outputs)
    assert {result["category_id"] for result in written} <= {24, 25, 26, 27, 28, 31, 32, 33}


def check_submission(folder, records, outputs) -> None:
    """The files are those that the servers ask for, and hold the outputs."""
    assert sorted(os.listdir(folder)) == ["cityscapes_instance", "cityscapes_panoptic", "cityscapes_semantic"]
    index = json.loads((folder / "cityscapes_panoptic/cityscapes_panoptic_test.json").read_text())["annotations"]
    assert [entry["image_id"] for entry in index] == [record["image_id"] for record in records]
    for record, output, entry in zip(records, outputs, index, strict=True):
        truth = np.array(Image.open(record["instance_ids_file_name"])).astype(int)
        lines = (folder / f"cityscapes_instance/{record['image_id']}_pred.txt").read_text().splitlines()
        assert len(lines) == len(output["instances"]) == len([i for i in np.unique(truth) if i >= 1000])
        found = np.zeros_like(truth)
        for line in lines:
            path, label_id, score = line.split(" ")
            mask = np.array(Image.open(folder / "cityscapes_instance" / path))
            assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255} and float(score) == pytest.approx(0.9)
            found[mask > 0] = int(label_id)
        assert (found == np.where(truth >= 1000, truth // 1000, 0)).all()
        labels = np.array(Image.open(folder / f"cityscapes_semantic/{record['image_id']}_pred.png"))
        truth = np.array(Image.open(record["label_ids_file_name"]))
        assert labels.dtype == np.uint8 and (labels == truth)[truth > 0].all()
        ids = read_segment_map(folder / "cityscapes_panoptic/cityscapes_panoptic_test" / entry["file_name"])
        categories = np.zeros(ids.max() + 1, int)
        for segment in entry["segments_info"]:
            categories[segment["id"]] = segment["category_id"]
        assert (categories[ids] == truth).all()


class Probe(DatasetEvaluator):
    def evaluate(self):
        return {"probe": {"asked": 1}}


def _one_of_two(rank, port, records, outputs, output_dir, queue):
    torch.set_num_threads(1)  # a forked process must not use its parent's OpenMP threads
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    scored, written = (build_evaluator(get_cfg(), name, output_dir) for name in (NAME, "copied_panoptic_test"))
    found = []
    for evaluator in (scored, written):
        evaluator.reset()
        for i in range(rank, len(records), 2):
            evaluator.process([records[i]], [outputs[i]])
        found.append(evaluator.evaluate())
    idle = EvaluatorsByOutput("one image", {"instances": [Probe()]})
    idle.process(records[: 1 - rank], outputs[: 1 - rank])  # the second process has none, and waits for no one
    found.append(idle.evaluate())
    queue.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def test_two_real_processes(copied, val_records, perfect, run_evaluator, tmp_path):
    outputs = [perfect(record) for record in val_records]
    for i in (2, 5):  # damage in a part of either process
        outputs[i]["instances"] = outputs[i]["instances"][1:]
        outputs[i]["sem_seg"] = outputs[i]["sem_seg"].roll(5, 2)
        outputs[i]["panoptic_seg"] = (torch.zeros_like(outputs[i]["panoptic_seg"][0]), [])
    whole = run_evaluator(build_evaluator(get_cfg(), NAME, None), val_records, outputs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("fork").SimpleQueue()
    arguments = (port, val_records, outputs, str(tmp_path / "two"), queue)
    mp.start_processes(_one_of_two, arguments, nprocs=2, start_method="fork")
    found = dict(queue.get() for _ in range(2))
    probe = {"probe": {"asked": 1}}
    np.testing.assert_equal(found, {0: [whole, {}, probe], 1: [{}, {}, probe]})
    run_evaluator(build_evaluator(get_cfg(), "copied_panoptic_test", str(tmp_path / "one")), val_records, outputs)
    one, two = ({str(p.relative_to(tmp_path / d)): p for p in (tmp_path / d).rglob("*.*")} for d in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 3 * 12
    assert all(one[name].read_bytes() == two[name].read_bytes() for name in one)
