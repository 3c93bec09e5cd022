"""Shared fixtures: generator states restored around every test, a small shapes data set, the real sample data."""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
SHARED_DATA = REPO.parent / "shared" / "data"


DATA_ROOT = tempfile.TemporaryDirectory(prefix="data_root_")
os.environ["DETECTRON2_DATASETS"] = DATA_ROOT.name  # Detectron2's catalogs read it when they are imported


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; this machine has none"))


@pytest.fixture(autouse=True)
def random_state_restored():
    """No test changes the random numbers that the next one sees."""
    from projects.engine.checkpoint import rng_preserved

    with rng_preserved():
        yield


@pytest.fixture(autouse=True)
def loggers_restored():
    """No test leaves a handler behind, whose stream ends with the test, or a logger that ``caplog`` no longer hears."""

    def loggers() -> list[logging.Logger]:
        known = logging.root.manager.loggerDict.values()
        return [logging.root, *(logger for logger in known if isinstance(logger, logging.Logger))]

    before = {logger: (list(logger.handlers), logger.propagate) for logger in loggers()}
    yield
    for logger in loggers():
        handlers, logger.propagate = before.get(logger, ([], True))
        for handler in set(logger.handlers) - set(handlers):
            logger.removeHandler(handler)


@pytest.fixture(scope="session")
def shapes_root() -> Path:
    """A data root with a small `shapes` data set (24 training, 12 validation images); DETECTRON2_DATASETS points at it."""
    from projects.data.shapes import generate_shapes

    root = Path(DATA_ROOT.name)
    generate_shapes(root, train=24, val=12, progress=False)
    return root


@pytest.fixture(scope="session")
def cityscapes_root(shapes_root) -> Path:
    """The folder of shapes in Cityscapes' format, with its panoptic maps."""
    from projects.data.cityscapes_panoptic import write_panoptic

    folder = shapes_root / "shapes" / "cityscapes"
    for split in ("train", "val"):
        write_panoptic(folder, split, workers=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def real_coco_root() -> Path:
    """A data root with real COCO images; skips where there is none."""
    if not (SHARED_DATA / "coco").is_dir():
        pytest.skip("needs a sample of COCO in ../shared/data/coco")
    return SHARED_DATA


TINY = [
    "INPUT.MIN_SIZE_TRAIN", (64, 72, 80), "INPUT.MIN_SIZE_TEST", 64,
    "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RPN.CONV_DIMS", [16], "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.RPN.POST_NMS_TOPK_TEST", 20,
    "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 5, "SOLVER.LOG_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 1000,
    "TEST.PICTURES", 2, "SEED", 7, "MODEL.DEVICE", "cpu",
]  # fmt: skip


@pytest.fixture
def tiny_opts(shapes_root, tmp_path) -> list:
    """Overrides that make the shapes config train a step in a fraction of a second, into a folder of the test."""
    return [*TINY, "OUTPUT_DIR", str(tmp_path / "output")]


@pytest.fixture
def tiny_cfg(tiny_opts):
    """``tiny_cfg(KEY, VALUE, ...)``: the shapes config with ``tiny_opts`` and more overrides."""
    from projects import load_config

    def build(*opts):
        return load_config(str(REPO / "configs/baseline/shapes_mask_rcnn_R_18_FPN.yaml"), [*tiny_opts, *opts])

    return build


@pytest.fixture
def run_script():
    """Run a script of the repository in a process of its own: ``run_script("train_net.py", "--help", env={...})``."""

    def run(script: str, *args, env: dict | None = None, timeout: int = 300) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(REPO / script), *map(str, args)],
            env={**os.environ, **(env or {})},
            cwd=REPO,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
