"""tools/strip_training_only.py: a smaller file that predicts the same and cannot be trained on."""

import argparse
import importlib.util
import logging
import os
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from maskplus.quasi_multitask import is_training_only
from projects import load_config
from projects.engine.checkpoint import Checkpointer
from projects.engine.launch import guarded
from projects.engine.trainer import StandardTrainer
from projects.errors import CheckpointError
from projects.evaluation.evaluate import load_for_evaluation

REPO = Path(__file__).resolve().parents[2]
TOOL = "tools/strip_training_only.py"


@pytest.fixture
def cfg(tiny_opts):
    """MaskPlus, tiny; it finds something in every image."""
    words = ["MODEL.MASKPLUS.CONV_DIMS", [20, 16], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "SOLVER.MAX_ITER", 2]
    words += ["DATASETS.TEST", (), "TEST.DETECTIONS_PER_IMAGE", 5]
    return load_config(str(REPO / "configs/maskplus/shapes_maskplus_R_18_FPN.yaml"), [*tiny_opts, *words])


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: str):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("strip_training_only", REPO / TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stripped_file(cfg, run_script, shapes_root, tmp_path, caplog):
    trainer = StandardTrainer(cfg)
    trainer.save("model_0000000")
    source, target = Path(cfg.OUTPUT_DIR) / "model_0000000.pth", tmp_path / "stripped.pth"
    done = run_script(TOOL, source, target)
    assert done.returncode == 0 and "without 6 training-only weights" in done.stdout, done.stderr

    whole, stripped = (torch.load(path, weights_only=True) for path in (source, target))
    assert stripped.keys() == {"model", "stripped"}
    assert whole["model"].keys() - stripped["model"].keys() == set(stripped["stripped"])
    assert stripped["stripped"] == [name for name in whole["model"] if is_training_only(name)]
    assert all(torch.equal(value, whole["model"][name]) for name, value in stripped["model"].items())
    assert stripped["model"]._metadata == whole["model"]._metadata  # versions of the layers' formats

    image = cv2.imread(str(next((shapes_root / "shapes/coco/val").glob("*"))))
    outputs = []
    for path in (source, target):
        cfg.MODEL.WEIGHTS = str(path)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            outputs.append(DefaultPredictor(cfg)(image)["instances"])
            load_for_evaluation(cfg, resume=False, trust=False)
        assert [record.getMessage() for record in caplog.records] == []
    del stripped["model"]["roi_heads.mask_head.predictor.bias"]
    torch.save(stripped, tmp_path / "incomplete.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "incomplete.pth")
    DefaultPredictor(cfg)
    assert "roi_heads.mask_head.predictor" in caplog.text  # what is needed and missing is heard here
    assert len(outputs[0]) == len(outputs[1]) > 0
    assert torch.equal(outputs[0].pred_boxes.tensor, outputs[1].pred_boxes.tensor)
    assert torch.equal(outputs[0].scores, outputs[1].scores)
    assert torch.equal(outputs[0].pred_masks, outputs[1].pred_masks)

    target.rename(source)
    with pytest.raises(CheckpointError, match=r"stripped of 6 weights that only training needs.*Put back the checkpoint"):
        StandardTrainer(cfg).resume_or_load(resume=True)
    load_for_evaluation(cfg, resume=True, trust=False)  # evaluation needs none of them
    cfg.MODEL.WEIGHTS = str(source)
    StandardTrainer(cfg).resume_or_load(resume=False)  # a new run may start from its weights


def test_checkpoint_of_a_run_without_auxiliary_heads_is_not_gone_on_with(cfg):
    """That their absence is silent must not let a run go on with random ones: the optimizer's state does not fit."""
    cfg.MODEL.MASKPLUS.QUASI_SCALES = []
    StandardTrainer(cfg).save("model_0000000")
    cfg.MODEL.MASKPLUS.QUASI_SCALES = [0.5]
    with pytest.raises(CheckpointError, match="does not fit this config"):
        StandardTrainer(cfg).resume_or_load(resume=True)


def test_foreign_weights_are_refused_with_auxiliary_heads(cfg, tmp_path):
    cfg.MODEL.MASKPLUS.QUASI_SCALES, cfg.MODEL.WEIGHTS = [0.5], str(tmp_path / "foreign.pth")
    torch.save({"model": {"another.weight": torch.zeros(3)}}, cfg.MODEL.WEIGHTS)
    with pytest.raises(CheckpointError, match="foreign.pth' fills none of the model's"):
        StandardTrainer(cfg).resume_or_load(resume=False)


def test_what_cannot_be_stripped(tool, tmp_path, capsys):
    key = "roi_heads.mask_head.quasi_multitask.mask_half.predictor.bias"
    files = {
        "plain": {"model": {"roi_heads.mask_head.predictor.bias": torch.zeros(3)}},
        "list": [1, 2],
        "no_weights": {"model": 3},
        "number": {"model": {3: torch.zeros(3), key: torch.zeros(3)}},
        "text": {"model": {key: "zeros"}},
        "good": {"model": {key: torch.zeros(3), "a": torch.ones(2)}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:-50])
    torch.save({"model": RunsCode(str(tmp_path / "made"))}, tmp_path / "code.pth")
    target = tmp_path / "target.pth"
    for name, message in {
        "plain": "holds no weights that only training needs",
        "list": "is no checkpoint",
        "no_weights": "is no checkpoint",
        "number": "a Tensor under 3 where its weights",
        "text": f"a str under '{key}' where its weights",
        "cut": "truncated, corrupt",
        "code": r"was not loaded: it wants \w+\.mkdir\b.*--trust",
        "absent": "There is no checkpoint",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            tool.strip(tmp_path / f"{name}.pth", target)
        assert not target.exists() and not (tmp_path / "made").exists()
    with pytest.raises(CheckpointError, match="plain.pth/target.pth' was not written"):
        tool.strip(tmp_path / "good.pth", tmp_path / "plain.pth" / "target.pth")
    assert tool.strip(tmp_path / "good.pth", target) == [key]
    with pytest.raises(CheckpointError, match="exists. Name a new file"):
        tool.strip(tmp_path / "good.pth", tmp_path / "good.pth")
    args = argparse.Namespace(source=tmp_path / "plain.pth", target=tmp_path / "other.pth", trust=False)
    assert guarded(tool.main, args) == 2
    assert "error: " in capsys.readouterr().err


def test_interrupted_writing_leaves_nothing(tool, tmp_path, monkeypatch):
    torch.save({"model": {"mask_head.quasi_multitask.x": torch.zeros(3)}}, tmp_path / "source.pth")

    def interrupted(data, file):
        file.write(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool.strip(tmp_path / "source.pth", tmp_path / "target.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]


def test_a_model_without_auxiliary_heads_loads_the_stripped_file(cfg, tmp_path):
    torch.manual_seed(0)
    weights = build_model(cfg).state_dict()
    torch.save({"model": {k: v for k, v in weights.items() if not is_training_only(k)}, "stripped": []}, tmp_path / "a.pth")
    cfg.MODEL.MASKPLUS.QUASI_SCALES = []
    checkpointer = Checkpointer(build_model(cfg))
    checkpointer.load(str(tmp_path / "a.pth"))
    assert checkpointer.unloaded == []
