"""Starting the processes of a run: one, several on this machine (GPUs with NCCL, CPU processes with GLOO), several machines,
or those that torchrun has started."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch.distributed.rendezvous import rendezvous

from projects.compat import create_local_process_group
from projects.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)
USER_ERROR = 2  # exit code
INTERRUPTED = 128 + signal.SIGINT  # exit code
UNKNOWN = -1  # of a process that has not reported its exit code


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

    A UserError is printed as a paragraph, by the first process that raises one, and gives exit code 2. An interruption gives
    128 + the number of the signal.
    """
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:
        local, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
        per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        if use_gpu and per_machine > torch.cuda.device_count():
            raise ConfigError(
                f"torchrun started {per_machine} processes on this machine, which has {torch.cuda.device_count()} GPUs: "
                "expected --nproc-per-node of at most that, or --num-gpus 0 for processes on the CPU."
            )

        def report(code: int) -> bool:
            return code == USER_ERROR and _first_under_torchrun()

        return _run(main, args, local, int(os.environ["RANK"]), world, per_machine, use_gpu, "env://", report)
    world = processes * machines
    if world == 1:
        return guarded(main, *args)
    if dist_url == "auto":
        if machines > 1:
            raise ConfigError("--dist-url auto works on one machine only; pass tcp://<address of machine 0>:<free port>.")
        dist_url = f"tcp://127.0.0.1:{free_port()}"
    codes = mp.get_context("spawn").Array("i", [UNKNOWN] * processes)
    arguments = (main, args, codes, machine_rank * processes, world, processes, use_gpu, dist_url)
    context = mp.start_processes(_child, arguments, nprocs=processes, join=False, start_method="spawn")

    received: list[int] = []

    def hand_on(number, frame):
        received.append(number)
        for pid in context.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not context.join():
            pass
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        if USER_ERROR in codes[:]:  # the others fail as they wait for that process
            return USER_ERROR
        if received:  # what ended a process later, the launcher's own signal perhaps, is no news
            return 128 + received[0]
        if max(codes[:]) > 128:
            return max(codes[:])
        if isinstance(error, mp.ProcessRaisedException):
            raise
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return INTERRUPTED if UNKNOWN in codes[:] else max(codes[:])  # torch lets KeyboardInterrupt end a process with 0


def guarded(main: Callable[..., int], *args) -> int:
    """``main(*args)``; a UserError is printed as one paragraph and gives exit code 2, an interruption 128 + its signal."""
    try:
        return main(*args)
    except UserError as error:
        if _first_under_torchrun():
            print_error(error)
        return USER_ERROR
    except KeyboardInterrupt as interruption:
        return exit_code(interruption)


def exit_code(interruption: KeyboardInterrupt) -> int:
    """128 + the number of the signal, which a trainer states."""
    return 128 + interruption.args[0] if interruption.args else INTERRUPTED


def print_error(error: Exception | str) -> None:
    print(f"\nerror: {error}", file=sys.stderr, flush=True)


def usable_cpus() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _child(local_rank: int, main, args, codes, first_rank: int, world: int, per_machine: int, use_gpu: bool, url: str):
    def report(code: int) -> bool:
        with codes.get_lock():
            first = code not in codes[:]
            codes[local_rank] = code
        return first

    code = _run(main, args, local_rank, first_rank + local_rank, world, per_machine, use_gpu, url, report)
    for number in (signal.SIGINT, signal.SIGTERM):  # a late copy must not end the interpreter's shutdown with another code
        signal.signal(number, signal.SIG_IGN)
    report(code)


def _first_under_torchrun() -> bool:
    """False for all processes of a torchrun but the first that asks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=10)))  # it lives in torchrun itself
        return store.add("user error", 1) == 1
    except RuntimeError:
        return True


def _run(main, args, local_rank: int, rank: int, world: int, per_machine: int, use_gpu: bool, url: str, report) -> int:
    """``main(*args)`` in one of several processes.

    ``report(code)`` is called before this process ends itself, and says whether it is the first that ends with that code.
    """
    try:
        if use_gpu:
            torch.cuda.set_device(local_rank)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, usable_cpus() // per_machine))
        try:
            dist.init_process_group("nccl" if use_gpu else "gloo", url, world_size=world, rank=rank, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"process {rank} of {world} cannot join at {url}: {error}") from error
        create_local_process_group(per_machine)
        comm.synchronize()
        code = main(*args)
    except UserError as error:
        if report(USER_ERROR):
            print_error(error)
        _leave(USER_ERROR)
    except KeyboardInterrupt as interruption:
        code = exit_code(interruption)
        report(code)
        _leave(code)
    dist.destroy_process_group()
    return code


def _leave(code: int) -> NoReturn:
    """End this process at once: the others may be waiting for it, so the process group cannot be closed, and Python's own
    exit would destroy the threads of an open one, which aborts."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
