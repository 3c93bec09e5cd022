"""Every check of the doctor with injected values, the reading of GPU architectures, and one real run."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from projects import doctor

REPO = Path(__file__).resolve().parent.parent
SUFFIXES = [".cpython-311-x86_64-linux-gnu.so", ".so"]


def states(findings):
    return [finding.state for finding in findings]


def test_versions_compare_as_numbers():
    assert doctor.as_numbers("2.12.1+cu130") == (2, 12, 1)
    assert doctor.as_numbers("2.12.0.dev20260101") > doctor.as_numbers("2.6")
    assert doctor.as_numbers("0.1.5.post20221221") == (0, 1, 5)


@pytest.mark.parametrize(
    ("version", "state"),
    [((3, 9, 2), "broken"), ((3, 10, 0), "ok"), ((3, 13, 5), "ok"), ((3, 14, 0), "broken")],
)
def test_python(version, state):
    assert doctor.check_python(version).state == state


@pytest.mark.parametrize(
    ("version", "cuda", "failure", "state", "words"),
    [
        ("2.12.1+cu130", "13.0", None, "ok", "CUDA 13.0"),
        ("2.6.0", None, None, "ok", "the CPU only"),
        ("2.5.1", "12.4", None, "broken", "2.6 or later"),
        (None, None, None, "broken", "make setup"),
        ("2.12.1", None, "OSError: libcudart.so.13", "broken", "libcudart.so.13"),
    ],
)
def test_torch(version, cuda, failure, state, words):
    finding = doctor.check_torch(version, cuda, failure)
    assert finding.state == state
    assert words in finding.found + finding.remedy


def test_torchvision_must_belong_to_torch():
    assert doctor.check_torchvision("0.27.1", None).state == "ok"
    failure = "RuntimeError: operator torchvision::nms does not exist"
    finding = doctor.check_torchvision("0.27.1", failure)
    assert finding.state == "broken" and "the same CUDA" in finding.remedy and "nms" in finding.found
    assert doctor.check_torchvision(None, None).state == "broken"


@pytest.mark.parametrize(
    ("numpy", "cityscapesscripts", "state"),
    [("2.2.6", "2.3.0", "ok"), ("2.3.0", "2.3.0", "broken"), ("2.5.0", None, "ok"), (None, None, "broken")],
)
def test_numpy_and_cityscapesscripts(numpy, cityscapesscripts, state):
    finding = doctor.check_numpy(numpy, cityscapesscripts)
    assert finding.state == state
    if numpy == "2.3.0":
        assert "numpy<2.3" in finding.remedy


def test_packages():
    assert doctor.check_package("timm", "1.0", "HRNet").state == "ok"
    missing = doctor.check_package("timm", None, "HRNet")
    assert missing.state == "broken" and "HRNet" in missing.remedy and "pip install timm" in missing.remedy
    assert doctor.check_package("timm", None, "HRNet", required=False).state == "note"


def test_two_opencv_packages_overwrite_each_other():
    assert doctor.check_opencv({"opencv-python-headless": "5.0", "opencv-python": None}).state == "ok"
    assert doctor.check_opencv({"opencv-python-headless": "5.0", "opencv-python": "4.9"}).state == "note"
    assert doctor.check_opencv({"opencv-python-headless": None}).state == "broken"


# ---- GPU


def test_no_gpu_is_fine():
    assert states(doctor.check_gpus(None, [], "13.0", [])) == ["ok"]


def test_gpu_with_a_cpu_build_of_torch():
    (finding,) = doctor.check_gpus("580.1", [], None, [])
    assert finding.state == "broken" and "CUDA builds" in finding.remedy


def test_gpu_with_a_driver_too_old():
    (finding,) = doctor.check_gpus("470.1", [], "13.0", [])
    assert finding.state == "broken" and "CUDA 13.0" in finding.remedy


def test_gpus_and_the_kernels_of_torch():
    gpus = [("H200", (9, 0)), ("V100", (7, 0)), ("B200", (10, 0))]
    findings = doctor.check_gpus("580.1", gpus, "13.0", ["sm_75", "sm_80", "sm_90"])
    assert states(findings) == ["ok", "broken", "broken"]
    assert "compute capability 9.0" in findings[0].found
    assert states(doctor.check_gpus("580.1", gpus[2:], "13.0", ["sm_90", "compute_90"])) == ["ok"]


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), [("sm", 90)], True),
        ((8, 9), [("sm", 86)], True),  # same generation, older
        ((8, 0), [("sm", 86)], False),  # same generation, newer
        ((9, 0), [("sm", 80)], False),  # another generation
        ((9, 0), [("ptx", 80)], True),  # the driver compiles it
        ((7, 5), [("ptx", 80)], False),
        ((12, 0), [("sm", 100), ("ptx", 120)], True),
        ((9, 0), [], False),
    ],
)
def test_which_gpu_runs_which_code(capability, archs, runs):
    assert doctor.runs_on(capability, archs) is runs


def test_nvcc():
    assert doctor.check_nvcc(None, "13.0").state == "ok"
    assert doctor.check_nvcc("13.1", "13.0").state == "ok"
    assert doctor.check_nvcc("12.4", "13.0").state == "note"
    assert doctor.check_nvcc("12.4", None).state == "ok"


# ---- Detectron2


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("AttributeError: module 'PIL.Image' has no attribute 'LINEAR'", "older than the libraries"),
        ("ImportError: cannot import name '_C' from 'detectron2'", "older than the libraries"),
        ("ModuleNotFoundError: No module named 'pkg_resources'", "setuptools<82"),
        ("ModuleNotFoundError: No module named 'fvcore'", "repair it"),
    ],
)
def test_a_detectron2_that_does_not_import(failure, words):
    finding = doctor.check_detectron2("0.6 (release)", failure, None)
    assert finding.state == "broken" and failure in finding.found
    assert words in finding.remedy and "install_detectron2.py --force" in finding.remedy


def test_detectron2():
    assert doctor.check_detectron2(None, None, None).state == "broken"
    assert doctor.check_detectron2("0.6+py", None, None).state == "ok"
    assert doctor.check_detectron2("0.6", None, "ImportError: undefined symbol").state == "broken"


def test_detectron2_says_where_it_is_from():
    describe = doctor.describe_detectron2
    assert describe("0.6+py", None, False, False, "/a") == "0.6+py (patched wheel, pure Python) in /a"
    assert "main branch, with C++ library) from https://b in /a" in describe("0.6", "https://b", True, True, "/a")
    assert describe("0.6", None, False, True, "/a").startswith("0.6 (release, with C++ library)")


# ---- Extension


@pytest.fixture
def files(tmp_path):
    """Make files that are `age` seconds old: ``files("a.so", 5)``."""

    def make(name, age=0):
        path = tmp_path / name
        path.write_bytes(b"")
        os.utime(path, (10_000 - age, 10_000 - age))
        return path

    return make


def test_extension_is_not_built(files):
    finding = doctor.check_extension([], [files("a.cpp")], SUFFIXES, None, [], [])
    assert finding.state == "note" and "`make clean setup` builds it" in finding.remedy


def test_extension_of_another_python(files):
    built = [files("_C.cpython-310-x86_64-linux-gnu.so")]
    finding = doctor.check_extension(built, [], SUFFIXES, None, [], [])
    assert finding.state == "broken" and "another Python" in finding.found


def test_extension_of_another_torch(files):
    failure = "OSError: undefined symbol: _ZN3c10"
    finding = doctor.check_extension([files("_C.so")], [], SUFFIXES, failure, [], [])
    assert finding.state == "broken" and "undefined symbol" in finding.found and "another torch" in finding.remedy


def test_loading_an_extension_cannot_kill_the_doctor(tmp_path):
    import torch

    library = tmp_path / "_C.so"
    whole = Path(torch.__file__).parent.joinpath("lib", "libtorch_python.so").read_bytes()
    library.write_bytes(whole[: 2**16])
    assert doctor.why_it_does_not_load(library)
    library.write_text("no library\n" * 100)
    assert "invalid ELF header" in doctor.why_it_does_not_load(library)


def test_extension_older_than_its_sources(files):
    sources = [files("new.cpp", age=1), files("old.cpp", age=9)]
    finding = doctor.check_extension([files("_C.so", age=5)], sources, SUFFIXES, None, [], [])
    assert finding.state == "broken" and "new.cpp" in finding.found and "old.cpp" not in finding.found
    assert doctor.check_extension([files("_C.so")], sources, SUFFIXES, None, [], []).state == "ok"


def test_extension_and_the_gpus_here(files):
    def check(archs, capabilities):
        return doctor.check_extension([files("_C.so")], [], SUFFIXES, None, archs, capabilities)

    assert check([], []).found == "_C.so, without CUDA"
    assert check([], [(9, 0)]).state == "note"
    assert check([("sm", 80), ("ptx", 90)], [(9, 0), (12, 0)]) == doctor.Finding("extension", "_C.so, for sm_80 compute_90")
    missing = check([("sm", 80)], [(9, 0), (8, 6), (9, 0)])
    assert missing.state == "broken" and "TORCH_CUDA_ARCH_LIST='9.0'" in missing.remedy


def fat_binary(*entries) -> bytes:
    """A fat binary of the CUDA toolkit: `entries` are (kind, number), kind 1 for PTX and 2 for machine code."""
    body = b""
    for kind, number in entries:
        payload = bytes(24)
        header = struct.pack("<HHIQQHHI", kind, 0x101, 64, len(payload), 0, 8, 1, number)
        body += header.ljust(64, b"\0") + payload
    return doctor.FATBIN_MAGIC + struct.pack("<HHQ", 1, 16, len(body)) + body


def test_gpu_architectures_are_read_from_a_library():
    library = b"ELF" + fat_binary((2, 80), (2, 90)) + bytes(5) + fat_binary((1, 90), (2, 80)) + b"end"
    assert doctor.read_archs(library) == [("sm", 80), ("sm", 90), ("ptx", 90)]


@pytest.mark.parametrize(
    "library",
    [
        b"",
        b"no fat binary",
        doctor.FATBIN_MAGIC,
        doctor.FATBIN_MAGIC + bytes(60),
        fat_binary((2, 80))[:50],  # truncated
        fat_binary((2, 80))[:8] + struct.pack("<Q", 2**62) + bytes(99),
        doctor.FATBIN_MAGIC + struct.pack("<HHQ", 1, 16, 64) + bytes(64),  # entries of no size
    ],
)
def test_what_is_no_fat_binary_is_passed_over(library):
    assert doctor.read_archs(library) == []


# ---- Data, table, the whole


def test_datasets(tmp_path):
    (tmp_path / "coco").mkdir()
    file = tmp_path / "file"
    file.write_text("")
    assert "coco" in doctor.check_datasets(str(tmp_path), tmp_path).found
    assert doctor.check_datasets(str(tmp_path), tmp_path).state == "ok"
    assert doctor.check_datasets(None, tmp_path / "datasets").state == "note"
    missing = doctor.check_datasets("nowhere", tmp_path / "nowhere")
    assert missing.state == "broken" and "does not exist" in missing.found
    assert "is not a folder" in doctor.check_datasets(str(file), file).found


def test_table_shows_states_and_remedies():
    text = doctor.table(
        [
            doctor.Finding("torch", "2.12"),
            doctor.Finding("numpy", "2.5", "broken", "pip install x"),
            doctor.Finding("extension", "not built", "note", "make setup"),
        ]
    )
    lines = text.splitlines()
    assert lines[0].split() == ["ok", "torch", "2.12"]
    assert lines[2].split(maxsplit=1) == ["->", "pip install x"]
    assert lines[-1] == "1 broken, 1 to note."
    assert doctor.table([doctor.Finding("a", "b")]).endswith("Everything works.")


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("broken", 1)])
def test_exit_code(monkeypatch, capsys, state, code):
    findings = [doctor.Finding("fine", "1.0"), doctor.Finding("a", "b", state, "c")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert doctor.main() == code
    assert "b" in capsys.readouterr().out


def test_failures_are_one_line():
    def action():
        raise OSError("first line\nsecond line")

    assert doctor.why_it_fails(action) == "OSError: first line"
    assert doctor.why_it_fails(lambda: None) is None
    assert doctor.output_of("no-such-program-here") is None


@pytest.mark.parametrize("command", [["-m", "projects.doctor"], ["projects/doctor.py"]])
def test_the_doctor_examines_this_installation(command, tmp_path):
    env = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    result = subprocess.run([sys.executable, *command], cwd=REPO, env=env, capture_output=True, text=True)
    rows = [line.split() for line in result.stdout.splitlines()]
    assert result.returncode == int(any(row and row[0] == "broken" for row in rows)), result.stdout + result.stderr
    subjects = {row[1] for row in rows if row and row[0] in ("ok", "note", "broken")}
    assert {"Python", "torch", "torchvision", "nvcc", "Detectron2", "extension", "numpy", "timm"} <= subjects
    for name in ("Python", "torch", "torchvision", "Detectron2"):
        assert ["ok", name] in [row[:2] for row in rows]
