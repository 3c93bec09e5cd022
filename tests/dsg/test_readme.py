"""dsg/README.md names what is there."""

import re
from pathlib import Path

from projects import get_cfg

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "dsg/README.md").read_text()


def test_configs_tools_keys_and_tests_exist():
    configs = set(re.findall(r"(?:baseline|dsg)/\w+\.yaml", README))
    assert not [name for name in configs if not (REPO / "configs" / name).is_file()]
    assert {f"dsg/{path.name}" for path in (REPO / "configs/dsg").glob("*.yaml")} <= configs
    assert all((REPO / name).is_file() for name in re.findall(r"tools/\w+\.py", README))
    assert not [key for key in get_cfg().MODEL.DSG if f"`{key}`" not in README]
    tests = "".join(path.read_text() for path in (REPO / "tests/dsg").glob("test_*.py"))
    named = re.findall(r"`(test_\w+?)(?:_?\.\.\.)?`", README)
    assert len(named) > 5 and not [name for name in named if f"def {name}" not in tests]
