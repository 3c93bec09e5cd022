#!/usr/bin/env python
"""CASNet's Tables III (AP by class) and IV (PQ, SQ, RQ of things and stuff) as Markdown, from evaluations.

    python tools/casnet_tables.py output/casnet/instance_oracle      Table III
    python tools/casnet_tables.py output/casnet/panoptic_oracle      Table IV, and the AP of that row in the form of Table III

An argument is a folder with a results.json, or such a file. Several are runs of one row: then a cell is "mean (spread)", the
spread being the largest less the smallest. A table whose metrics are absent is left out.
"""

import argparse
import json
import sys
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from projects.engine.launch import guarded
from projects.errors import DataError

Results = list[dict[str, dict[str, float]]]  # of each run: {task: {metric: value in per cent}}


def read_results(places: list[str]) -> Results:
    """The content of each results.json. Raises DataError where one is missing, damaged or something else."""
    found = []
    for place in map(Path, places):
        path = place / "results.json" if place.is_dir() else place
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"'{path}' cannot be read ({error}). Expected the results.json of an evaluation.") from error
        if not isinstance(content, dict) or not all(isinstance(metrics, dict) for metrics in content.values()):
            raise DataError(f"'{path}' does not hold metrics by task. Expected the results.json of an evaluation.")
        found.append(content)
    return found


def cell(runs: Results, task: str, metric: str) -> str:
    """The mean of a metric, with the spread of several runs; "-" where a run does not have it."""
    values = [run.get(task, {}).get(metric) for run in runs]
    if None in values:
        return "-"
    mean = sum(values) / len(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({max(values) - min(values):.1f})"


def table_3(runs: Results) -> str:
    """AP and AP50 of each thing class."""
    classes = [metric[3:] for metric in runs[0]["segm"] if metric.startswith("AP-")]
    lines = [(name, cell(runs, "segm", f"AP-{name}"), cell(runs, "segm", f"AP50-{name}")) for name in classes]
    lines.append(("average", cell(runs, "segm", "AP"), cell(runs, "segm", "AP50")))
    return tabulate(lines, headers=("thing classes", "AP", "AP50"), tablefmt="pipe", disable_numparse=True)


def table_4(runs: Results) -> str:
    """PQ, SQ and RQ of all classes, things and stuff."""
    kinds = {"All": "", "Thing": "_th", "Stuff": "_st"}
    lines = [(name, *(cell(runs, "panoptic_seg", name + end) for end in kinds.values())) for name in ("PQ", "SQ", "RQ")]
    return tabulate(lines, headers=("Category", *kinds), tablefmt="pipe", disable_numparse=True)


def main(args: argparse.Namespace) -> int:
    runs = read_results(args.runs)
    third = "AP of the row of Table IV" if "panoptic_seg" in runs[0] else "Table III"
    tables = {"segm": (third, table_3), "panoptic_seg": ("Table IV", table_4)}
    if not tables.keys() & runs[0].keys():
        raise DataError(
            f"'{args.runs[0]}' has {', '.join(runs[0]) or 'nothing'}: expected an evaluation with {' or '.join(tables)}."
        )
    for task, (title, table) in tables.items():
        if task in runs[0]:
            print(f"{title}\n\n{table(runs)}\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder with a results.json, or such a file")
    sys.exit(guarded(main, parser.parse_args()))
