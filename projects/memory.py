"""How much memory a call takes at its peak."""

import ctypes
import gc
import math
from collections.abc import Callable
from pathlib import Path

import torch


def added_peak(function: Callable[[], object], device: str) -> float:
    """MB (1e6 bytes) that a call holds at its peak, beyond what there was before it.

    On "cuda" what torch has allocated; else the resident set of this process: nan where that cannot be measured (it can on
    Linux). What was imported or allocated by an earlier call, and is still there, does not count.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # what earlier calls freed goes back to the system
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        return math.nan
    before = _resident("VmRSS")
    function()
    return (_resident("VmHWM") - before) / 1e6


def _resident(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
