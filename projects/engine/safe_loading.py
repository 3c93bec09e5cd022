"""Reading weights files without running what is in them.

``.pth`` goes through torch's weights_only loader; ``.pkl`` (Detectron2's model zoo, ImageNet weights) through an unpickler
that admits numpy arrays and plain containers. Whatever asks for more is refused by name, unless the caller trusts it.
"""

import pickle
import re
import zipfile
from typing import Any

import numpy as np
import torch

from projects.errors import CheckpointError

TRUST_HINT = "Pass --trust (trust=True) if you know where the file comes from: it can then run any code on this machine."

ADMITTED = {
    "collections.OrderedDict",
    "_codecs.encode",  # how Python 3 writes bytes in old protocols
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
    "numpy.core.numeric._frombuffer",
}


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler of numpy arrays and plain containers."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        if module.startswith("numpy.core") and np.lib.NumpyVersion(np.__version__) >= "2.0.0":
            module = module.replace("numpy.core", "numpy._core")
        return super().find_class(module, name)


def load_pickle(path: str, trust: bool = False) -> Any:
    """Read a pickle of arrays and plain containers (strings of Python 2 as latin1).

    Raises CheckpointError when it is truncated, no pickle, or asks for anything else.
    """
    unpickler = pickle.Unpickler if trust else ArrayUnpickler
    with open(path, "rb") as file:
        try:
            return unpickler(file, encoding="latin1").load()
        except pickle.UnpicklingError as error:
            if re.fullmatch(r"[\w.]+\.[\w.]+", str(error)):
                raise refused(path, str(error)) from error
            raise broken(path, error) from error
        except Exception as error:  # a damaged pickle can raise anything
            raise broken(path, error) from error


def load_torch(path: str, trust: bool = False) -> Any:
    """Read a file of ``torch.save`` onto the CPU: tensors and plain containers only, checksums verified.

    Raises CheckpointError when it is truncated or corrupt, or asks for anything else.
    """
    verify_checksums(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)|(?:global|class|function) ([\w.]+\.[\w.]+)", str(error))
        if wanted:
            raise refused(path, wanted.group(1) or wanted.group(2)) from error
        raise broken(path, error.__context__ or error) from error  # torch wraps the cause into advice to lift the safety
    except Exception as error:  # a damaged file can raise anything
        raise broken(path, error) from error


def verify_checksums(path: str) -> None:
    """Raise CheckpointError when a zip archive, which is what torch.save writes, has a damaged member or no directory.

    ``torch.load`` itself does not look at the checksums. Files that do not begin as a zip archive are left alone.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise broken(path, error) from error
    if damaged:
        raise broken(path, f"wrong checksum of '{damaged}'")


def refused(path: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"'{path}' was not loaded: it wants {wanted}, and a weights file needs arrays and plain containers only. {TRUST_HINT}"
    )


def broken(path: str, error: Exception | str) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return CheckpointError(
        f"'{path}' is truncated, corrupt or no weights file ({reason}). Fetch or copy it again, or use an earlier checkpoint."
    )
