"""What launch.py decides without starting processes."""

import os
import sys

import pytest
import torch

from projects.engine import launch
from projects.errors import ConfigError


def test_usable_cpus_are_those_that_the_process_may_run_on(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert launch.usable_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert launch.usable_cpus() == 64


@pytest.mark.parametrize("stated, expected", [(None, [3]), ("5", [])])
def test_threads_of_a_process(monkeypatch, stated, expected):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(launch, "usable_cpus", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if stated:
        monkeypatch.setenv("OMP_NUM_THREADS", stated)
    monkeypatch.setattr(launch.dist, "init_process_group", refuse)
    monkeypatch.setattr(launch, "_leave", sys.exit)
    with pytest.raises(SystemExit):
        launch._run(print, (), 0, 0, 2, 2, False, "tcp://nowhere:1", report=lambda code: False)
    assert threads == expected


def refuse(*args, **kwargs):
    raise ConfigError("no processes here")


@pytest.mark.parametrize("interruption, code", [(KeyboardInterrupt(), 130), (KeyboardInterrupt(15), 143)])
def test_interruptions_are_exit_codes(interruption, code):
    def interrupted():
        raise interruption

    assert launch.guarded(interrupted) == code
