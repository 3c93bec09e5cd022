"""The tools: the tables of a made-up evaluation, and that the benchmark measures what it says."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from projects.errors import DataError

REPO = Path(__file__).resolve().parents[2]


def tool(name):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, REPO / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables(tmp_path, capsys):
    for run, ap in (("a", 40.0), ("b", 43.0)):
        panoptic = {name + end: ap + i for i, name in enumerate(("PQ", "SQ", "RQ")) for end in ("", "_th", "_st")}
        segm = {"AP": ap, "AP50": 60.0, "AP-car": ap + 1, "AP50-car": 70.0}
        (tmp_path / run).mkdir()
        (tmp_path / run / "results.json").write_text(json.dumps({"segm": segm, "panoptic_seg": panoptic}))
    tables = tool("casnet_tables")
    assert tables.main(SimpleNamespace(runs=[str(tmp_path / "a"), str(tmp_path / "b/results.json")])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "Table" in line] == ["AP of the row of Table IV", "Table IV"]
    rows = [[word.strip() for word in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert ["car", "42.5 (3.0)", "70.0 (0.0)"] in rows and ["average", "41.5 (3.0)", "60.0 (0.0)"] in rows
    assert ["SQ", *["42.5 (3.0)"] * 3] in rows
    assert tables.cell([{"segm": {"AP": 1.26}}], "segm", "AP") == "1.3"
    assert tables.cell([{"segm": {}}, {"segm": {"AP": 1.0}}], "segm", "AP") == "-"
    with pytest.raises(DataError, match="absent' cannot be read"):
        tables.read_results([str(tmp_path / "absent")])
    for content, said in (("[1]", "does not hold metrics"), ('{"segm": 3}', "does not hold metrics"), ("{}", "has nothing"),
                          ('{"bbox": {}}', "has bbox: expected an evaluation with segm or panoptic_seg")):  # fmt: skip
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(DataError, match=said):
            tables.main(SimpleNamespace(runs=[str(tmp_path / "other.json")]))


@pytest.mark.slow
def test_the_benchmarks_street_has_sixty_instances_that_come_out():
    benchmark = tool("benchmark_casnet")
    scene, support = benchmark.street("cpu"), benchmark.CommonAttributeSupport(max_seeds=200)
    owner, instances, seeds = benchmark.post_process(scene, support)
    assert len(seeds.cells) == len(instances) == benchmark.INSTANCES
    assert torch.equal(owner >= 0, scene["labels"] > 0)
    seconds, same = benchmark.plain_loop(scene, support, pixels=300)
    assert same == 1 and seconds > 0
