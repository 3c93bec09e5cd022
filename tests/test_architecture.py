"""Who imports whom: every arrow points down, and there is no circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from projects import PROJECTS

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ["projects", *PROJECTS]


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((REPO / package).rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """The modules that a module imports, those of this project by their full name."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base)
    return found - {name}


def test_papers_and_projects_keep_apart():
    for name in MODULES:
        package = name.split(".")[0]
        others = {imported.split(".")[0] for imported in imports_of(name)} & set(PROJECTS) - {package}
        assert not others, f"{name} imports {others}"


def test_operators_need_only_torch():
    foreign = set()
    for name in MODULES:
        if name.startswith("projects.layers"):
            tops = {imported.split(".")[0] for imported in imports_of(name)}
            foreign |= tops - {"torch", "projects"} - sys.stdlib_module_names
            assert all(i.startswith("projects.layers") for i in imports_of(name) if i.startswith("projects")), name
    assert not foreign
    code = "import sys, projects.layers; sys.exit('detectron2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_no_circle():
    graph = {name: imports_of(name) & MODULES.keys() for name in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == MODULES.keys()


def test_nothing_imports_the_scripts():
    scripts = {"train_net", "demo", "tools"}
    for name in MODULES:
        assert not {imported.split(".")[0] for imported in imports_of(name)} & scripts, name
