"""train_net.py in each way to start several processes on CPUs: by itself, by torchrun, as two machines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from projects.engine.launch import free_port

REPO = Path(__file__).resolve().parents[2]
TRAIN = ["train_net.py", "--config-file", "configs/baseline/shapes_mask_rcnn_R_18_FPN.yaml", "--num-gpus", "0"]
PORT = "{port}"
WAYS = {
    "num-procs": [["python", *TRAIN, "--num-procs", "2"]],
    "torchrun": [["python", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", PORT, *TRAIN]],
    "machines": [
        ["python", *TRAIN, "--num-machines", "2", "--machine-rank", rank, "--dist-url", f"tcp://127.0.0.1:{PORT}"]
        for rank in ("0", "1")
    ],
}


def run(way: str, opts: list, folder: Path) -> dict:
    """The weights after training, once all processes have ended with 0."""
    port, environment = str(free_port()), {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []
    for rank, command in enumerate(WAYS[way]):
        words = [sys.executable, *(word.replace(PORT, port) for word in command[1:])]
        words += [*map(str, opts), "OUTPUT_DIR", str(folder)]
        with open(folder.with_suffix(f".{rank}.log"), "w") as log:
            started.append(subprocess.Popen(words, cwd=REPO, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
    codes = [process.wait(300) for process in started]
    logs = "".join(path.read_text() for path in folder.parent.glob(f"{folder.name}.*.log"))
    assert codes == [0] * len(codes), logs[-3000:]
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torchrun", "machines"])
def test_two_processes_train_the_same_model_however_started(way, tiny_opts, tmp_path):
    """Bit by bit."""
    opts = [*tiny_opts, "SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()"]
    opts = opts[: opts.index("OUTPUT_DIR")] + opts[opts.index("OUTPUT_DIR") + 2 :]
    found, expected = run(way, opts, tmp_path / way), run("num-procs", opts, tmp_path / "expected")
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
