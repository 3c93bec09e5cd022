"""What the five papers share: config, data, training, evaluation, operators, pictures.

``PROJECTS`` is the table of papers. Adding a sixth paper is one folder and one row.

Importing this package imports nothing else, so that the operators need only torch, and ``python -m projects.doctor`` runs where
Detectron2 or torch is missing.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from .config import Config

logger = logging.getLogger(__name__)

# Package of a paper -> the function in it that adds the paper's keys to a config.
PROJECTS: dict[str, str] = {
    "casnet": "add_casnet_config",
    "dsg": "add_dsg_config",
    "ganmask": "add_ganmask_config",
    "maskplus": "add_maskplus_config",
    "maskpoint": "add_maskpoint_config",
}


def get_cfg() -> Config:
    """Detectron2's defaults (MODEL.DEVICE: a GPU when there is one), the keys that all papers share, and every paper's.

    Importing the papers and the data sets also registers them, so that a config of any paper builds afterwards.
    """
    import torch
    from detectron2.config import get_cfg as get_detectron2_cfg

    from .config import Config, add_common_config

    importlib.import_module("projects.data.builtin")
    importlib.import_module("projects.modeling.panoptic_fpn")
    cfg = Config(get_detectron2_cfg())
    add_common_config(cfg)
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    for package, add_keys in PROJECTS.items():
        getattr(importlib.import_module(package), add_keys)(cfg)
    return cfg


def config_path(name: str) -> str:
    """Path of a config that comes with this project, e.g. ``config_path("baseline/mask_rcnn_R_50_FPN_1x.yaml")``.

    Looks inside the package (an installed copy) and beside it (a checkout). Raises ConfigError when it is in neither.
    """
    for folder in config_folders():
        if (folder / name).is_file():
            return str(folder / name)
    raise ConfigError(f"No config '{name}' in {' or '.join(map(str, config_folders()))}.{alike(name)}")


def config_folders() -> list[Path]:
    """Where this project's configs may be: inside the package, and beside it."""
    here = Path(__file__).resolve().parent
    return [here / "configs", here.parent / "configs"]


def require_config(config_file: str) -> None:
    """Raise ConfigError unless there is such a file; it names those of this project that are spelt alike."""
    if not Path(config_file).is_file():
        raise ConfigError(f"There is no config file '{config_file}'. The project's own are in configs/.{alike(config_file)}")


def alike(name: str) -> str:
    """ " Did you mean ...?" with names of configs like this one, or nothing."""
    own = {str(path.relative_to(folder)) for folder in config_folders() for path in folder.rglob("*.yaml")}
    close = difflib.get_close_matches(str(name).rpartition("configs/")[2], sorted(own), n=3, cutoff=0.7)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def stated_keys(config_file: str, opts: list | tuple = ()) -> set[str]:
    """The keys that a config file, its bases or the overrides set in so many words (not by default)."""
    from .config import Config

    keys = set(opts[0::2])
    if config_file:
        keys |= set(Config(Config.load_yaml_with_base(config_file)).keys_in_full())
    return keys


def load_config(config_file: str = "", opts: list | tuple = ()) -> Config:
    """Read a config file and apply overrides.

    Args:
        config_file: a YAML file, or "" for the defaults.
        opts: ``[KEY, VALUE, ...]``, values as strings or Python objects.

    Returns:
        A config in which MODEL.DEVICE is "cpu" where there is no GPU (with a warning if another was stated), and OUTPUT_DIR,
        unless stated, is ``output/<folder of the config>/<name of the config>``. Not frozen.

    Raises:
        ConfigError: the file does not exist or holds more than plain YAML; a key does not exist or has another type.
    """
    import torch

    opts = list(opts)
    refuse_no_overrides(opts)
    if len(opts) % 2:
        raise ConfigError(f"Overrides come as KEY VALUE pairs; found {len(opts)} words: {' '.join(map(str, opts))}.")
    cfg = get_cfg()
    if config_file:
        require_config(config_file)
        cfg.merge_from_file(str(config_file))
    cfg.merge_from_list(opts)
    if config_file and "OUTPUT_DIR" not in stated_keys(config_file, opts):
        path = Path(config_file).resolve()
        cfg.OUTPUT_DIR = str(Path("output") / path.parent.name / path.stem)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is '%s', but PyTorch finds no GPU here: computing on the CPU.", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def refuse_no_overrides(opts: list) -> None:
    """Raise ConfigError for an option or KEY=VALUE among KEY VALUE overrides."""
    for word in map(str, opts):
        if re.fullmatch(r"--[a-z][a-z-]*(=.*)?", word):
            raise ConfigError(
                f"'{word}' stands among the KEY VALUE overrides: options such as {word.split('=')[0]} go before the KEY VALUE "
                "overrides."
            )
    for word in map(str, opts[0::2]):
        if "=" in word:
            raise ConfigError(f"'{word}': write a space instead of '=', as in {word.replace('=', ' ', 1)}.")


__all__ = ["PROJECTS", "config_path", "get_cfg", "load_config", "stated_keys"]
