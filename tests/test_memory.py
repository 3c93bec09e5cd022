"""projects/memory.py: the peak of a call, whatever ran before it."""

import torch

from projects.memory import added_peak

MB = 1_000_000


def test_peak_of_a_call():
    def run(count: int):
        return lambda: torch.ones(count * MB // 4).sum()

    for count in (400, 100, 200):  # smaller ones after a larger one, too
        assert abs(added_peak(run(count), "cpu") - count) < 20
    kept = []
    assert abs(added_peak(lambda: kept.append(torch.ones(50 * MB)), "cpu") - 200) < 20
    assert added_peak(lambda: None, "cpu") < 20
