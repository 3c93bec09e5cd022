"""train_net.py as a user calls it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog

from projects.engine.launch import guarded, launch
from projects.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]
SHAPES = str(REPO / "configs/baseline/shapes_mask_rcnn_R_18_FPN.yaml")


@pytest.fixture(scope="module")
def train_net():
    spec = importlib.util.spec_from_file_location("train_net", REPO / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["SOLVER.BASE_LRR", "1"], "no key SOLVER.BASE_LRR. Did you mean SOLVER.BASE_LR"),
        (["SOLVER.BASE_LR"], "KEY VALUE pairs"),
        (["SOLVER.STEPS", "often"], "SOLVER.STEPS"),
        (["DATASETS.TRAIN", "('shapes_trian',)"], "no data set 'shapes_trian'. Did you mean shapes_train"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["DATASETS.TEST", "('coco_2017_val',)"], "DETECTRON2_DATASETS"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "5"], "append MODEL.ROI_HEADS.NUM_CLASSES 8 to the command"),
        (["SOLVER.TRAINER", "MyTrainer"], "no trainer 'MyTrainer'. There are: StandardTrainer"),
        (["INPUT.MAPPER", "MyMapper"], "no mapper 'MyMapper'"),
        (["SOLVER.OPTIMIZER", "Lion"], "Lion"),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH is 0: expected at least 1"),
        (["SOLVER.MAX_ITER", "9", "--eval-only"], "options such as --eval-only go before the KEY VALUE overrides"),
        (["OUTPUT_DIR", "r1", "--num-gpus", "0"], "options such as --num-gpus go before the KEY VALUE overrides"),
        (["OUTPUT_DIR", "--resume"], "options such as --resume go before the KEY VALUE overrides"),
        (["SOLVER.MAX_ITER=8"], "write a space instead of '=', as in SOLVER.MAX_ITER 8"),
        (["DATALOADER.SAMPLER_TRAIN", "Mine"], "no 'Mine'"),
        (["DATASETS.REGISTER", "[['a', 'b']]"], "DATASETS.REGISTER"),
        (["MODEL.META_ARCHITECTURE", "MyModel"], "MyModel"),
        (["SOLVER.CHECKPOINT_PERIOD", "0"], "SOLVER.CHECKPOINT_PERIOD is 0"),
        (["SOLVER.LOG_PERIOD", "-1"], "SOLVER.LOG_PERIOD is -1"),
        (["DATASETS.REGISTER", "[['shapes_val', 'a.json', 'b']]"], "'shapes_val' already"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "no weights file 'nowhere.pth'"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu'"),
        (["MODEL", "3"], "MODEL: expected keys below it"),
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER is 0"),
        (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "Cosine"),
        (["SOLVER.WARMUP_METHOD", "slow"], "SOLVER.WARMUP_METHOD 'linear' or 'constant'"),
        (["MODEL.RESNETS.NORM", "XX"], "MODEL.RESNETS.NORM: there is no 'XX'"),
        (["INPUT.MASK_FORMAT", "rle"], "INPUT.MASK_FORMAT is 'rle'"),
        (["OUTPUT_DIR", "/proc/x"], "OUTPUT_DIR '/proc/x' cannot be written"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_input_is_a_paragraph_and_exit_code_2(train_net, tiny_opts, capsys, arguments, expected):
    opts = [str(word) for word in tiny_opts] + arguments
    assert guarded(train_net.main, train_net.parse_args(["--config-file", SHAPES, *opts])) == 2
    message = capsys.readouterr().err.split("error: ")[-1].strip()
    assert expected in message and "Traceback" not in message and "\n" not in message


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["MODEL.RESNETS.NORM", "XX"], "MODEL.RESNETS.NORM: there is no 'XX'"),
        (["OUTPUT_DIR", "/proc/x"], "OUTPUT_DIR '/proc/x' cannot be written"),
        (["MODEL.META_ARCHITECTURE", "MyModel"], "MyModel"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "no weights file 'nowhere.pth'. Set MODEL.WEIGHTS to an existing file or URL."),
        (["MODEL.WEIGHTS", ""], "set MODEL.WEIGHTS, or add --resume to take the run's own"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_evaluation_says_what_is_wrong_as_training_does(train_net, tiny_opts, capsys, arguments, expected):
    test_wrong_input_is_a_paragraph_and_exit_code_2(train_net, ["--eval-only", *tiny_opts], capsys, arguments, expected)


def test_evaluation_of_a_run_without_checkpoints(train_net, tiny_opts, capsys, tmp_path):
    expected = f"there is no checkpoint in OUTPUT_DIR '{tmp_path}/output' to take them from; set MODEL.WEIGHTS"
    flags = ["--eval-only", "--resume", *tiny_opts]
    test_wrong_input_is_a_paragraph_and_exit_code_2(train_net, flags, capsys, ["MODEL.WEIGHTS", ""], expected)


@pytest.mark.parametrize(
    "flags, device, expected",
    [
        ([], "cpu", ("cpu", 0)),
        ([], "cuda", ("cuda", 4)),
        ([], "cuda:1", ("cuda:1", 1)),
        (["--num-gpus", "1"], "cpu", ("cuda", 1)),
        (["--num-gpus", "1"], "cuda:3", ("cuda:3", 1)),
        (["--num-gpus", "2"], "cuda:1", ("cuda", 2)),
        (["--num-gpus", "1", "--num-machines", "2"], "cuda:1", ("cuda", 1)),
        (["--num-gpus", "0"], "cuda:1", ("cpu", 0)),
        ([], "cuda:4", "has 4 GPUs"),
    ],
)
def test_device_is_what_the_flags_say(train_net, tiny_cfg, monkeypatch, flags, device, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    cfg, args = tiny_cfg(), train_net.parse_args(flags)
    cfg.MODEL.DEVICE = device
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            train_net.choose_device(args, cfg)
        return
    train_net.choose_device(args, cfg)
    assert (cfg.MODEL.DEVICE, args.num_gpus) == expected


def test_torchrun_gives_each_process_its_gpu(train_net, tiny_cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"LOCAL_RANK": 1, "RANK": 1, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    cfg = tiny_cfg()
    cfg.MODEL.DEVICE = "cuda:1"
    train_net.choose_device(train_net.parse_args(["--num-gpus", "1"]), cfg)
    assert cfg.MODEL.DEVICE == "cuda"
    with pytest.raises(ConfigError, match="torchrun started 8 processes on this machine, which has 4 GPUs"):
        launch(print, (), processes=1, use_gpu=True)


def test_torchrun_prints_an_error_once(tiny_opts, run_script):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    for opts in (["DATASETS.TRAIN", "()"], ["SOLVER.OPTIMIZER", "Lion"]):  # before the processes join, and after
        done = subprocess.run(
            [sys.executable, *map(str, torchrun), *command(tiny_opts)[1:], *opts],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode and done.stderr.count("\nerror: ") == 1, done.stderr


def test_data_of_no_known_kind(train_net, tiny_opts, capsys, monkeypatch):
    monkeypatch.delattr(MetadataCatalog.get("shapes_val"), "evaluator_type")
    assert guarded(train_net.main, train_net.parse_args(["--config-file", SHAPES, *map(str, tiny_opts)])) == 2
    assert "shapes_val has the evaluator type None" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "Pass --config-file"),
        (["--config-file", "nowhere.yaml"], "no config file 'nowhere.yaml'"),
        (["--config-file", SHAPES, "--num-gpus", "99"], "--num-gpus 99"),
        (["--config-file", SHAPES, "--num-gpus", "-1"], "--num-gpus -1"),
        (["--config-file", SHAPES, "--num-procs", "0"], "--num-procs"),
        (["--config-file", SHAPES, "--num-machines", "2", "--machine-rank", "2"], "--machine-rank"),
        (["--config-file", SHAPES, "--num-machines", "2"], "--dist-url"),
    ],
)
def test_wrong_flags(train_net, shapes_root, capsys, flags, expected):
    assert guarded(train_net.main, train_net.parse_args(flags)) == 2
    assert expected in capsys.readouterr().err


def test_missing_shapes_say_how_to_make_them(run_script, tmp_path):
    done = run_script("train_net.py", "--config-file", SHAPES, env={"DETECTRON2_DATASETS": str(tmp_path)})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "tools/prepare_shapes.py" in done.stderr and str(tmp_path) in done.stderr


def test_class_count_comes_from_own_data_set(train_net, shapes_root, tmp_path):
    annotations = json.loads((shapes_root / "shapes/coco/annotations/instances_train.json").read_text())
    annotations["categories"] = annotations["categories"][:3]
    kept = {category["id"] for category in annotations["categories"]}
    annotations["annotations"] = [a for a in annotations["annotations"] if a["category_id"] in kept]
    (tmp_path / "own.json").write_text(json.dumps(annotations))
    own = [["own_three_classes", str(tmp_path / "own.json"), str(shapes_root / "shapes/coco/train")]]
    base = str(REPO / "configs/baseline/mask_rcnn_R_50_FPN_1x.yaml")
    opts = ["DATASETS.REGISTER", json.dumps(own), "DATASETS.TRAIN", "('own_three_classes',)", "DATASETS.TEST", "()"]
    cfg = train_net.setup(train_net.parse_args(["--config-file", base, *opts]))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert cfg.OUTPUT_DIR == "output/baseline/mask_rcnn_R_50_FPN_1x"
    mixed = [*opts, "DATASETS.TEST", "('shapes_val',)"]
    assert guarded(train_net.main, train_net.parse_args(["--config-file", base, *mixed])) == 2


@pytest.mark.parametrize("content", ['{"images": [', "[]", '{"images": [], "annotations": []}'])
def test_malformed_own_data_is_named(train_net, tiny_opts, tmp_path, capsys, content):
    (tmp_path / "own.json").write_text(content)
    name = f"own_malformed_{len(content)}"
    own = ["DATASETS.REGISTER", json.dumps([[name, str(tmp_path / "own.json"), str(tmp_path)]])]
    opts = [*map(str, tiny_opts), *own, "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()"]
    assert guarded(train_net.main, train_net.parse_args(["--config-file", SHAPES, *opts])) == 2
    assert "own.json" in capsys.readouterr().err


def test_base_that_leads_back_to_itself(train_net, tmp_path, capsys):
    (tmp_path / "circle.yaml").write_text("_BASE_: circle.yaml\n")
    assert guarded(train_net.main, train_net.parse_args(["--config-file", str(tmp_path / "circle.yaml")])) == 2
    assert "leads back to itself" in capsys.readouterr().err


def test_a_folder_with_checkpoints_is_refused_and_left_alone(train_net, tiny_opts, tmp_path, capsys):
    folder = tmp_path / "output"
    folder.mkdir()
    for name in ("model_0000009.pth", "config.yaml"):
        (folder / name).write_text("earlier")
    arguments = ["--config-file", SHAPES, *map(str, tiny_opts)]
    assert guarded(train_net.main, train_net.parse_args(arguments)) == 2
    assert "--resume" in capsys.readouterr().err
    assert (folder / "config.yaml").read_text() == "earlier"


def start_and_wait_for(line: str, arguments: list[str], log: Path) -> subprocess.Popen:
    """train_net.py in a process group of its own, as on a terminal; returns when its log holds the line."""
    with open(log, "w") as file:
        running = subprocess.Popen(
            arguments, stdout=file, stderr=file, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    deadline = time.time() + 240
    while line not in log.read_text() and time.time() < deadline and running.poll() is None:
        time.sleep(0.05)
    return running


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("processes", [1, 2])
def test_signal_to_the_whole_group_saves(tiny_opts, tmp_path, processes, number):
    opts = ["SOLVER.MAX_ITER", 10_000, "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", {1: 2, 2: 0}[processes]]
    arguments = command(tiny_opts, "--num-procs", processes) + list(map(str, opts))
    running = start_and_wait_for("iteration 3/", arguments, tmp_path / "log")
    for _ in range(processes):
        os.killpg(running.pid, number)
        time.sleep(0.1)  # or the processes would often see the launcher's copy together with their own
    assert running.wait(60) == 128 + number, (tmp_path / "log").read_text()[-2000:]
    assert list((tmp_path / "output").glob("model_0*.pth"))


@pytest.mark.parametrize("processes", [1, 2])
def test_second_ctrl_c_does_not_wait(tiny_opts, tmp_path, processes):
    slow = ["SOLVER.IMS_PER_BATCH", 40, "SOLVER.ACCUMULATE", 50, "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 0]
    arguments = command(tiny_opts, "--num-procs", processes) + list(map(str, slow))
    running = start_and_wait_for("Training from iteration 0", arguments, tmp_path / "log")
    for _ in range(2):
        time.sleep(2.5)  # the other process needs a moment, and two signals at once are one
        assert running.poll() is None, (tmp_path / "log").read_text()[-2000:]
        os.killpg(running.pid, signal.SIGINT)
    assert running.wait(60) == 130, (tmp_path / "log").read_text()[-2000:]
    assert not list((tmp_path / "output").glob("model_*.pth"))
    assert "Traceback" not in (tmp_path / "log").read_text()


def command(tiny_opts, *more) -> list[str]:
    return [sys.executable, str(REPO / "train_net.py"), "--config-file", SHAPES, *map(str, [*more, *tiny_opts])]


def test_killed_run_resumes_to_the_same_end(tiny_opts, tmp_path):
    opts = ["SOLVER.MAX_ITER", 24, "SOLVER.CHECKPOINT_PERIOD", 4, "DATASETS.TEST", "()", "SOLVER.CHECKPOINTS_KEPT", 9]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    log = open(tmp_path / "log", "w")  # noqa: SIM115  outlives the process that writes it
    killed = subprocess.Popen(
        command(tiny_opts) + [*map(str, opts), "OUTPUT_DIR", str(parts)],
        env=env, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    deadline = time.time() + 120
    while not (parts / "model_0000007.pth").exists() and time.time() < deadline and killed.poll() is None:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    logs = []
    for folder, flags in ((parts, ["--resume"]), (whole, [])):
        done = subprocess.run(
            command(tiny_opts, *flags) + [*map(str, opts), "OUTPUT_DIR", str(folder)],
            env=env, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        logs.append(done.stdout + done.stderr)
    assert "Training from iteration 0 " in logs[1] and "Training from iteration 0 " not in logs[0]
    models = [torch.load(folder / "model_final.pth", weights_only=True)["model"] for folder in (whole, parts)]
    assert [name for name in models[0] if not torch.equal(models[0][name], models[1][name])] == []


def test_eval_only_writes_the_tables_of_training_and_refuses_what_does_not_fit(tiny_opts, run_script, tmp_path):
    trained = command(tiny_opts)[2:] + ["SOLVER.MAX_ITER", "2", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    done = run_script("train_net.py", *trained)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "output"
    results = json.loads((folder / "results.json").read_text())
    assert {"bbox", "segm"} <= results.keys()
    weights = str(folder / "model_final.pth")
    evaluated = [*trained, "OUTPUT_DIR", str(tmp_path / "evaluated"), "MODEL.WEIGHTS", weights]
    done = run_script("train_net.py", "--eval-only", *evaluated)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "evaluated/results.json").read_text() == (folder / "results.json").read_text()
    done = run_script("train_net.py", "--eval-only", *evaluated, "MODEL.ROI_MASK_HEAD.CONV_DIM", "8")
    assert done.returncode == 2 and "do not fit this config" in done.stderr and "Traceback" not in done.stderr


def test_real_photographs_train_and_evaluate(real_coco_root, run_script, tmp_path):
    config = REPO / "configs/baseline/tiny_coco_mask_rcnn_R_18_FPN.yaml"
    opts = ["SOLVER.MAX_ITER", 40, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 5, "SOLVER.LOG_PERIOD", 5]
    sizes = [
        "INPUT.MIN_SIZE_TRAIN",
        "(128,)",
        "INPUT.MIN_SIZE_TEST",
        128,
        "TEST.PICTURES",
        2,
        "MODEL.RPN.POST_NMS_TOPK_TEST",
        50,
    ]
    done = run_script(
        "train_net.py", "--config-file", config, *opts, *sizes, "OUTPUT_DIR", tmp_path,
        env={"DETECTRON2_DATASETS": str(real_coco_root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    curve = [row["total_loss"] for row in rows if "total_loss" in row]
    assert len(curve) == 8 and sum(curve[-3:]) < 0.8 * sum(curve[:3])
    assert json.loads((tmp_path / "results.json").read_text())["bbox"]["AP"] >= 0
    assert json.loads((tmp_path / "evaluation/coco_2017_train/coco_instances_results.json").read_text())
    assert len(list(tmp_path.glob("evaluation/coco_2017_train/pictures/*.png"))) == 2
