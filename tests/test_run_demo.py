"""tools/run_demo.py: how many iterations it gives itself time for."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

REPO = Path(__file__).resolve().parents[1]
CONFIG = str(REPO / "configs/baseline/shapes_mask_rcnn_R_18_FPN.yaml")


@pytest.fixture
def clock() -> SimpleNamespace:
    """Stands for the module `time`; it goes on only when it is told."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    return clock


@pytest.fixture
def tool(monkeypatch, clock):
    spec = importlib.util.spec_from_file_location("run_demo", REPO / "tools/run_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "time", clock)
    return module


def test_a_step_is_the_median_after_the_warm_up(tool, clock, monkeypatch, shapes_root):
    durations = iter([90.0, 80.0, 70.0, 0.1, 3.0, 2.0, 9.0, 1.0, 2.0, 5.0])

    class Trainer(SimpleNamespace):
        parallel_model = SimpleNamespace(train=lambda: None)

        def run_step(self):
            clock.now += next(durations)

    monkeypatch.setattr(tool, "build_trainer", lambda cfg: Trainer())
    assert tool.seconds_per_step(CONFIG, []) == pytest.approx(2.0)
    assert next(durations, None) is None


@pytest.mark.parametrize(
    ("minutes", "timing", "step", "iterations"),
    [(5, 100.0, 0.5, 240), (5, 20.0, 0.1, 600), (5, 20.0, 400.0, 1), (1, 90.0, 0.5, 1)],
)
def test_two_fifths_of_what_the_timing_leaves_are_kept_for_the_rest(
    tool, clock, monkeypatch, tmp_path, capsys, minutes, timing, step, iterations
):
    """240 steps of half a second are 120 s of the 200 s that are left; the schedule has 600; one step is the least."""
    commands = []

    def timed(config_file, opts):
        clock.now += timing
        return step

    def train(command):
        commands.append(command)
        clock.now += 70
        folder = Path(command[command.index("OUTPUT_DIR") + 1])
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"segm": {"AP": 12.34}, "bbox": {"AP": None}}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(tool, "REPO", tmp_path)
    monkeypatch.setattr(tool, "seconds_per_step", timed)
    monkeypatch.setattr(tool.subprocess, "run", train)
    assert tool.run(SimpleNamespace(config_file=CONFIG, minutes=minutes, opts=[])) == 0
    (command,) = commands
    assert command[command.index("SOLVER.MAX_ITER") + 1] == str(iterations)
    printed = capsys.readouterr().out
    minutes_and_seconds = f"{(timing + 70) // 60:.0f} min {(timing + 70) % 60:.0f} s"
    assert minutes_and_seconds in printed and "12.3" in printed and "bbox" not in printed
