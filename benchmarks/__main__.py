"""`python -m benchmarks [--only WORD]…`: every row measured side by side in this run, as a table of ratios."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys

import torch
from rich.console import Console
from rich.table import Table

MODULES = ("relevance_speed", "training_speed", "adai_speed", "images_speed", "service_speed")


def main() -> None:
    """Run the chosen modules and print their rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=MODULES, help="one part; repeatable")
    parser.add_argument("--json", help="also write the rows to this file")
    chosen = parser.parse_args()
    table = Table(title=f"raystudy benchmarks: {_machine()}", title_justify="left")
    for name in ("what", "ratio", "ours", "peer", "unit", "n", "note"):
        table.add_column(name, justify="right" if name in ("ratio", "ours", "peer", "n") else "left", overflow="fold")
    rows: list[dict[str, object]] = []
    for module in chosen.only or MODULES:
        print(f"measuring {module} …", file=sys.stderr, flush=True)
        for row in importlib.import_module(f"benchmarks.{module}").rows():
            print(f"{row['name']}: {row['ratio']:.3g}", file=sys.stderr, flush=True)
            rows.append(row)
    for row in rows:
        numbers = [f"{float(str(row[key])):.3g}" for key in ("ratio", "ours", "peer")]
        table.add_row(str(row["name"]), *numbers, str(row["unit"]), str(row["n"]), str(row["note"]))
    Console(width=160).print(table)
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2, default=str)


def _machine() -> str:
    return f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
