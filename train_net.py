#!/usr/bin/env python
"""Train and evaluate any config of this project, with Detectron2's command line.

    python train_net.py --config-file configs/baseline/shapes_mask_rcnn_R_18_FPN.yaml
    python train_net.py --config-file CONFIG --num-gpus 8 SOLVER.BASE_LR 0.01
    python train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS model_final.pth
    torchrun --nproc-per-node 8 train_net.py --config-file CONFIG

Exit codes: 0 done; 2 something in the command, the config, the data or the weights must be put right (one paragraph says
what); 130 or 143 stopped by SIGINT or SIGTERM after saving (go on with --resume). A second signal does not wait for the
saving.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import torch
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from projects import PROJECTS, get_cfg, load_config, stated_keys
from projects.data.check import check_datasets, register_own_datasets
from projects.engine.checkpoint import refuse_to_overwrite
from projects.engine.launch import guarded, launch
from projects.engine.trainer import build_trainer
from projects.errors import ConfigError
from projects.evaluation import evaluator_builder
from projects.evaluation.evaluate import evaluate, load_for_evaluation, write_summary


def parse_args(argv: list[str] | None = None):
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--num-procs", type=int, default=1, help="number of CPU processes per machine, without GPUs")
    parser.add_argument("--trust", action="store_true", help="load weights files that can run code; know their source")
    parser.set_defaults(num_gpus=None, dist_url="auto")
    return parser.parse_args(argv)


def setup(args):
    """The config of a run, complete and frozen. Raises ConfigError or DataError."""
    if not args.config_file:
        raise ConfigError("Pass --config-file; the project's configs are in configs/.")
    cfg = load_config(args.config_file, args.opts)
    choose_device(args, cfg)
    check_datasets(cfg, stated_keys(args.config_file, args.opts), evaluation_only=args.eval_only)
    for name in cfg.DATASETS.TEST:
        evaluator_builder(name)
    if not (args.eval_only or args.resume):
        refuse_to_overwrite(cfg.OUTPUT_DIR)
    cfg.freeze()
    return cfg


def choose_device(args, cfg) -> None:
    """Complete --num-gpus from MODEL.DEVICE, and make MODEL.DEVICE what the flags say. Raises ConfigError."""
    available = torch.cuda.device_count()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", cfg.MODEL.DEVICE):
        raise ConfigError(f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}': expected 'cpu', 'cuda', or one GPU by its number, 'cuda:1'.")
    if args.num_gpus is None:
        args.num_gpus = {"cpu": 0, "cuda": available}.get(cfg.MODEL.DEVICE, 1)
    if not 0 <= args.num_gpus <= available:
        raise ConfigError(f"--num-gpus {args.num_gpus}: this machine has {available}. Without the flag all are used.")
    if args.num_gpus and args.num_procs > 1:
        raise ConfigError("--num-procs counts CPU processes and does not go with GPUs: add --num-gpus 0, or drop it.")
    if args.num_procs < 1 or args.num_machines < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError("Expected --num-procs and --num-machines of at least 1, and --machine-rank below --num-machines.")
    if not args.num_gpus:
        cfg.MODEL.DEVICE = "cpu"
    elif cfg.MODEL.DEVICE == "cpu" or args.num_gpus * args.num_machines > 1 or "LOCAL_RANK" in os.environ:
        cfg.MODEL.DEVICE = "cuda"  # of each process its own
    elif cfg.MODEL.DEVICE != "cuda" and int(cfg.MODEL.DEVICE.removeprefix("cuda:")) >= available:
        raise ConfigError(f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}': this machine has {available} GPUs, counted from 0.")


def run(args, cfg) -> int:
    """Train or evaluate in one process of a run."""
    get_cfg()  # registers papers and data sets in processes that were spawned
    register_own_datasets(cfg)
    if torch.device(cfg.MODEL.DEVICE).index is not None:
        torch.cuda.set_device(cfg.MODEL.DEVICE)
    folder = Path(cfg.OUTPUT_DIR)  # an evaluation leaves the config and log of the training as they are
    folder = folder / "evaluation" if args.eval_only else folder
    for package in ("projects", *PROJECTS):
        setup_logger(str(folder), distributed_rank=comm.get_rank(), name=package)
    default_setup(with_output_dir(cfg, folder), args)
    if args.eval_only:
        model = load_for_evaluation(cfg, args.resume, args.trust)
        finish(cfg, evaluate(cfg, model))
        return 0
    trainer = build_trainer(cfg, args.trust)
    trainer.resume_or_load(args.resume)
    trainer.train()
    if trainer.stopped_by is not None:
        return 128 + trainer.stopped_by
    finish(cfg, trainer.results)
    return 0


def make_output_dir(folder: str) -> None:
    """Raises ConfigError when nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"OUTPUT_DIR '{folder}' cannot be written ({error}): set it to a folder of yours.") from error


def with_output_dir(cfg, folder: Path):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder)
    return cfg


def finish(cfg, results) -> None:
    """Write the results, and compare them with TEST.EXPECTED_RESULTS as Detectron2 does."""
    write_summary(cfg, results)
    if comm.is_main_process():
        verify_results(cfg, results)


def main(args) -> int:
    cfg = setup(args)
    make_output_dir(cfg.OUTPUT_DIR)
    return launch(
        run,
        (args, cfg),
        processes=args.num_gpus or args.num_procs,
        use_gpu=args.num_gpus > 0,
        machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
    )


if __name__ == "__main__":
    sys.exit(guarded(main, parse_args()))
