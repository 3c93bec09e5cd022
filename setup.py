"""Packages of the five papers and what they share, their configs, and the C++ extension `projects.layers._C`.

Environment variables of the extension's build:
    NO_EXT=1      do not build it: the operators run their PyTorch implementation, which is slower
    FORCE_CUDA=1  build the CUDA kernels where no GPU is visible, for the GPUs in TORCH_CUDA_ARCH_LIST
    FORCE_CUDA=0  build the CPU kernels alone where a GPU is visible, e.g. without an nvcc of torch's CUDA version
    DEBUG=1       without optimisation, with debug symbols
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGES = ["projects", "maskplus", "maskpoint", "dsg", "ganmask", "casnet"]
CSRC = Path("projects", "layers", "csrc")


def is_on(name, default=False):
    """Whether an environment variable switches something on; 0 switches it off, without a value it is the default."""
    value = os.environ.get(name)
    return value != "0" if value else default


def fail(message):
    sys.exit(f"\nerror: {message}\n")


class BuildWithConfigs(build_py):
    """Copies configs/ into the package `projects`; an editable installation finds it in the checkout."""

    def run(self):
        super().run()
        shutil.copytree(ROOT / "configs", Path(self.build_lib, "projects", "configs"), dirs_exist_ok=True)


def extension_arguments():
    """Return setup()'s arguments for the C++ extension; none where it is switched off or has no sources."""
    os.chdir(ROOT)
    cpp_sources = sorted(map(str, CSRC.rglob("*.cpp")))
    if is_on("NO_EXT") or not cpp_sources:
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        fail(
            "The C++ extension is compiled against the torch that it will run with, and that cannot be "
            f"imported here ({error}). Run `make setup`, or install torch first and then use "
            "`pip install --no-build-isolation .`; NO_EXT=1 installs without the extension."
        )

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                print(error, file=sys.stderr)
                fail(
                    "The C++ extension projects.layers._C could not be built; the compiler's messages are "
                    "above. It needs g++ 9 or later, Python's headers and, with CUDA, an nvcc of the CUDA "
                    f"version of torch ({torch.version.cuda}) with CUDA_HOME naming its folder; FORCE_CUDA=0 "
                    "goes without CUDA. NO_EXT=1 installs without the extension: everything works, the "
                    "operators are slower."
                )

    with_cuda = is_on("FORCE_CUDA", default=torch.cuda.is_available() and cpp_extension.CUDA_HOME is not None)
    if with_cuda and cpp_extension.CUDA_HOME is None:
        fail("FORCE_CUDA=1 needs the CUDA toolkit, and no nvcc was found. Set CUDA_HOME to its folder.")
    optimisation = ["-O0", "-g"] if is_on("DEBUG") else ["-O3"]
    # at::parallel_for is compiled into the extension and needs -fopenmp to use more than one thread. OpenMP's
    # library is not linked: the one that torch has loaded serves, so that there is a single pool of threads.
    flags = {"cxx": [*optimisation, "-fopenmp"]}
    sources, include_dirs, macros = cpp_sources, [str(ROOT / CSRC)], []
    make_extension = cpp_extension.CppExtension
    if with_cuda:
        make_extension = cpp_extension.CUDAExtension
        sources = sources + sorted(map(str, CSRC.rglob("*.cu")))
        macros = [("WITH_CUDA", None)]
        flags["nvcc"] = [*optimisation, *(["-G"] if is_on("DEBUG") else [])]
        include_dirs += headers_of_torch(Path(cpp_extension.CUDA_HOME), Path(torch.__file__).parent)
    extension = make_extension(
        "projects.layers._C",
        sources,
        include_dirs=include_dirs,
        define_macros=macros,
        extra_compile_args=flags,
        depends=sorted(str(path) for path in CSRC.rglob("*.*h")),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def headers_of_torch(cuda_home, torch_folder):
    """Return the folders of the CUDA headers that came with torch, where the toolkit does not have them."""
    if (cuda_home / "include" / "cusparse.h").is_file():
        return []
    return sorted(map(str, torch_folder.parent.glob("nvidia/*/include")))


extension = extension_arguments()
setup(
    name="detectron2-instance-papers",
    version="0.1.0",
    description="Five instance-segmentation papers as Detectron2 projects",
    python_requires=">=3.10,<3.14",
    # With the root named, an editable installation puts the checkout itself on the path: a package that is
    # added later is found at once.
    package_dir={"": "."},
    packages=find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "cityscapesscripts>=2.2.4",
        "detectron2>=0.6",
        "faster-coco-eval>=1.6.5",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9",
        "matplotlib>=3.7",
        "numpy>=1.26",
        "opencv-python-headless>=4.9",
        "packaging",
        "pillow>=10.1",
        "pycocotools>=2.0.7",
        "PyYAML>=6.0",
        "shapely>=2.0",
        "tabulate>=0.9",
        "tensorboard>=2.14",
        "timm>=1.0",
        "tqdm>=4.65",
        "yacs>=0.1.8",
    ],
    extras_require={
        "cityscapes": ["numpy<2.3"],  # what cityscapesscripts' evaluation works with
        "dev": ["hypothesis", "ninja", "pytest>=8", "pytest-xdist", "ruff"],
    },
    ext_modules=extension.get("ext_modules", []),
    cmdclass={"build_py": BuildWithConfigs, **extension.get("cmdclass", {})},
)
