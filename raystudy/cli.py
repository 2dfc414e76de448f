"""The command line: parses, calls, prints; decides nothing.

Exit codes: 0 done, 1 the study finished with failed trials, 2 a refusal with its remedy, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from raystudy.errors import StudyError


class _Verbs(TyperGroup):
    """The verbs; a refusal or an interruption in any of them is a message and an exit code, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except StudyError as error:
            print(f"error: {error}", file=sys.stderr)
            ctx.exit(2)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            ctx.exit(130)


app = typer.Typer(
    name="raystudy",
    cls=_Verbs,
    help="Does a multi-hospital X-ray classifier see the disease, or the hospital?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

WIDE = 200  # columns of a table that goes into a file or a pipe
ExperimentFile = Annotated[Path, typer.Argument(help="The experiment file, e.g. experiments/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one key of the experiment: training.epochs=12, seeds=[0,1]. Repeatable."),
]
StorageOption = Annotated[
    str | None, typer.Option("--storage", help="Where studies live: a folder or s3://bucket/path.")
]
TrackingOption = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow: sqlite:///FILE or http://HOST:PORT.")
]
Only = Annotated[str | None, typer.Option("--only", help="`failed`: retry the failed trials and nothing else.")]
TakeOver = Annotated[bool, typer.Option("--take-over", help="Take the study over from a dead driver on another host.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _load(file: Path, overrides: list[str] | None, storage: str | None = None, tracking_uri: str | None = None) -> Any:
    from raystudy.config import load_experiment

    extra = [*(overrides or [])]
    if storage is not None:
        extra.append(f"storage={json.dumps(storage)}")
    if tracking_uri is not None:
        extra.append(f"tracking.uri={json.dumps(tracking_uri)}")
    return load_experiment(file, extra)


def _only_failed(only: str | None) -> bool:
    if only not in (None, "failed"):
        raise StudyError(f"--only {only!r} is unknown", remedy="--only failed")
    return only == "failed"


@app.command(
    epilog="Examples: `raystudy plan experiments/paper.yaml`, `raystudy plan --check 63.89 --n 290`",
)
def plan(
    experiment: Annotated[Path | None, typer.Argument(help="The experiment file.")] = None,
    as_json: AsJson = False,
    check: Annotated[
        str | None, typer.Option("--check", help="Is this accuracy (percent, as printed) attainable at --n?")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Number of test images, with --check.")] = None,
    overrides: Overrides = None,
    storage: StorageOption = None,
) -> None:
    """Say who would be in the study, what it would cost and how precise it would be; trains nothing."""
    from raystudy.orchestrate import plan_text

    if check is not None or n is not None:
        if check is None or n is None:
            raise StudyError("--check and --n belong together", remedy="raystudy plan --check 63.89 --n 290")
        plan_text.print_attainable(check, n, as_json)
        return
    if experiment is None:
        raise StudyError("no experiment file given", remedy="raystudy plan experiments/demo.yaml")
    plan_text.print_plan(_load(experiment, overrides, storage), as_json)


@app.command(epilog="Example: `raystudy prepare experiments/demo.yaml`")
def prepare(experiment: ExperimentFile, overrides: Overrides = None, storage: StorageOption = None) -> None:
    """Decode all images of the study into the image store (resumable; `run` does it too)."""
    tree = _load(experiment, overrides, storage)  # a bad file is refused before torch and Ray are loaded
    from raystudy.orchestrate import driver

    driver.prepare_only(tree)


@app.command(
    epilog="Examples: `raystudy run experiments/demo.yaml`, "
    "`raystudy run experiments/demo.yaml --set seeds=[0,1]`, `raystudy run experiments/demo.yaml --only failed`",
)
def run(
    experiment: ExperimentFile,
    only: Only = None,
    overrides: Overrides = None,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    address: Annotated[str | None, typer.Option("--address", help="A running Ray cluster; default: Ray here.")] = None,
    take_over: TakeOver = False,
) -> None:
    """Run whatever is missing: trials, explanations, the MLflow mirror and the report."""
    failed = _only_failed(only)
    tree = _load(experiment, overrides, storage, tracking_uri)
    from raystudy.orchestrate import driver

    raise typer.Exit(driver.run(tree, only_failed=failed, address=address, take_over=take_over))


@app.command(
    epilog="Examples: `raystudy status experiments/demo.yaml`, `raystudy status experiments/demo.yaml --watch`"
)
def status(
    experiment: ExperimentFile,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every two seconds until the study is done.")] = False,
    overrides: Overrides = None,
    storage: StorageOption = None,
) -> None:
    """Show every trial's state, stage, epoch and speed, from the study directory alone."""
    from rich.live import Live

    from raystudy.status_text import as_dict, table
    from raystudy.study import Study

    tree = _load(experiment, overrides, storage)
    study = Study.at(tree.storage, tree.name).require()
    if as_json:
        print(json.dumps(as_dict(study.status()), indent=2))
        return
    if not watch:
        Console(width=None if sys.stdout.isatty() else WIDE).print(table(study.status()))
        return
    with Live(table(study.status(), may_be_cut=True), refresh_per_second=2) as live:
        while True:
            now = study.status()
            live.update(table(now, may_be_cut=True))
            if not now.counts["running"] and not now.driver:
                return
            time.sleep(2)


@app.command(epilog="Example: `raystudy report experiments/demo.yaml --sync`")
def report(
    experiment: ExperimentFile,
    as_json: AsJson = False,
    sync: Annotated[bool, typer.Option("--sync", help="Also repair the MLflow mirror; no driver may run.")] = False,
    take_over: TakeOver = False,
    overrides: Overrides = None,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
) -> None:
    """Make figures, tables and the HTML page from the study directory alone."""
    from raystudy.lock import REPAIR, locked
    from raystudy.report.page import write_report
    from raystudy.study import Study

    tree = _load(experiment, overrides, storage, tracking_uri)
    study = Study.at(tree.storage, tree.name).require()
    if sync and not tree.tracking.enabled:
        raise StudyError(
            "there is no mirror to repair: tracking.enabled is false", remedy="--set tracking.enabled=true"
        )
    told, refusal = "", None
    with locked(study.storage, take_over=take_over, work=REPAIR) if sync else nullcontext() as lock:
        try:
            written = write_report(study)
            told = json.dumps(written.as_dict(), indent=2) if as_json else written.text()
        except StudyError as error:
            refusal = error
        if sync:  # also of a study that has nothing to report: its trials were interrupted, or failed
            from raystudy.tracking import sync_study

            sync_study(study, tree.tracking, lock.lost_event if lock else None)
    if refusal is not None:
        raise refusal
    print(told)


@app.command(epilog="Example: `raystudy explain experiments/demo.yaml pneumonia-h1_090-seed0-3fa9c1 H1/film.png`")
def explain(
    experiment: ExperimentFile,
    trial: Annotated[str, typer.Argument(help="A finished trial's id, or an unambiguous beginning of it.")],
    images: Annotated[list[str], typer.Argument(help="Image ids of the study, or PNG/JPEG files.")],
    overrides: Overrides = None,
    storage: StorageOption = None,
) -> None:
    """Explain a finished trial's prediction for single images: one picture each."""
    from raystudy.report.single import explain_images
    from raystudy.study import Study

    tree = _load(experiment, overrides, storage)
    study = Study.at(tree.storage, tree.name).require()
    for path in explain_images(study, trial, images, tree.explain, tree.images):
        print(path)


@app.command(epilog="Example: `raystudy submit experiments/paper.yaml --address http://HEAD:8265`")
def submit(
    experiment: ExperimentFile,
    address: Annotated[str, typer.Option("--address", help="The Ray dashboard's address, http://HEAD:8265.")],
    overrides: Overrides = None,
    storage: StorageOption = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Follow the job's log.")] = True,
    only: Only = None,
    take_over: TakeOver = False,
) -> None:
    """Submit the study to a running cluster as a Ray job; it survives this terminal."""
    from raystudy.orchestrate import jobs

    failed = _only_failed(only)
    tree = _load(experiment, overrides, storage)
    raise typer.Exit(jobs.submit(tree, address, follow=follow, only_failed=failed, take_over=take_over))


@app.command(epilog="Example: `raystudy stop experiments/demo.yaml`")
def stop(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    storage: StorageOption = None,
) -> None:
    """Ask a running study to stop: every trial writes a checkpoint and ends; `run` goes on from there."""
    from raystudy.orchestrate import jobs

    jobs.stop(_load(experiment, overrides, storage))


@app.command(epilog="Example: `raystudy doctor experiments/paper.yaml --address http://HEAD:8265`")
def doctor(
    experiment: Annotated[Path | None, typer.Argument(help="Also check its storage and tracking.")] = None,
    address: Annotated[str | None, typer.Option("--address", help="Also check this Ray cluster.")] = None,
    overrides: Overrides = None,
    storage: StorageOption = None,
) -> None:
    """Check versions, storage, the cluster's address and token, and MLflow; name every remedy."""
    from raystudy.orchestrate.doctor import examine

    tree = _load(experiment, overrides, storage) if experiment else None
    raise typer.Exit(examine(tree, address))


def main() -> None:
    """Run the verb of the command line."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    app()


if __name__ == "__main__":
    main()
