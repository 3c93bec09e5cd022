"""Config files that hold something else than was meant: the error says what was expected and what was found."""

import pytest

from projects import load_config
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
