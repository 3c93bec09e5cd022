"""tools/: scripts that run from a checkout, installed or not."""

import re
from pathlib import Path

import pytest

from projects import PROJECTS

TOOLS = sorted((Path(__file__).resolve().parent.parent / "tools").glob("*.py"))
OWN_IMPORT = re.compile(rf"^from ({'|'.join(['projects', *PROJECTS])})\b", re.MULTILINE)
FINDS_THE_CHECKOUT = re.compile(r"^sys\.path\.insert\(0, str\(Path\(__file__\)\.resolve\(\)\.parents?\b", re.MULTILINE)


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_finds_the_checkout_before_it_imports_from_it(path):
    text = path.read_text()
    first = OWN_IMPORT.search(text)
    assert first is None or FINDS_THE_CHECKOUT.search(text, 0, first.start())
