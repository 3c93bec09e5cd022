"""projects/timing.py: whose calls are timed, and in which order."""

import pytest

from projects import timing


def test_calls_take_turns_and_the_first_ones_do_not_count(monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def function(name: str, seconds: list[float]):
        def call():
            calls.append(name)
            clock[0] += seconds.pop(0)

        return call

    found = timing.seconds_in_turns([function("a", [30, 2, 3]), function("b", [40, 6, 5])], "cpu", repeats=2)
    assert calls == ["a", "b"] * 3
    assert found == [pytest.approx([2, 3]), pytest.approx([6, 5])]
