"""The Detectron2 wheel (patches, content, when it is installed), and what setup.py and the Makefile do."""

import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

REPO = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def load_tool():
    spec = importlib.util.spec_from_file_location("install_detectron2", REPO / "tools" / "install_detectron2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()

REQUIRES = """\
fvcore<0.1.6,>=0.1.5
future
pydot
omegaconf>=2.1
black==21.4b2

[:python_version < "3.7"]
dataclasses

[all]
panopticapi@ https://example.org/panopticapi.zip
"""


def source_files() -> dict[str, str]:
    """The smallest source that every patch fits: path in the source distribution -> text."""
    files = {
        "LICENSE": "Apache License",
        "pb1_detectron2.egg-info/requires.txt": REQUIRES,
        "setup.py": "raise SystemExit('not part of the wheel')\n",
        "detectron2/model_zoo/configs/Base.yaml": "MODEL: {}\n",
        "projects/PointRend/point_rend/__init__.py": "",
        "projects/DeepLab/deeplab/__init__.py": "",
        "projects/Panoptic-DeepLab/panoptic_deeplab/__init__.py": "",
    }
    for patch in tool.PATCHES:
        files[patch.file] = files.get(patch.file, "") + patch.old * patch.count
    return files


def write_sdist(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def sdist(tmp_path) -> Path:
    return write_sdist(tmp_path / "pb1-detectron2-0.6.tar.gz", source_files())


# ---- Patches


def test_patches_replace_exactly_the_expected_occurrences():
    patches = (tool.Patch("a.py", "np.int)", "int)", 2), tool.Patch("a.py", "x = 1", "x = 2"))
    patched = tool.apply_patches({"a.py": b"f(np.int) g(np.int) x = 1", "b.py": b"np.int)"}, patches)
    assert patched == {"a.py": b"f(int) g(int) x = 2", "b.py": b"np.int)"}


@pytest.mark.parametrize(("text", "found"), [("dtype=int", 0), ("np.int np.int", 2)])
def test_a_patch_fails_loudly_on_changed_text(text, found):
    patch = tool.Patch("detectron2/a.py", "np.int", "int")
    with pytest.raises(tool.InstallError, match=rf"detectron2/a\.py: expected 1 .* found {found} .*\nnp\.int\n"):
        tool.apply_patches({"detectron2/a.py": text.encode()}, (patch,))


def test_a_patch_fails_loudly_on_a_missing_file():
    with pytest.raises(tool.InstallError, match="gone.py"):
        tool.apply_patches({}, (tool.Patch("gone.py", "a", "b"),))


@pytest.mark.parametrize("index", range(len(tool.PATCHES)))
def test_every_patch_of_the_table_is_required(index, tmp_path):
    files, patch = source_files(), tool.PATCHES[index]
    files[patch.file] = files[patch.file].replace(patch.old, "something else\n")
    with pytest.raises(tool.InstallError, match=patch.file):
        tool.write_wheel(write_sdist(tmp_path / "changed.tar.gz", files), tmp_path)
    assert not list(tmp_path.glob("*.whl"))


def test_requirements_that_are_to_be_dropped_must_be_there():
    assert tool.kept_requirements(REQUIRES) == ["fvcore<0.1.6,>=0.1.5", "omegaconf>=2.1"]
    with pytest.raises(tool.InstallError, match="pydot"):
        tool.kept_requirements(REQUIRES.replace("pydot\n", ""))


# ---- The wheel


def test_wheel_has_the_packages_the_configs_and_the_metadata(sdist, tmp_path):
    wheel = tool.write_wheel(sdist, tmp_path / "wheels")
    assert wheel.name == "detectron2-0.6+py-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}

    assert "detectron2/model_zoo/configs/Base.yaml" in content
    for project in ("point_rend", "deeplab", "panoptic_deeplab"):
        assert f"detectron2/projects/{project}/__init__.py" in content
    assert not [name for name in content if not name.startswith(("detectron2/", "detectron2-0.6+py.dist-info/"))]
    assert b"np.bool" not in content["detectron2/structures/masks.py"]
    assert content["detectron2-0.6+py.dist-info/LICENSE"] == b"Apache License"

    metadata = Parser().parsestr(content["detectron2-0.6+py.dist-info/METADATA"].decode())
    assert (metadata["Name"], metadata["Version"]) == ("detectron2", "0.6+py")
    assert metadata.get_all("Requires-Dist") == ["fvcore<0.1.6,>=0.1.5", "omegaconf>=2.1"]
    assert SpecifierSet(">=0.6").contains(metadata["Version"])

    recorded = {row[0]: row for row in csv.reader(io.StringIO(content["detectron2-0.6+py.dist-info/RECORD"].decode()))}
    assert recorded.keys() == content.keys()
    for name, (_, digest, size) in recorded.items():
        if name.endswith("/RECORD"):
            continue
        expected = base64.urlsafe_b64encode(hashlib.sha256(content[name]).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={expected}", len(content[name]))


def test_wheel_has_the_same_bytes_twice(sdist, tmp_path):
    again = write_sdist(tmp_path / "again.tar.gz", dict(reversed(source_files().items())))
    first, second = tool.write_wheel(sdist, tmp_path / "1"), tool.write_wheel(again, tmp_path / "2")
    assert first.read_bytes() == second.read_bytes()
    entries = zipfile.ZipFile(first).infolist()
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}


def test_pip_installs_the_wheel(sdist, tmp_path):
    wheel = tool.write_wheel(sdist, tmp_path)
    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    assert (target / "detectron2" / "model_zoo" / "configs" / "Base.yaml").is_file()
    (found,) = importlib.metadata.distributions(name="detectron2", path=[str(target)])
    assert found.version == "0.6+py"


def test_missing_operators_explain_themselves():
    namespace = {}
    exec(tool.NEW_FILES["detectron2/layers/_missing_ops.py"], namespace)
    with pytest.raises(RuntimeError, match="'nms_rotated'.*main branch"):
        namespace["_C"].nms_rotated(1, 2)
    assert not hasattr(namespace["_C"], "__path__")


# ---- When it is installed


def nothing_to_download(*_):
    raise AssertionError("nothing is to be downloaded")


def test_an_existing_detectron2_is_left_alone(monkeypatch):
    monkeypatch.setattr(tool, "find_detectron2", lambda: ("0.6 (with its C++ library) in /somewhere", None))
    monkeypatch.setattr(tool, "download_sdist", nothing_to_download)
    message = tool.install()
    assert "left alone" in message and "/somewhere" in message


def test_the_detectron2_of_these_tests_is_found(capsys, monkeypatch):
    monkeypatch.setattr(tool, "download_sdist", nothing_to_download)
    assert tool.main([]) == 0
    assert "left alone" in capsys.readouterr().out


def test_a_broken_detectron2_is_not_replaced_without_force(monkeypatch, capsys):
    monkeypatch.setattr(tool, "find_detectron2", lambda: (None, "AttributeError: Image has no LINEAR"))
    monkeypatch.setattr(tool, "download_sdist", nothing_to_download)
    assert tool.main([]) == 2
    error = capsys.readouterr().err
    assert "LINEAR" in error and "--force" in error


def test_force_and_wheel_dir(monkeypatch, sdist, tmp_path):
    commands = []
    monkeypatch.setattr(tool, "find_detectron2", lambda: ("0.6 in /somewhere", None))
    monkeypatch.setattr(tool, "download_sdist", lambda folder: sdist)
    monkeypatch.setattr(tool, "_pip", lambda arguments, _: commands.append(arguments))

    message = tool.install(wheel_dir=tmp_path / "kept")
    assert "left alone" in message and commands == []
    assert (tmp_path / "kept" / tool.WHEEL_NAME).is_file()

    assert "was installed" in tool.install(force=True)
    (command,) = commands
    assert command[0] == "install" and "--no-deps" in command and "--force-reinstall" in command


def test_pip_failures_are_one_message(tmp_path):
    with pytest.raises(tool.InstallError, match="(?s)^It failed.*no-such-file"):
        tool._pip(["install", "--no-index", str(tmp_path / "no-such-file.whl")], "It failed.")


@pytest.mark.slow
def test_the_published_source_becomes_a_working_wheel(tmp_path):
    """Needs a network."""
    wheel = tool.write_wheel(tool.download_sdist(tmp_path), tmp_path / "wheels")
    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    check = """
import warnings; warnings.simplefilter("error"); warnings.filterwarnings("ignore", ".*torch.jit.script")
import detectron2, detectron2.engine, detectron2.export, detectron2.utils.analysis
import detectron2.projects.point_rend, detectron2.projects.deeplab
from detectron2 import model_zoo
from detectron2.export import TracingAdapter
from detectron2.evaluation.coco_evaluation import COCOeval, COCOeval_opt
assert COCOeval_opt is COCOeval
assert model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml").MODEL.MASK_ON
print(detectron2.__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(target)}
    result = subprocess.run([sys.executable, "-c", check], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(target / "detectron2" / "__init__.py")


# ---- setup.py


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what setup.py needs, with a paper's package and without C++ sources."""
    root = tmp_path / "checkout"
    shutil.copytree(REPO / "projects", root / "projects", ignore=shutil.ignore_patterns("csrc", "*.so", "__pycache__"))
    shutil.copytree(REPO / "configs", root / "configs")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "requirements.txt", "Makefile"):
        shutil.copy(REPO / name, root / name)
    (root / "tools").mkdir()
    shutil.copy(REPO / "tools" / "install_detectron2.py", root / "tools")
    (root / "maskplus" / "heads").mkdir(parents=True)
    (root / "maskplus" / "__init__.py").write_text("")
    (root / "maskplus" / "heads" / "__init__.py").write_text("")
    return root


def run_in(folder: Path, *command, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True)


def build(checkout: Path, hook: str) -> Path:
    """Run a hook of setuptools' build backend and return the wheel."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}('dist'))"
    result = run_in(checkout, sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    return checkout / "dist" / result.stdout.split()[-1]


def test_an_installed_copy_has_packages_papers_and_configs(checkout):
    wheel = build(checkout, "build_wheel")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(REPO).as_posix() for path in (REPO / "projects").rglob("*.py")}
    configs = {f"projects/{path.relative_to(REPO).as_posix()}" for path in (REPO / "configs").rglob("*.yaml")}
    assert modules <= names
    assert configs and configs <= names
    assert {"maskplus/__init__.py", "maskplus/heads/__init__.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "tools", "configs"))]


def test_an_editable_installation_puts_the_checkout_on_the_path(checkout):
    with zipfile.ZipFile(build(checkout, "build_editable")) as archive:
        (pth,) = [name for name in archive.namelist() if name.endswith(".pth")]
        assert Path(archive.read(pth).decode().strip()).resolve() == checkout.resolve()
        assert not [name for name in archive.namelist() if name.endswith(".yaml")]


def test_pins_are_exact_and_within_the_ranges(checkout):
    with zipfile.ZipFile(build(checkout, "build_editable")) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    ranges = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    lines = [line.partition("#")[0].strip() for line in (REPO / "requirements.txt").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line]
    assert all(python in SpecifierSet(metadata["Requires-Python"]) for python in PYTHONS)
    for python in PYTHONS:
        environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": "cityscapes"}
        valid = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
        versions = {pin.name.lower(): str(pin.specifier).removeprefix("==") for pin in valid}
        assert len(versions) == len(valid), "a package is pinned twice"
        assert all(str(pin.specifier).startswith("==") and "*" not in str(pin.specifier) for pin in valid)
        for needed in ranges:
            applies = needed.marker is None or needed.marker.evaluate(environment)
            if applies and needed.name != "detectron2":
                assert needed.specifier.contains(versions[needed.name.lower()]), needed


def add_source(checkout: Path, text: str):
    (checkout / "projects" / "layers" / "csrc").mkdir(parents=True)
    (checkout / "projects" / "layers" / "csrc" / "toy.cpp").write_text(text)


def test_without_torch_the_build_says_what_to_do(checkout, tmp_path):
    add_source(checkout, "#error")
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    result = run_in(checkout, sys.executable, "setup.py", "--name", PYTHONPATH=str(tmp_path))
    assert result.returncode
    assert "no torch here" in result.stderr and "--no-build-isolation" in result.stderr
    switched_off = run_in(checkout, sys.executable, "setup.py", "--name", PYTHONPATH=str(tmp_path), NO_EXT="1")
    assert switched_off.returncode == 0
    assert switched_off.stdout.split()[-1] == "detectron2-instance-papers"


@pytest.mark.parametrize(
    ("visible", "switch", "with_cuda"),
    [(True, "", True), (True, "0", False), (True, "1", True), (False, "", False), (False, "0", False), (False, "1", True)],
)
def test_which_kernels_are_built(checkout, monkeypatch, visible, switch, with_cuda):
    found = {}
    add_source(checkout, "#error")
    monkeypatch.chdir(checkout)  # setup.py changes there too
    monkeypatch.setenv("FORCE_CUDA", switch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: visible)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/nowhere/cuda")
    monkeypatch.setattr("setuptools.setup", lambda **arguments: found.update(arguments))
    runpy.run_path(str(checkout / "setup.py"))
    (extension,) = found["ext_modules"]
    assert (("WITH_CUDA", None) in extension.define_macros) == with_cuda


@pytest.mark.slow
def test_a_failing_build_of_the_extension_is_loud(checkout):
    add_source(checkout, "#error this does not compile")
    result = run_in(checkout, sys.executable, "setup.py", "build_ext", "--inplace")
    assert result.returncode
    assert "this does not compile" in result.stdout + result.stderr
    assert "NO_EXT=1" in result.stderr.strip().splitlines()[-1]
    assert run_in(checkout, sys.executable, "setup.py", "build_ext", "--inplace", NO_EXT="1").returncode == 0


TOY = """
#include <Python.h>
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
at::Tensor threads(const at::Tensor& x) {
  auto out = at::zeros({x.numel()}, at::kLong);
  auto* p = out.data_ptr<int64_t>();
  at::parallel_for(0, x.numel(), 1, [&](int64_t begin, int64_t end) {
    for (auto i = begin; i < end; ++i) p[i] = at::get_thread_num();
  });
  return out;
}
TORCH_LIBRARY(toy_of_test_install, m) { m.def("threads(Tensor x) -> Tensor", &threads); }
extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
"""


@pytest.mark.slow
def test_the_extension_builds_and_uses_the_threads_of_torch(checkout):
    add_source(checkout, TOY)
    built = run_in(checkout, sys.executable, "setup.py", "build_ext", "--inplace")
    assert built.returncode == 0, built.stderr
    (library,) = (checkout / "projects" / "layers").glob("_C*.so")
    code = f"""
import torch
torch.set_num_threads(2)
torch.ops.load_library({str(library)!r})
print(torch.ops.toy_of_test_install.threads(torch.zeros(4)).tolist())
"""
    result = run_in(checkout, sys.executable, "-c", code, OMP_NUM_THREADS="2")
    assert result.stdout.strip() == "[0, 0, 1, 1]", result.stderr


# ---- Makefile


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def make(folder: Path, *arguments) -> subprocess.CompletedProcess:
    if not shutil.which("make"):
        pytest.skip("needs make")
    return run_in(folder, "make", *arguments, MAKEFLAGS="", NO_EXT="", FORCE_CUDA="")


def test_make_lists_its_targets(checkout):
    listed = make(checkout).stdout
    for target in ("setup", "test", "test-slow", "lint", "bench", "demo", "clean"):
        assert f"make {target} " in listed


def test_make_setup_names_what_is_wrong_with_the_interpreter(checkout, tmp_path):
    missing = make(checkout, "setup", "PYTHON=no-such-python")
    assert missing.returncode == 2 and "no interpreter 'no-such-python'" in missing.stderr

    old = script(tmp_path / "old", '[ "$1" = --version ] && echo Python 3.9.2 || exit 1')
    result = make(checkout, "setup", f"PYTHON={old}")
    assert result.returncode == 2 and "is Python 3.9.2; Python 3.10 to 3.13 are supported" in result.stderr

    bare = script(tmp_path / "bare", f'case "$2" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac')
    result = make(checkout, "setup", f"PYTHON={bare}")
    assert result.returncode == 2 and "python3-venv" in result.stderr
    assert not (checkout / ".venv").exists()


@pytest.fixture
def made_checkout(checkout) -> Path:
    """A checkout whose .venv/bin/python is a script that writes down how it is called."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    script(checkout / ".venv" / "bin" / "python", 'echo "$@" >> calls')
    return checkout


def test_make_setup_names_a_missing_compiler(made_checkout):
    result = make(made_checkout, "setup", "CXX=no-such-compiler")
    assert result.returncode == 2
    assert "no-such-compiler" in result.stderr and "NO_EXT=1" in result.stderr
    assert make(made_checkout, "setup", "CXX=no-such-compiler", "NO_EXT=1").returncode == 0


def test_make_setup_does_nothing_twice_and_follows_its_switches(made_checkout):
    def number_of_calls(*arguments):
        (made_checkout / "calls").write_text("")
        assert make(made_checkout, "setup", "CXX=true", *arguments).returncode == 0
        return len((made_checkout / "calls").read_text().splitlines())

    assert number_of_calls() == 5  # pip, requirements, Detectron2, the project, check
    assert number_of_calls() == 0
    assert number_of_calls("FORCE_CUDA=1") == 5
    assert number_of_calls("FORCE_CUDA=1") == 0
    assert number_of_calls() == 0
    os.utime(made_checkout / ".venv" / ".setup-done", (0, 0))
    assert number_of_calls() == 5
    assert number_of_calls("NO_EXT=1") == 5
    assert number_of_calls() == 0


def test_make_clean_setup_builds_the_extension_that_was_left_out(made_checkout):
    """It is the remedy of projects/doctor.py."""
    python = script(made_checkout / ".venv" / "bin" / "python", 'echo "NO_EXT=$NO_EXT $@" >> calls')
    assert make(made_checkout, "setup", "CXX=true", "NO_EXT=1").returncode == 0
    assert "NO_EXT=1 -m pip install --quiet --no-build-isolation" in (made_checkout / "calls").read_text()
    (made_checkout / "calls").unlink()
    assert make(made_checkout, "clean", "setup", "CXX=true").returncode == 0
    assert python.is_file() and "NO_EXT= -m pip install --quiet --no-build-isolation" in (made_checkout / "calls").read_text()
