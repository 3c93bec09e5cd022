"""How long calls take, side by side."""

import time
from collections.abc import Callable, Sequence

import torch


def seconds_in_turns(functions: Sequence[Callable[[], object]], device: str, repeats: int) -> list[list[float]]:
    """Seconds of each function's calls, ``repeats`` of each, after one that is not counted.

    The functions take turns, so that what slows the machine down slows all of them. On "cuda" a call ends when the GPU has.
    """
    found = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, durations in zip(functions, found, strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                durations.append(time.perf_counter() - start)
    return found
