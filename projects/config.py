"""Config keys that belong to no paper, and the config class whose YAML loading is safe.

Every key that a paper adds stands in that paper's ``config.py`` under its own node.
"""

import difflib
import re

import yaml
from detectron2.config import CfgNode

from .errors import ConfigError

# Keys that hold a number of classes -> the list in a data set's metadata that it must equal. Papers add theirs.
CLASS_COUNT_KEYS = {
    "MODEL.ROI_HEADS.NUM_CLASSES": "thing_classes",
    "MODEL.RETINANET.NUM_CLASSES": "thing_classes",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "stuff_classes",
}

# Types that a key can hold, in words.
KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number with a decimal point",
    str: "text",
    tuple: "a list of values",
    list: "a list of values",
}


class Config(CfgNode):
    """Detectron2's CfgNode with YAML loading that never runs code and errors that say what to do.

    Detectron2's own ``merge_from_file`` admits YAML tags that construct any Python object; here a file that has one is
    refused with a :class:`ConfigError`, and so are files that do not exist and keys that nobody reads.
    """

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        """As Detectron2's. Raises ConfigError for a file of the chain that holds anything but a mapping."""
        with cls._open_cfg(filename) as file:
            content = yaml.compose(file, Loader=yaml.SafeLoader)  # the structure; nothing is constructed
        if not isinstance(content, yaml.MappingNode):
            found = f"a {content.id}" if content else "nothing"
            raise ConfigError(f"Config file '{filename}' holds {found}: expected a mapping, e.g. 'MODEL:' and keys below it.")
        for key, value in content.value:
            of_list = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if key.value == "_BASE_" and any(base.tag != "tag:yaml.org,2002:str" for base in of_list):
                raise ConfigError(f"Config file '{filename}': _BASE_ takes the name of a config file, or a list of names.")
        return super().load_yaml_with_base(filename, allow_unsafe)

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge a YAML file (with its ``_BASE_`` chain). ``allow_unsafe=True`` is for files you wrote yourself."""
        try:
            self._refuse_misplaced(self.load_yaml_with_base(cfg_filename, allow_unsafe), between=": ")
            super().merge_from_file(cfg_filename, allow_unsafe=allow_unsafe)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"Config file '{cfg_filename}' is not plain YAML ({one_line(error)}). Expected mappings of plain "
                "values; tags that construct Python objects are refused."
            ) from error
        except RecursionError as error:
            raise ConfigError(f"Config file '{cfg_filename}': its _BASE_ leads back to itself.") from error
        except (KeyError, ValueError, AssertionError, TypeError, AttributeError, OSError) as error:
            raise ConfigError(f"Config file '{cfg_filename}': {self._explain(error)}") from error

    def merge_from_list(self, cfg_list: list) -> None:
        """Merge ``[KEY, VALUE, KEY, VALUE, ...]`` as given at the end of a command line."""
        try:
            for key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=False):
                for part in reversed(str(key).split(".")):
                    value = {part: value}
                self._refuse_misplaced(value)
            super().merge_from_list(cfg_list)
        except (KeyError, ValueError, AssertionError, TypeError, AttributeError) as error:
            raise ConfigError(f"KEY VALUE overrides: {self._explain(error)}") from error

    def keys_in_full(self, prefix: str = "") -> list[str]:
        """All leaf keys with their path: ``["MODEL.DEVICE", ...]``."""
        keys = []
        for key, value in self.items():
            path = f"{prefix}{key}"
            keys += Config.keys_in_full(value, f"{path}.") if isinstance(value, CfgNode) else [path]
        return keys

    def _refuse_misplaced(self, values: dict, prefix: str = "", between: str = " ") -> None:
        """Raise ValueError where ``values`` has a value in place of a group of keys, a group in place of a value, or a value of
        another type. ``between`` stands between key and value where they come from."""
        for key, value in values.items():
            known, path = self.get(key), f"{prefix}{key}"
            if isinstance(known, CfgNode) and isinstance(value, dict):
                Config._refuse_misplaced(known, value, f"{path}.", between)
            elif isinstance(known, CfgNode):
                raise ValueError(f"{path}: expected keys below it, e.g. {path}.{next(iter(known))}; found the value {value!r}.")
            elif key in self and isinstance(value, dict):
                raise ValueError(f"{path}: expected a value such as {known!r}; found keys: {', '.join(map(str, value))}.")
            elif key in self and not same_type(known, found := self._decode_cfg_value(value)):
                example = f"{path}{between}{like(known, found)}"
                raise ValueError(f"{path} takes {KINDS[type(known)]}, as in {example}; found {found!r}.")

    def _explain(self, error: Exception) -> str:
        text = one_line(error)
        if "Non-existent" not in text:
            return text
        wrong = text.split(": ")[-1].strip("'\" ")
        close = difflib.get_close_matches(wrong, self.keys_in_full(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        return f"there is no key {wrong}.{hint}"


def same_type(known, found) -> bool:
    """Whether a key that holds ``known`` takes ``found``. True for types that are not in KINDS, which are left to yacs."""
    if type(known) not in KINDS or found is None:
        return True
    return type(found) is type(known) or (isinstance(known, (tuple, list)) and isinstance(found, (tuple, list)))


def like(known, found) -> str:
    """A value of ``known``'s type, close to ``found`` where that can be, as a shell and a YAML file take it."""
    if isinstance(known, str):
        return f"'{written(str(found))}'"
    if isinstance(known, float) and type(found) is int:
        return written(float(found))
    if isinstance(known, (tuple, list)):
        if isinstance(found, str) and all(isinstance(item, str) for item in known):
            known = type(known)(re.findall(r"[^\s,()\[\]'\"]+", found))
        elif isinstance(found, (int, float)) and all(type(item) is type(found) for item in known):
            known = type(known)([found])
        return f"'{written(known)}'"
    return written(known)


