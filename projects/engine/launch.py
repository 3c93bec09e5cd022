"""Starting the processes of a run: one, several on this machine (GPUs with NCCL, CPU processes with GLOO), several machines,
or those that torchrun has started."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from projects.compat import create_local_process_group
from projects.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)
USER_ERROR = 2  # exit code


def launch(
    main: Callable[..., int],
    args: tuple,
    processes: int,
    use_gpu: bool,
    machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> int:
    """Run ``main(*args)`` in ``processes`` processes of this machine and return the exit code of the run.

    Args:
        main: returns an exit code, the same in all processes; picklable when there are several.
        processes: per machine; one GPU each with ``use_gpu``.
        machines, machine_rank, dist_url: as Detectron2's flags; "auto" takes a free port of this machine.

    Under torchrun (RANK, WORLD_SIZE and LOCAL_RANK are set) the processes exist already, and ``processes``, ``machines``,
    ``machine_rank`` and ``dist_url`` are not looked at. SIGINT and SIGTERM are handed on to the processes.

    A UserError is printed as a paragraph and gives exit code 2.
    """
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:
        local, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
        per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        return _run(main, args, local, int(os.environ["RANK"]), world, per_machine, use_gpu, "env://")
    world = processes * machines
    if world == 1:
        return guarded(main, *args)
    if dist_url == "auto":
        if machines > 1:
            raise ConfigError("--dist-url auto works on one machine only; pass tcp://<address of machine 0>:<free port>.")
        dist_url = f"tcp://127.0.0.1:{free_port()}"
    codes = mp.get_context("spawn").Array("i", [0] * processes)
    arguments = (main, args, codes, machine_rank * processes, world, processes, use_gpu, dist_url)
    context = mp.start_processes(_child, arguments, nprocs=processes, join=False, start_method="spawn")

    def hand_on(number, frame):
        for pid in context.pids():
            os.kill(pid, number)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:
        if USER_ERROR in codes[:]:
            return USER_ERROR
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return codes[0]


def guarded(main: Callable[..., int], *args) -> int:
    """``main(*args)``, with a UserError printed as one paragraph and turned into exit code 2."""
    try:
        return main(*args)
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return USER_ERROR


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _child(local_rank: int, main, args, codes, first_rank: int, world: int, per_machine: int, use_gpu: bool, url: str):
    def report(code: int) -> None:
        codes[local_rank] = code

    report(_run(main, args, local_rank, first_rank + local_rank, world, per_machine, use_gpu, url, report))


def _run(main, args, local_rank: int, rank: int, world: int, per_machine: int, use_gpu: bool, url: str, report=None) -> int:
    if use_gpu:
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // per_machine))
    try:
        dist.init_process_group("nccl" if use_gpu else "gloo", url, world_size=world, rank=rank, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        print(f"error: process {rank} of {world} cannot join at {url}: {error}", file=sys.stderr)
        _leave(USER_ERROR, report)
    create_local_process_group(per_machine)
    comm.synchronize()
    code = guarded(main, *args)
    if code == USER_ERROR:
        _leave(code, report)
    dist.destroy_process_group()
    return code


def _leave(code: int, report: Callable[[int], None] | None) -> NoReturn:
    """End this process at once: the others may be waiting for it, so the process group cannot be closed, and Python's own
    exit would destroy the threads of an open one, which aborts."""
    if report:
        report(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
