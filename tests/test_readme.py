"""The commands and snippets of the READMEs and docs fit the project: scripts, flags, configs, keys, targets, imports."""

import ast
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser

from projects import get_cfg

REPO = Path(__file__).resolve().parent.parent
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("*/README.md"), *REPO.glob("docs/*.md")])


@functools.cache
def known_keys() -> set[str]:
    return set(get_cfg().keys_in_full())


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every command, in blocks of shell and in backticks, without comments and the variables before it."""
    text = page.read_text()
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`((?:python|make|torchrun) [^`]*)`", prose.replace("\n", " "))
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words and words[0] in ("python", "torchrun", "make"):
            found.append(words)
    return found


ALL = [(page, words) for page in PAGES for words in commands(page)]
IDS = [f"{page.relative_to(REPO)}: {' '.join(words)}"[:90] for page, words in ALL]


def test_there_are_commands():
    assert len(ALL) > 40 and {words[0] for _, words in ALL} == {"python", "torchrun", "make"}


@pytest.mark.parametrize(("page", "words"), ALL, ids=IDS)
def test_command_fits_the_project(page, words):
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):.*##", (REPO / "Makefile").read_text(), flags=re.MULTILINE)
        named = [word for word in words[1:] if "=" not in word]
        assert named and set(named) <= set(targets)
    elif "-m" in words[:2]:
        importlib.import_module(words[2])
    else:
        script = next(word for word in words if word.endswith(".py"))
        assert (REPO / script).is_file(), f"there is no {script}"
        source = (REPO / script).read_text() + default_argument_parser().format_help() * (script == "train_net.py")
        arguments = words[words.index(script) + 1 :]
        unknown = [word for word in arguments if word.startswith("--") and not re.search(rf"{word}\b", source)]
        assert not unknown, f"{script} has no {unknown}"
    configs = [path for word in words for path in re.findall(r"configs/[\w/*-]+\.yaml", word)]
    assert not [path for path in configs if not list(REPO.glob(path))]
    keys = [key for word in words for key in re.findall(r"\b(?:[A-Z][A-Z0-9_]+\.)+[A-Z][A-Z0-9_]+\b", word)]
    assert set(keys) <= known_keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize(
    "code", [code for page in PAGES for code in blocks(page, "python")], ids=lambda code: code.strip().splitlines()[0][:50]
)
def test_imports_of_snippets_are_there(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            assert all(alias.name == "train_net" or importlib.import_module(alias.name) for alias in node.names)
