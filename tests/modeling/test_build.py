"""build_model: keys that no part of a model reads are named."""

import logging
from pathlib import Path

import pytest

from projects import load_config
from projects.modeling.build import build_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/shapes_*.yaml"))


def warnings_of(caplog, config: str, *opts) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="projects.modeling.build"):
        build_model(load_config(str(CONFIGS / config), ["MODEL.DEVICE", "cpu", *opts]))
    return [record.getMessage() for record in caplog.records if record.name == "projects.modeling.build"]


def test_techniques_of_heads_that_are_not_there(caplog):
    opts = ["MODEL.MASKPLUS.CONTEXT", True, "MODEL.MASKPLUS.BOUNDARY", "dense"]
    (found,) = warnings_of(caplog, "baseline/shapes_mask_rcnn_R_18_FPN.yaml", *opts)
    assert found.startswith(
        "MODEL.MASKPLUS.CONTEXT, MODEL.MASKPLUS.BOUNDARY: changed, and no part of this model is from maskplus/"
    )
    (found,) = warnings_of(caplog, "maskpoint/shapes_mask_only.yaml", "MODEL.MASKPOINT.FUSION_MODE", "add")
    assert found.startswith("MODEL.MASKPOINT.FUSION_MODE: changed")
    assert warnings_of(caplog, "baseline/shapes_mask_rcnn_R_18_FPN.yaml") == []
    assert warnings_of(caplog, "maskplus/shapes_biased.yaml") == []


@pytest.mark.parametrize("config", [name for name in SMALL if "separated" not in name])
def test_every_small_row_has_the_heads_that_its_keys_are_for(caplog, config):
    """Without those that want the weights of another run."""
    assert warnings_of(caplog, config) == []
