"""Config files that hold something else than was meant: the error says what was expected and what was found."""

import pytest
import torch

from projects import get_cfg, load_config
from projects.errors import ConfigError


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "holds nothing: expected a mapping"),
        ("# all commented out\n", "holds nothing: expected a mapping"),
        ("- MODEL\n- SOLVER\n", "holds a sequence: expected a mapping"),
        ("MODEL\n", "holds a scalar: expected a mapping"),
        ("MODEL: 3\n", "MODEL: expected keys below it, e.g. MODEL.LOAD_PROPOSALS; found the value 3."),
        ("MODEL:\n", "MODEL: expected keys below it, e.g. MODEL.LOAD_PROPOSALS; found the value None."),
        ("MODEL:\n  DEVICE:\n    A: 1\n", "MODEL.DEVICE: expected a value such as '\\w+'; found keys: A."),
        ("_BASE_: 3\n", "_BASE_ takes the name of a config file, or a list of names."),
        ("_BASE_: [a.yaml, 3]\n", "_BASE_ takes the name of a config file, or a list of names."),
        ("_BASE_:\n", "_BASE_ takes the name of a config file, or a list of names."),
        ("_BASE_: nowhere.yaml\n", "No such file or directory: '.*nowhere.yaml'$"),
    ],
)
def test_file_of_another_shape(tmp_path, content, expected):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(str(tmp_path / "own.yaml"))
    assert "own.yaml" in str(caught.value)


def test_empty_base_is_named(tmp_path):
    (tmp_path / "base.yaml").write_text("")
    (tmp_path / "own.yaml").write_text("_BASE_: base.yaml\n")
    with pytest.raises(ConfigError, match="base.yaml' holds nothing"):
        load_config(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("SOLVER.MAX_ITER", "eight", "SOLVER.MAX_ITER takes a whole number, as in SOLVER.MAX_ITER 40000; found 'eight'."),
        ("SOLVER.MAX_ITER", 8.5, "SOLVER.MAX_ITER takes a whole number, as in SOLVER.MAX_ITER 40000; found 8.5."),
        ("SOLVER.BASE_LR", "1", "takes a number with a decimal point, as in SOLVER.BASE_LR 1.0; found 1."),
        ("MODEL.MASK_ON", "yes", "takes True or False, as in MODEL.MASK_ON False; found 'yes'."),
        ("OUTPUT_DIR", "7", "takes text, as in OUTPUT_DIR '\"7\"'; found 7."),
        ("DATASETS.TRAIN", "shapes_train", "takes a list of values, as in DATASETS.TRAIN '(\"shapes_train\",)'; found"),
        ("DATASETS.TRAIN", "(a, b)", "as in DATASETS.TRAIN '(\"a\", \"b\")'; found '(a, b)'."),
        ("SOLVER.STEPS", "often", "as in SOLVER.STEPS '(30000,)'; found 'often'."),
        ("SOLVER.STEPS", "50", "as in SOLVER.STEPS '(50,)'; found 50."),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "1.5", "SIZES '[[32, 64, 128, 256, 512]]'; found 1.5."),
    ],
)
def test_value_of_another_type(key, value, expected):
    with pytest.raises(ConfigError) as caught:
        load_config("", [key, value])
    assert expected in str(caught.value) and "class" not in str(caught.value)


def test_advice_on_types_can_be_followed(tmp_path):
    load_config("", ["DATASETS.TRAIN", '("a", "b")', "OUTPUT_DIR", '"7"', "SOLVER.STEPS", [5], "SOLVER.BASE_LR", "1.0"])
    (tmp_path / "own.yaml").write_text("DATASETS:\n  TRAIN: a\n")
    with pytest.raises(ConfigError, match="as in DATASETS.TRAIN: '\\(\"a\",\\)'; found 'a'"):
        load_config(str(tmp_path / "own.yaml"))
    (tmp_path / "own.yaml").write_text("DATASETS:\n  TRAIN: '(\"a\",)'\n")
    assert load_config(str(tmp_path / "own.yaml")).DATASETS.TRAIN == ("a",)


def test_every_default_is_of_its_own_type():
    cfg = get_cfg()
    cfg.merge_from_list([word for key in cfg.keys_in_full() for word in (key, cfg_value(cfg, key))])


def cfg_value(cfg, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def test_a_stated_gpu_that_is_not_there_is_warned_of_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_config("", ["MODEL.DEVICE", "cuda"]).MODEL.DEVICE == "cpu"
    assert caplog.text.count("MODEL.DEVICE is 'cuda'") == 1
    caplog.clear()
    load_config("", ["MODEL.DEVICE", "cpu"]), load_config()
    assert not caplog.records


@pytest.mark.parametrize(
    "name, meant",
    [
        ("configs/maskplus/shapes_biassed.yaml", " Did you mean maskplus/shapes_biased.yaml"),
        ("maskplus/shapes_biased", " Did you mean maskplus/shapes_biased.yaml"),
        ("/somewhere/else.yaml", ""),
    ],
)
def test_a_misspelt_name_of_a_config_gets_a_suggestion(name, meant):
    with pytest.raises(ConfigError, match=rf"no config file '{name}'. The project's own are in configs/.{meant}") as found:
        load_config(name)
    assert bool(meant) == ("Did you mean" in str(found.value))
