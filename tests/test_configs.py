"""The contract of every config file: it loads, states only what differs, and trains and infers.

Every YAML under configs/ is a case; a paper's configs join by being there. Files whose name begins with "Base" are read through
the others. Models are built narrow (an eighth of the channels), with the config's own depth, blocks, heads and losses.
"""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from PIL import Image

from projects import PROJECTS, get_cfg, load_config
from projects.config import Config
from projects.data.mapper import build_mapper
from projects.engine.optimizer import build_optimizer
from projects.engine.trainer import TRAINER_REGISTRY
from projects.evaluation import evaluator_builder

REPO = Path(__file__).resolve().parent.parent
CONFIGS = sorted((REPO / "configs").rglob("*.yaml"))
LEAVES = [path for path in CONFIGS if not path.name.startswith("Base")]
NARROW = {
    "MODEL.RESNETS.NORM": "BN",  # without trained weights, frozen statistics let the activations explode
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.RPN.CONV_DIMS": [16],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 2048,  # or chance leaves out all anchors of the topmost levels
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.CASNET.HRNET_WIDTH": 4,
    "MODEL.CASNET.HRNET_MODULES": [1, 1, 1],
    "MODEL.CASNET.HRNET_BLOCKS": 1,
    "MODEL.CASNET.HRNET_WEIGHTS": "",
    "SOLVER.BASE_LR": 0.0001,  # there is no warm-up here: the second step is to see nearly the same model
    "INPUT.MIN_SIZE_TRAIN": (96, 96),  # two: some configs sample from a range
    "INPUT.MAX_SIZE_TRAIN": 128,
    "INPUT.CROP.SIZE": [96, 128],
    "INPUT.MIN_SIZE_TEST": 96,
    "INPUT.MAX_SIZE_TEST": 128,
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO / "configs"))


def own_keys() -> list[str]:
    """The keys that this project adds to Detectron2's."""
    from detectron2.config import get_cfg as detectron2_cfg

    return sorted(set(get_cfg().keys_in_full()) - set(Config(detectron2_cfg()).keys_in_full()))


def narrow_config(path: Path) -> Config:
    cfg = load_config(str(path))
    opts = dict(NARROW)
    channels = NARROW["MODEL.FPN.OUT_CHANNELS"]
    opts["MODEL.MASKPLUS.CONV_DIMS"] = [dim * channels // cfg.MODEL.FPN.OUT_CHANNELS for dim in cfg.MODEL.MASKPLUS.CONV_DIMS]
    opts["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS"] = [channels] * len(cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS)
    if cfg.MODEL.RESNETS.DEPTH > 34:  # Detectron2 builds R18 and R34 in one width only
        opts["MODEL.RESNETS.STEM_OUT_CHANNELS"] = 8
        opts["MODEL.RESNETS.RES2_OUT_CHANNELS"] = 32
        opts["MODEL.RESNETS.WIDTH_PER_GROUP"] = max(8 // cfg.MODEL.RESNETS.NUM_GROUPS, 1)
    cfg.merge_from_list([word for pair in opts.items() for word in pair])
    return cfg


@pytest.fixture
def record(tmp_path) -> dict:
    """A record of a photograph-like image with two instances and a semantic map, as a data set gives it."""
    pixels = np.random.RandomState(0).randint(0, 255, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(np.random.RandomState(1).randint(0, 8, (96, 128), dtype=np.uint8)).save(tmp_path / "labels.png")
    square, triangle = [10, 10, 60, 10, 60, 50, 10, 50], [70, 80, 110, 80, 90, 30]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "segmentation": [polygon], "iscrowd": 0}
        for box, category, polygon in (([10, 10, 60, 50], 0, square), ([70, 30, 110, 80], 1, triangle))
    ]
    return {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "image_id": 1,
        "height": 96,
        "width": 128,
        "annotations": annotations,
    }


@pytest.mark.parametrize("path", LEAVES, ids=name_of)
def test_config_trains_and_infers(path, record):
    cfg = narrow_config(path)
    assert cfg.SOLVER.TRAINER in TRAINER_REGISTRY
    if cfg.MODEL.CASNET.MODE == "separated":
        cfg.MODEL.CASNET.SEMANTIC_WEIGHTS = record["file_name"].replace("image.png", "semantic.pth")
        semantic = cfg.clone()
        semantic.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
        torch.save(build_model(semantic).state_dict(), cfg.MODEL.CASNET.SEMANTIC_WEIGHTS)
    sample = build_mapper(cfg, is_train=True)(record)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    missing = {name for name, p in model.named_parameters() if p.requires_grad}
    with EventStorage(0):
        for _ in range(2):  # zero-initialised last layers give those before them no gradient in the first step
            losses = model([sample])
            assert losses and all(torch.isfinite(loss) for loss in losses.values()), losses
            optimizer.zero_grad()
            sum(losses.values()).backward()
            missing -= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
            optimizer.step()
    assert not missing, "parameters without a gradient"
    with torch.no_grad():
        outputs = model.eval()([build_mapper(cfg, is_train=False)(record)])
    assert len(outputs) == 1 and outputs[0]


@pytest.mark.parametrize("path", LEAVES, ids=name_of)
def test_leaf_states_only_what_differs_from_its_base(path):
    own = yaml.safe_load(path.read_text())
    base = get_cfg()
    bases = own.pop("_BASE_", [])
    for name in [bases] if isinstance(bases, str) else bases:
        base.merge_from_file(str(path.parent / name))
    values = {key: value_at(base, key) for key in Config(own).keys_in_full()}
    merged = base.clone()
    merged.merge_from_other_cfg(Config(own))
    restated = [key for key, value in values.items() if value == value_at(merged, key)]
    assert not restated, f"keys that only restate the base: {restated}"


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_config_says_what_it_is(path):
    assert path.read_text().startswith("#"), "expected a comment that says what this config is"
    load_config(str(path))


def value_at(cfg: CfgNode, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("key", own_keys())
def test_own_key_is_read_and_commented(key):
    sources = [REPO / "projects", *(REPO / package for package in PROJECTS), REPO / "train_net.py"]
    files = [file for source in sources for file in ([source] if source.is_file() else source.rglob("*.py"))]
    parent, leaf = key.split(".")[-2:]
    readers = [
        file
        for file in files
        if file.name != "config.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == leaf
        and isinstance(node.ctx, ast.Load)
        and parent.lower() in ast.unparse(node.value).lower()  # cfg.SOLVER.TRAINER, or solver.TRAINER with a local name
    ]
    assert readers, f"{key} is read nowhere"
    lines = [line for file in files if file.name == "config.py" for line in file.read_text().splitlines()]
    at = [i for i, line in enumerate(lines) if re.match(rf"\s*(\w+\.)*{parent}\.{leaf} = ", line)]
    assert at and lines[at[0] - 1].strip().startswith("#"), f"{key} has no comment above it"


def test_every_data_set_of_a_config_has_an_evaluator():
    for path in LEAVES:
        for name in load_config(str(path)).DATASETS.TEST:
            evaluator_builder(name)