def written(value) -> str:
    """A plain value as Python reads it, with double quotes: a shell's single quotes fit around it."""
    if isinstance(value, tuple):
        return f"({', '.join(map(written, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def one_line(error: Exception) -> str:
    """The message of an exception as one line without the quotes that KeyError adds."""
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())


def add_common_config(cfg: CfgNode) -> None:
    """Add the keys that all papers share to ``cfg``."""
    # Trainer by its registered name: "StandardTrainer", or one that a paper registers.
    cfg.SOLVER.TRAINER = "StandardTrainer"
    # "SGD" (MOMENTUM, NESTEROV) or "AdamW"; weight decay, bias and norm rules and clipping are Detectron2's.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Batches of IMS_PER_BATCH images whose gradients are averaged for one step, which is one iteration; losses are their means.
    cfg.SOLVER.ACCUMULATE = 1
    # What SOLVER.AMP.ENABLED computes in on a GPU: "float16" (with loss scaling) or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"
    # How many periodic checkpoints stay on disk; the final and the best one are kept beside them.
    cfg.SOLVER.CHECKPOINTS_KEPT = 3
    # Every RoIAlign of the model by this project's operator (SgRoIAlign without a map): the same within rounding, and faster.
    # It is exchanged in the built model, so DefaultPredictor, which builds its own, runs Detectron2's.
    cfg.MODEL.FAST_ROI_ALIGN = False
    # Data set mapper by its registered name.
    cfg.INPUT.MAPPER = "InstanceMapper"
    # Your own data in COCO format without a line of code: [[name, annotations.json, image folder], ...].
    cfg.DATASETS.REGISTER = []
    # Evaluate the training losses on DATASETS.TEST too, at every TEST.EVAL_PERIOD (no augmentation, BN in eval mode).
    cfg.TEST.VALIDATION_LOSS = False
    # Keep the checkpoint with the highest value of this metric as model_best.pth, e.g. "segm/AP"; "" keeps none.
    cfg.TEST.BEST_METRIC = ""
    # How many pictures (ground truth beside prediction) an evaluation leaves.
    cfg.TEST.PICTURES = 8
    # Progress lines, metrics.json and TensorBoard get a record every so many iterations.
    cfg.SOLVER.LOG_PERIOD = 20
