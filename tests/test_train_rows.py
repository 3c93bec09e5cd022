"""tools/train_rows.py: the table of a few runs, runs that are done or interrupted, and runs that fail."""

import json

import pytest

CONFIG = "configs/baseline/shapes_mask_rcnn_R_18_FPN.yaml"


def finished(output, seed, box, mask):
    folder = output / "baseline/shapes_mask_rcnn_R_18_FPN" / f"seed{seed}"
    folder.mkdir(parents=True)
    results = {"bbox": {"AP": box, "AP50": 99.0, "AP-circle": 1.0}, "segm": {"AP": mask}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.json").write_text("".join(json.dumps({"iteration": i, "time": 0.6}) + "\n" for i in (0, 50, 99)))
    return folder


def test_table_of_finished_runs(run_script, tmp_path):
    finished(tmp_path, 1, 50.0, 40.0)
    finished(tmp_path, 2, 53.0, 42.5)
    done = run_script("tools/train_rows.py", CONFIG, "--seeds", 1, 2, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[0] == ["config", "runs", "bbox/AP", "segm/AP", "minutes"]
    assert rows[2] == ["baseline/shapes_mask_rcnn_R_18_FPN", "2", "51.50 (3.00)", "41.25 (2.50)", "1.0"]
    done = run_script("tools/train_rows.py", CONFIG, "--seeds", 1, "--output", tmp_path, "--metrics", "bbox/AP50")
    assert "99.00 (0.00)" in done.stdout and "segm" not in done.stdout
    finished(tmp_path, 3, None, 42.0)  # as results.json has nan
    done = run_script("tools/train_rows.py", CONFIG, "--seeds", 1, 3, "--output", tmp_path)
    cells = [cell.strip() for cell in done.stdout.splitlines()[-1].split("|")[2:5]]
    assert cells == ["2", "nan", "41.00 (2.00)"], done.stderr
    (tmp_path / "baseline/shapes_mask_rcnn_R_18_FPN/seed1/metrics.json").unlink()  # as after a run of few iterations
    done = run_script("tools/train_rows.py", CONFIG, "--seeds", 1, "--output", tmp_path)
    assert done.stdout.splitlines()[-1].split("|")[-2].strip() == "-", done.stdout


@pytest.mark.parametrize("state", ["results.json", "last_checkpoint"])
def test_runs_of_other_overrides_are_refused(run_script, tmp_path, state):
    folder = finished(tmp_path, 1, 50.0, 40.0)
    (folder / "results.json").rename(folder / state)
    command = ["tools/train_rows.py", CONFIG, "--seeds", 1, "--num-gpus", 0, "--output", tmp_path]
    done = run_script(*command, "--opts", "SOLVER.MAX_ITER", 7)
    assert done.returncode == 2 and "Its overrides: not known" in done.stderr, done.stderr
    (folder / "overrides.json").write_text(json.dumps({"SOLVER.MAX_ITER": "7", "SOLVER.BASE_LR": "0.1"}))
    for opts, words in ((["SOLVER.MAX_ITER", 8], "SOLVER.MAX_ITER 8"), ([], "none")):
        done = run_script(*command, "--opts", *opts)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
        said = " ".join(done.stderr.split())
        for part in (str(folder), "SOLVER.MAX_ITER 7 SOLVER.BASE_LR 0.1;", f"this command: {words}.", "Use --output or remove"):
            assert part in said
    if state == "results.json":
        done = run_script(*command, "--opts", "SOLVER.BASE_LR", 0.1, "SOLVER.MAX_ITER", 7)  # in another order
        assert done.returncode == 0 and "50.00" in done.stdout, done.stderr


def test_trains_what_is_missing_and_says_what_failed(run_script, tiny_opts, tmp_path):
    opts = tiny_opts[: tiny_opts.index("OUTPUT_DIR")]
    command = ["tools/train_rows.py", CONFIG, "--seeds", 5, "--num-gpus", 0, "--output", tmp_path, "--opts"]
    failed = run_script(*command, *opts, "SOLVER.MAX_ITER", 2, "DATASETS.TRAIN", "('nowhere',)")
    assert failed.returncode == 1 and "not finished" in failed.stderr and "nowhere" in failed.stderr
    done = run_script(*command, *opts, "SOLVER.MAX_ITER", 2)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "baseline/shapes_mask_rcnn_R_18_FPN/seed5"
    assert (folder / "model_final.pth").is_file() and "SEED: 5" in (folder / "config.yaml").read_text()
    stamp = (folder / "results.json").stat().st_mtime_ns
    assert run_script(*command, *opts, "SOLVER.MAX_ITER", 2).returncode == 0  # the overrides of the failed run do not count
    assert (folder / "results.json").stat().st_mtime_ns == stamp
