#!/usr/bin/env python3
"""Install Detectron2 0.6 as a pure-Python wheel that works with current libraries.

Detectron2 is not published under its own name. The source distribution `pb1-detectron2` holds the Python code
of the release v0.6 with its model-zoo configs, but not its C++ sources, so that its own build fails, and its
code is older than the libraries of today. This tool downloads it with pip (the hash is checked before any of
it runs), applies the replacements of PATCHES, writes the wheel `detectron2-0.6+py` and installs it. What is
written in C++ (rotated boxes, deformable convolution, fast COCO evaluation) says so when it is used.

A Detectron2 that can be imported already, for instance the official main branch, is left alone.

    python tools/install_detectron2.py                      # torch must be installed first
    python tools/install_detectron2.py --wheel-dir wheels   # keeps the wheel, for machines without a network
    python tools/install_detectron2.py --force              # replaces whatever is there
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

SDIST = "pb1-detectron2==0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
NAME, VERSION = "detectron2", "0.6+py"
WHEEL_NAME = f"{NAME}-{VERSION}-py3-none-any.whl"
DIST_INFO = f"{NAME}-{VERSION}.dist-info"

# Folder of the sdist -> folder of the wheel.
FOLDERS = {
    "detectron2": "detectron2",
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}
# Requirements of the sdist that no code of Detectron2 needs to run; the extras go too (one of them is a URL).
DROPPED_REQUIREMENTS = ("black", "future", "pydot")


class InstallError(Exception):
    """Detectron2 cannot be installed; the message says what was expected, what was found and what to do."""


class Patch(NamedTuple):
    """`old`, found exactly `count` times in the wheel's `file`, becomes `new`."""

    file: str
    old: str
    new: str
    count: int = 1


_IMPORT_C = "from detectron2 import _C\n"
_IMPORT_C_OR_MISSING = """\
try:
    from detectron2 import _C
except ImportError:
    from detectron2.layers._missing_ops import _C
"""

