"""Versions of everything that matters, whether they work together, and the remedy for each mismatch.

    python -m projects.doctor      # exit code 0: everything works, 1: something is broken

Each check is a function of plain values; `examine` reads those values from this machine. Where Detectron2 or
torch cannot be imported, `python projects/doctor.py` runs the same checks without importing the package.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

HERE = Path(__file__).resolve().parent
FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
# ("sm", 90): machine code for compute capability 9.0; ("ptx", 90): the driver compiles it for 9.0 and later.
Arch = tuple[Literal["sm", "ptx"], int]


class Finding(NamedTuple):
    """One row of the table. `remedy` is what to do when the state is not "ok"."""

    subject: str
    found: str
    state: Literal["ok", "note", "broken"] = "ok"
    remedy: str = ""


def as_numbers(version: str) -> tuple[int, ...]:
    """ "2.12.1+cu130" -> (2, 12, 1)."""
    return tuple(int(n) for n in re.match(r"\d+(?:\.\d+)*", version).group().split("."))


# ---- Python and its packages


def check_python(version: tuple[int, ...]) -> Finding:
    found = ".".join(map(str, version))
    if (3, 10) <= version[:2] <= (3, 13):
        return Finding("Python", found)
    return Finding("Python", found, "broken", "use Python 3.10 to 3.13: make setup PYTHON=python3.12")


def check_torch(version: str | None, cuda: str | None, failure: str | None) -> Finding:
    """`version`: None if not installed; `cuda`: what it is built for; `failure`: why it does not import."""
    install = "run `make setup`, or install torch 2.6 or later with the torchvision that belongs to it"
    if version is None:
        return Finding("torch", "not installed", "broken", install)
    if failure:
        return Finding("torch", f"{version} does not import: {failure}", "broken", install)
    found = f"{version}, built for {f'CUDA {cuda}' if cuda else 'the CPU only'}"
    if as_numbers(version) < (2, 6):
        return Finding("torch", found, "broken", install)
    return Finding("torch", found)


def check_torchvision(version: str | None, failure: str | None) -> Finding:
    """`failure`: why importing torchvision or calling one of its operators fails."""
    install = "install the torchvision that belongs to this torch, both for the same CUDA or both for the CPU"
    if version is None:
        return Finding("torchvision", "not installed", "broken", install)
    if failure:
        return Finding("torchvision", f"{version} does not work: {failure}", "broken", install)
    return Finding("torchvision", version)


def check_package(name: str, version: str | None, needed_for: str, required: bool = True) -> Finding:
    if version is not None:
        return Finding(name, version)
    state = "broken" if required else "note"
    return Finding(name, "not installed", state, f"needed for {needed_for}: pip install {name}")


def check_numpy(version: str | None, cityscapesscripts: str | None) -> Finding:
    if version is None:
        return check_package("numpy", None, "everything")
    if cityscapesscripts and as_numbers(cityscapesscripts) <= (2, 3, 0) and as_numbers(version) >= (2, 3):
        remedy = f"cityscapesscripts {cityscapesscripts} breaks on numpy 2.3 and later: pip install 'numpy<2.3'"
        return Finding("numpy", version, "broken", remedy)
    return Finding("numpy", version)


OPENCV_NAMES = (
    "opencv-python-headless",
    "opencv-python",
    "opencv-contrib-python-headless",
    "opencv-contrib-python",
)


def check_opencv(versions: dict[str, str | None]) -> Finding:
    """`versions`: of every package that contains the module cv2."""
    present = [f"{version} ({name})" for name, version in versions.items() if version]
    if not present:
        return check_package(OPENCV_NAMES[0], None, "reading images and videos")
    if len(present) > 1:
        remedy = "they overwrite each other's files: keep one of them"
        return Finding("OpenCV", ", ".join(present), "note", remedy)
    return Finding("OpenCV", present[0])


# ---- GPU


def check_gpus(
    driver: str | None,
    gpus: list[tuple[str, tuple[int, int]]],
    torch_cuda: str | None,
    torch_archs: list[str],
) -> list[Finding]:
    """Driver and GPUs against torch.

    Args:
        driver: version of the NVIDIA driver; None where there is none.
        gpus: name and compute capability of each GPU that torch sees.
        torch_cuda: CUDA version that torch was built for; None for a CPU build.
        torch_archs: as torch.cuda.get_arch_list() gives them, e.g. ["sm_90", "compute_120"].
    """
    if driver is None:
        return [Finding("GPU", "none: everything runs on the CPU")]
    if not torch_cuda:
        remedy = "install the CUDA builds of torch and torchvision to use the GPU"
        return [Finding("GPU", f"driver {driver}, but torch is built for the CPU", "broken", remedy)]
    if not gpus:
        remedy = (
            f"update the driver to one that supports CUDA {torch_cuda}, or install a torch for an older CUDA "
            "(or is CUDA_VISIBLE_DEVICES set?)"
        )
        return [Finding("GPU", f"driver {driver}, but torch sees no GPU", "broken", remedy)]
    archs = [parse_arch(name) for name in torch_archs]
    findings = []
    for index, (name, capability) in enumerate(gpus):
        found = f"{name}, compute capability {capability[0]}.{capability[1]}, driver {driver}"
        if archs and not runs_on(capability, archs):
            remedy = f"torch has kernels for {' '.join(torch_archs)} only: install one for this GPU"
            findings.append(Finding(f"GPU {index}", found, "broken", remedy))
        else:
            findings.append(Finding(f"GPU {index}", found))
    return findings


def check_nvcc(version: str | None, torch_cuda: str | None) -> Finding:
    """The CUDA compiler is needed only to build the extension with its CUDA kernels."""
    if version is None:
        return Finding("nvcc", "not found")
    if torch_cuda and as_numbers(version)[0] != as_numbers(torch_cuda)[0]:
        remedy = f"only an nvcc of CUDA {torch_cuda} builds the extension's CUDA kernels; set CUDA_HOME to it"
        return Finding("nvcc", version, "note", remedy)
    return Finding("nvcc", version)


def parse_arch(name: str) -> Arch:
    """ "sm_90a" -> ("sm", 90), "compute_120" -> ("ptx", 120)."""
    kind, number = name.split("_")
    return "sm" if kind == "sm" else "ptx", int(re.match(r"\d+", number).group())


def runs_on(capability: tuple[int, int], archs: list[Arch]) -> bool:
    """Whether a GPU runs code for `archs`: PTX that is not newer, or machine code of its own generation."""
    number = 10 * capability[0] + capability[1]
    return any(arch <= number and (kind == "ptx" or arch // 10 == capability[0]) for kind, arch in archs)


# ---- Detectron2


def check_detectron2(description: str | None, failure: str | None, library_failure: str | None) -> Finding:
    """What is installed, where from, and whether it imports.

    Args:
        description: e.g. "0.6+py (patched wheel) in <folder>"; None where Detectron2 is not installed.
        failure: why `import detectron2.engine` or `import detectron2.model_zoo` fails; None if neither does.
        library_failure: why its C++ library fails to import; None if it does not, or where there is none.
    """
    install = "python tools/install_detectron2.py"
    if description is None:
        return Finding("Detectron2", "not installed", "broken", install)
    if failure:
        remedy = f"repair it, or replace it: {install} --force"
        if "pkg_resources" in failure:
            remedy = f"pip install 'setuptools<82', or a patched Detectron2: {install} --force"
        elif re.search(r"LINEAR|numpy|cannot import name '_C'|caffe2", failure):
            remedy = f"it is older than the libraries beside it; a patched one: {install} --force"
        return Finding("Detectron2", f"{description} does not import: {failure}", "broken", remedy)
    if library_failure:
        remedy = f"its C++ library was built for another torch: build it again, or {install} --force"
        return Finding("Detectron2", f"{description}, library broken: {library_failure}", "broken", remedy)
    return Finding("Detectron2", description)


def describe_detectron2(version: str, source: str | None, is_main: bool, compiled: bool, folder: str) -> str:
    """`source`: address that pip recorded; `is_main`: newer than release 0.6, whose number main still has."""
    kind = "patched wheel" if version.endswith("+py") else "main branch" if is_main else "release"
    origin = f" from {source}" if source else ""
    return f"{version} ({kind}, {'with C++ library' if compiled else 'pure Python'}){origin} in {folder}"


# ---- The extension


def check_extension(
    built: list[Path],
    sources: list[Path],
    suffixes: list[str],
    failure: str | None,
    archs: list[Arch],
    capabilities: list[tuple[int, int]],
) -> Finding:
    """The C++ extension projects.layers._C.

    Args:
        built: the files _C*.so of the package.
        sources: the C++ and CUDA sources, in a checkout.
        suffixes: names of extension files that this Python loads.
        failure: why loading the file fails; None if it does not.
        archs: GPU architectures in the file; empty when it was built without CUDA.
        capabilities: compute capabilities of the GPUs here.
    """
    name, again = "extension", "build it again: make clean setup"
    usable = [path for path in built if any(path.name == f"_C{suffix}" for suffix in suffixes)]
    if not built:
        slower = "the operators run their slower PyTorch implementation; `make clean setup` builds it"
        return Finding(name, "not built", "note", slower)
    if not usable:
        found = f"built for another Python: {', '.join(path.name for path in built)}"
        return Finding(name, found, "broken", again)
    path = usable[0]
    if failure:
        remedy = f"it is damaged or was built for another torch; {again}"
        return Finding(name, f"{path.name} does not load: {failure}", "broken", remedy)
    newer = [source.name for source in sources if source.stat().st_mtime > path.stat().st_mtime]
    if newer:
        return Finding(name, f"{path.name} is older than {', '.join(newer)}", "broken", again)
    found = f"{path.name}, {'for ' + name_archs(archs) if archs else 'without CUDA'}"
    if capabilities and not archs:
        remedy = f"operators run their slower PyTorch implementation on the GPU; with nvcc, {again}"
        return Finding(name, found, "note", remedy)
    missing = [c for c in capabilities if not runs_on(c, archs)]
    if missing:
        wanted = ";".join(f"{major}.{minor}" for major, minor in sorted(set(missing)))
        remedy = f"it has no code for this GPU; {again} TORCH_CUDA_ARCH_LIST='{wanted}'"
        return Finding(name, found, "broken", remedy)
    return Finding(name, found)


def name_archs(archs: list[Arch]) -> str:
    return " ".join(f"{'sm' if kind == 'sm' else 'compute'}_{number}" for kind, number in archs)


def read_archs(library: bytes) -> list[Arch]:
    """Read the GPU architectures from the fat binaries in a shared library (what cuobjdump would list)."""
    archs, start = set(), 0
    while (start := library.find(FATBIN_MAGIC, start)) >= 0:
        if start + 16 > len(library):
            break
        header_size, size = struct.unpack_from("<HQ", library, start + 6)
        entry, end = start + header_size, start + header_size + size
        start += len(FATBIN_MAGIC)
        if header_size != 16 or end > len(library):
            continue  # the same four bytes, but not a fat binary
        while entry + 32 <= end:
            kind, entry_header, payload = struct.unpack_from("<H2xIQ", library, entry)
            (number,) = struct.unpack_from("<I", library, entry + 28)
            if kind in (1, 2):
                archs.add(("ptx" if kind == 1 else "sm", number))
            entry += entry_header + payload
            if not entry_header:
                break
    return sorted(archs, key=lambda arch: (arch[1], arch[0] == "ptx"))


# ---- Data


def check_datasets(variable: str | None, folder: Path) -> Finding:
    """`variable`: the value of DETECTRON2_DATASETS; `folder`: where the data sets are looked for."""
    name = "DETECTRON2_DATASETS"
    found = variable if variable is not None else f"not set: {folder}"
    if folder.is_dir():
        inside = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        return Finding(name, f"{found} ({inside or 'empty'})")
    if variable is not None:
        what = "is not a folder" if folder.exists() else "does not exist"
        remedy = "set it to the folder that holds coco/, cityscapes/, ..."
        return Finding(name, f"{found} {what}", "broken", remedy)
    remedy = "set it to your data sets, or make a small one: python tools/prepare_shapes.py"
    return Finding(name, found, "note", remedy)


# ---- This machine


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def why_it_fails(action) -> str | None:
    """Run `action`; return the first line of what it raises, None if it raises nothing."""
    try:
        action()
    except Exception as error:
        text = str(error).strip()
        return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]
    return None


def output_of(*command: str) -> str | None:
    """Return what a program prints; None where it is missing or fails."""
    if not shutil.which(command[0]):
        return None
    result = subprocess.run(command, capture_output=True, text=True)
    return None if result.returncode else result.stdout.strip()


def _call_a_torchvision_operator():
    import torch
    import torchvision

    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)


def why_it_does_not_load(library: Path) -> str | None:
    """Load an extension in a process of its own, because a truncated file kills the process that loads it."""
    code = "import ctypes, sys, torch; ctypes.CDLL(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True)
    if result.returncode < 0:
        return f"it crashes ({signal.Signals(-result.returncode).name})"
    return result.stderr.strip().splitlines()[-1][:200] if result.returncode else None


def _examine_detectron2() -> Finding:
    spec = importlib.util.find_spec("detectron2")
    if spec is None:
        return check_detectron2(None, None, None)
    failure = why_it_fails(lambda: [importlib.import_module(f"detectron2.{name}") for name in ("engine", "model_zoo")])
    folder = Path(next(iter(spec.submodule_search_locations)))
    compiled = any((folder / f"_C{suffix}").is_file() for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    library_failure = None
    if compiled and not failure:
        library_failure = why_it_fails(lambda: importlib.import_module("detectron2._C"))
    name = "detectron2" if version_of("detectron2") else "pb1-detectron2"
    version, source = version_of(name) or "unknown version", None
    if version_of(name):
        recorded = json.loads(importlib.metadata.distribution(name).read_text("direct_url.json") or "{}")
        source = recorded.get("url") if "vcs_info" in recorded else None
    fast_rcnn = folder / "modeling" / "roi_heads" / "fast_rcnn.py"
    is_main = fast_rcnn.is_file() and "use_fed_loss" in fast_rcnn.read_text()
    description = describe_detectron2(version, source, is_main, compiled, str(folder))
    return check_detectron2(description, failure, library_failure)


def _examine_extension(capabilities: list[tuple[int, int]]) -> Finding:
    built = sorted((HERE / "layers").glob("_C*.so"))
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    usable = [path for path in built if path.name in {f"_C{suffix}" for suffix in suffixes}]
    failure = why_it_does_not_load(usable[0]) if usable else None
    archs = read_archs(usable[0].read_bytes()) if usable else []
    sources = [path for path in (HERE / "layers" / "csrc").rglob("*") if path.is_file()]
    return check_extension(built, sources, suffixes, failure, archs, capabilities)


def examine() -> list[Finding]:
    """Run every check on this machine."""
    torch_version, torch_cuda, torch_archs, gpus = version_of("torch"), None, [], []
    torch_failure = why_it_fails(lambda: importlib.import_module("torch")) if torch_version else None
    if torch_version and not torch_failure:
        import torch

        torch_cuda = torch.version.cuda
        if torch.cuda.is_available():
            torch_archs = torch.cuda.get_arch_list()
            indices = range(torch.cuda.device_count())
            gpus = [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in indices]
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    nvcc_text = output_of(shutil.which("nvcc", path=_nvcc_path()) or "nvcc", "--version")
    nvcc = re.search(r"release ([\d.]+)", nvcc_text).group(1) if nvcc_text else None
    torchvision = version_of("torchvision")
    torchvision_failure = why_it_fails(_call_a_torchvision_operator) if torchvision else None
    cityscapes = version_of("cityscapesscripts")
    variable = os.environ.get("DETECTRON2_DATASETS")
    return [
        check_python(sys.version_info[:3]),
        check_torch(torch_version, torch_cuda, torch_failure),
        check_torchvision(torchvision, torchvision_failure),
        *check_gpus(driver.splitlines()[0] if driver else None, gpus, torch_cuda, torch_archs),
        check_nvcc(nvcc, torch_cuda),
        _examine_detectron2(),
        _examine_extension([capability for _, capability in gpus]),
        check_numpy(version_of("numpy"), cityscapes),
        check_package("setuptools", version_of("setuptools"), "building the extension", required=False),
        check_opencv({name: version_of(name) for name in OPENCV_NAMES}),
        check_package("pillow", version_of("pillow"), "reading images"),
        check_package("matplotlib", version_of("matplotlib"), "pictures"),
        check_package("pycocotools", version_of("pycocotools"), "COCO annotations"),
        check_package("faster-coco-eval", version_of("faster-coco-eval"), "the COCO evaluation"),
        check_package("timm", version_of("timm"), "the HRNet backbone"),
        check_package("cityscapesscripts", cityscapes, "the Cityscapes data and evaluation", required=True),
        check_datasets(variable, Path(variable if variable is not None else "datasets").expanduser()),
    ]


def _nvcc_path() -> str:
    """Where to look for nvcc, as torch does: CUDA_HOME first."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return os.pathsep.join(([str(Path(home, "bin"))] if home else []) + [os.environ.get("PATH", "")])


def table(findings: list[Finding]) -> str:
    """One line per finding, its remedy below it, and a last line that sums up."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for subject, found, state, remedy in findings:
        lines.append(f"{state:<6}  {subject:<{width}}  {found}")
        if state != "ok":
            lines.append(f"{'':<6}  {'':<{width}}  -> {remedy}")
    counts = {state: sum(finding.state == state for finding in findings) for state in ("broken", "note")}
    verdict = f"{counts['broken']} broken" if counts["broken"] else "Everything works"
    notes = f", {counts['note']} to note" if counts["note"] else ""
    return "\n".join([*lines, "", f"{verdict}{notes}."])


def main() -> int:
    findings = examine()
    print(table(findings))
    return int(any(finding.state == "broken" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