PATCHES = (
    # Pillow 10 removed the alias; fatal when Detectron2 is imported.
    Patch("detectron2/data/transforms/transform.py", "interp=Image.LINEAR", "interp=Image.BILINEAR"),
    # NumPy 1.24 removed the aliases of Python's own types.
    Patch("detectron2/data/build.py", "dtype=np.int)", "dtype=int)", 1),
    Patch("detectron2/data/build.py", "dtype=np.int\n", "dtype=int\n", 1),
    Patch("detectron2/data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)"),
    Patch("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 2),
    Patch("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.float)", "dtype=float)", 2),
    Patch("detectron2/evaluation/sem_seg_evaluation.py", ".astype(np.float)", ".astype(float)", 3),
    Patch("detectron2/evaluation/pascal_voc_evaluation.py", ".astype(np.bool)", ".astype(bool)", 2),
    Patch("detectron2/structures/masks.py", ".astype(np.bool)", ".astype(bool)", 2),
    Patch("detectron2/structures/masks.py", "dtype=np.bool)", "dtype=bool)"),
    Patch("detectron2/utils/visualizer.py", ".astype(np.bool)", ".astype(bool)", 3),
    Patch("detectron2/utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)"),
    # NumPy 2 raises where copy=False needs a copy.
    Patch("detectron2/layers/mask_ops.py", "np.array(mask, copy=False)", "np.asarray(mask)"),
    # Python 3.11 samples from sequences only.
    Patch(
        "detectron2/data/common.py",
        "sample(self._fallback_candidates, k=1)",
        "sample(list(self._fallback_candidates), k=1)",
    ),
    # The base class of all schedulers has been public since PyTorch 2.0; new schedulers derive from it alone.
    Patch("detectron2/engine/hooks.py", "lr_scheduler._LRScheduler)", "lr_scheduler.LRScheduler)", 2),
    # setuptools 82 removed pkg_resources.
    Patch("detectron2/model_zoo/model_zoo.py", "import os\n", "import importlib.resources\nimport os\n"),
    Patch("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", ""),
    Patch(
        "detectron2/model_zoo/model_zoo.py",
        """\
    cfg_file = pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )
""",
        """\
    cfg_file = str(importlib.resources.files("detectron2.model_zoo") / "configs" / config_path)
""",
    ),
    # Without the C++ library: the modules import, and using an operator raises an error that explains itself.
    Patch("detectron2/layers/deform_conv.py", _IMPORT_C, _IMPORT_C_OR_MISSING),
    Patch("detectron2/layers/roi_align_rotated.py", _IMPORT_C, _IMPORT_C_OR_MISSING),
    Patch("detectron2/layers/rotated_boxes.py", _IMPORT_C, _IMPORT_C_OR_MISSING),
    Patch("detectron2/evaluation/fast_eval_api.py", _IMPORT_C, _IMPORT_C_OR_MISSING),
    Patch(
        "detectron2/evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        """\
try:
    from detectron2 import _C  # noqa: F401  (the fast evaluation is written in C++)
    from detectron2.evaluation.fast_eval_api import COCOeval_opt
except ImportError:
    COCOeval_opt = COCOeval
""",
    ),
    # The exporters of api.py need caffe2, which PyTorch no longer has; tracing and scripting do not.
    Patch(
        "detectron2/export/__init__.py",
        "from .api import *\n",
        """\
try:
    from .api import *
except ImportError:  # caffe2
    pass
""",
    ),
    # Rounding may leave [0, 1], which matplotlib refuses.
    Patch(
        "detectron2/utils/visualizer.py",
        """\
        modified_color = colorsys.hls_to_rgb(polygon_color[0], modified_lightness, polygon_color[2])
        return modified_color
""",
        """\
        modified_color = colorsys.hls_to_rgb(polygon_color[0], modified_lightness, polygon_color[2])
        return tuple(min(max(channel, 0.0), 1.0) for channel in modified_color)
""",
    ),
    # The default is deprecated: a warning in every run.
    Patch(
        "detectron2/modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
)

NEW_FILES = {
    "detectron2/layers/_missing_ops.py": '''\
"""Stands in for detectron2._C in the pure-Python wheel."""


class _MissingOps:
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            f"The operator '{name}' belongs to Detectron2's C++ library, which this pure-Python wheel of "
            "Detectron2 0.6 does not have. Install Detectron2 from its main branch to use it."
        )


_C = _MissingOps()
''',
}

# What an installed Detectron2 must be able to import to be left alone; prints its version and where it is.
PROBE = """
import importlib.metadata, detectron2, detectron2.engine, detectron2.model_zoo
try:
    version = importlib.metadata.version("detectron2")
except importlib.metadata.PackageNotFoundError:
    version = detectron2.__version__
try:
    from detectron2 import _C
    library = "with its C++ library"
except ImportError:
    library = "pure Python"
print(version, "(" + library + ") in", list(detectron2.__path__)[0])
"""


def apply_patches(files: dict[str, bytes], patches: tuple[Patch, ...] = PATCHES) -> dict[str, bytes]:
    """Return `files` (path in the wheel -> content) with every patch applied.

    Raises:
        InstallError: a file is missing, or does not hold the text to replace exactly as often as expected.
    """
    files = dict(files)
    for patch in patches:
        if patch.file not in files:
            raise InstallError(f"{patch.file}: this file is to be patched, but the source does not have it.")
        text = files[patch.file].decode()
        found = text.count(patch.old)
        if found != patch.count:
            raise InstallError(
                f"{patch.file}: expected {patch.count} time(s), found {found} time(s) the text\n{patch.old}\n"
                "Either this is not the source that the patches are for, or PATCHES needs an update."
            )
        files[patch.file] = text.replace(patch.old, patch.new).encode()
    return files


def read_sdist(path: Path) -> dict[str, bytes]:
    """Read all regular files of a source distribution: path below its top folder -> content."""
    files = {}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            if member.isfile():
                name = PurePosixPath(member.name)
                files["/".join(name.parts[1:])] = archive.extractfile(member).read()
    return files


def kept_requirements(requires_txt: str) -> list[str]:
    """Return the unconditional requirements of an egg-info's requires.txt without DROPPED_REQUIREMENTS.

    Raises:
        InstallError: one of those is not there.
    """
    unconditional = requires_txt.partition("\n[")[0].split("\n")
    requirements = [line.strip() for line in unconditional if line.strip()]
    for name in DROPPED_REQUIREMENTS:
        matches = [r for r in requirements if r == name or r.startswith(f"{name}=")]
        if len(matches) != 1:
            raise InstallError(f"Expected one requirement '{name}' to drop, found {len(matches)}: {requirements}")
        requirements.remove(matches[0])
    return requirements


def wheel_content(sdist: dict[str, bytes]) -> dict[str, bytes]:
    """Return the wheel's files (path -> content, RECORD included) made of the source distribution's files."""
    files = {}
    for source, target in FOLDERS.items():
        names = [name for name in sdist if name.startswith(f"{source}/")]
        if not names:
            raise InstallError(f"The source distribution has no folder {source}.")
        files |= {target + name.removeprefix(source): sdist[name] for name in names}
    files = apply_patches(files) | {name: text.encode() for name, text in NEW_FILES.items()}

    requirements = kept_requirements(sdist["pb1_detectron2.egg-info/requires.txt"].decode())
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {NAME}",
        f"Version: {VERSION}",
        "Summary: Detectron2 0.6 in pure Python, changed to work with current libraries",
        "Home-page: https://github.com/facebookresearch/detectron2",
        "Author: FAIR",
        "License: Apache-2.0",
        "Requires-Python: >=3.10",
        *(f"Requires-Dist: {requirement}" for requirement in requirements),
        "",
        f"Made from the source distribution {SDIST}. These files were changed or added:",
        "",
        *sorted({f"- {patch.file}" for patch in PATCHES} | {f"- {name}" for name in NEW_FILES}),
        "",
    ]
    wheel = "Wheel-Version: 1.0\nGenerator: install_detectron2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{DIST_INFO}/METADATA"] = "\n".join(metadata).encode()
    files[f"{DIST_INFO}/WHEEL"] = wheel.encode()
    files[f"{DIST_INFO}/top_level.txt"] = f"{NAME}\n".encode()
    files[f"{DIST_INFO}/LICENSE"] = sdist["LICENSE"]

    record = [f"{name},{_record_hash(content)},{len(content)}" for name, content in sorted(files.items())]
    record += [f"{DIST_INFO}/RECORD,,", ""]
    files[f"{DIST_INFO}/RECORD"] = "\n".join(record).encode()
    return files


def _record_hash(content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    return "sha256=" + digest.rstrip(b"=").decode()


def write_wheel(sdist: Path, folder: Path) -> Path:
    """Write the wheel for the source distribution `sdist` into `folder` and return its path.

    The same input gives the same bytes on every machine: sorted names, one date, no compression.
    """
    content = wheel_content(read_sdist(sdist))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WHEEL_NAME
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(content):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, so that the permissions below count
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content[name])
    return path


def download_sdist(folder: Path) -> Path:
    """Download the source distribution with pip, which checks its hash, and return its path."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
    options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--require-hashes"]
    _pip(
        ["download", *options, "--dest", str(folder), "-r", str(requirement)],
        "The source of Detectron2 could not be downloaded. This needs a network and, in this environment, "
        "torch, setuptools below 82 and pip below 26; `make setup` installs them.",
    )
    (path,) = folder.glob("pb1*detectron2-0.6.tar.gz")
    return path


def _pip(arguments: list[str], what_failed: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise InstallError(f"{what_failed}\npip's last words:\n{(result.stdout + result.stderr)[-3000:]}")


def find_detectron2() -> tuple[str | None, str | None]:
    """Look for Detectron2 here: (what was found, None), (None, why its import fails) or (None, None)."""
    # Elsewhere, so that a folder named detectron2 in the working directory is not taken for the package.
    with tempfile.TemporaryDirectory() as elsewhere:
        there = "import importlib.util, sys; sys.exit(importlib.util.find_spec('detectron2') is None)"
        if subprocess.run([sys.executable, "-c", there], cwd=elsewhere).returncode:
            return None, None
        probe = subprocess.run([sys.executable, "-c", PROBE], cwd=elsewhere, capture_output=True, text=True)
    if probe.returncode:
        return None, probe.stderr.strip().split("\n")[-1]
    return probe.stdout.strip().split("\n")[-1], None


def install(force: bool = False, wheel_dir: Path | None = None) -> str:
    """Install Detectron2 where none is, and return a sentence that says what was done.

    Args:
        force: replace an installed Detectron2.
        wheel_dir: write the wheel there and keep it, even where Detectron2 is installed already.
    """
    found, failure = find_detectron2()
    if failure and not force:
        raise InstallError(
            f"A Detectron2 is installed here but cannot be imported: {failure}\n"
            "Repair it, remove it, or replace it with --force."
        )
    if found and not force and wheel_dir is None:
        return f"Detectron2 is installed already and left alone: {found}"

    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        wheel = write_wheel(download_sdist(scratch), wheel_dir or scratch)
        kept = f" The wheel is {wheel}." if wheel_dir else ""
        if found and not force:
            return f"Detectron2 is installed already and left alone: {found}.{kept}"
        _pip(
            ["install", "--no-deps", "--no-index", "--force-reinstall", str(wheel)],
            "The wheel of Detectron2 could not be installed.",
        )
    found, failure = find_detectron2()
    if not found:
        raise InstallError(f"Detectron2 was installed but cannot be imported: {failure or 'it is not found'}")
    return f"Detectron2 was installed: {found}.{kept}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog="A Detectron2 that can be imported already is left alone.",
    )
    parser.add_argument("--force", action="store_true", help="replace a Detectron2 that is installed already")
    parser.add_argument("--wheel-dir", type=Path, metavar="DIR", help="write the wheel into DIR and keep it")
    options = parser.parse_args(arguments)
    try:
        print(install(options.force, options.wheel_dir))
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
