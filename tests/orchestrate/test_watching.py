"""A real Prometheus with the committed configuration beside a live study: every panel shows something, alerts fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.processes import driver
from tests.orchestrate import tiny
from tests.orchestrate.test_alerts import DASHBOARDS, PROVOKED
from tests.s3_server import free_port

DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"  # where Ray writes it; the committed configuration says so
PANELS = json.loads((DASHBOARDS / "study.json").read_text())["panels"]
GUARD_SECONDS = 240.0
UNREADABLE = 4  # films, of the 60 that three cells of 12 + 6 training and three of 6 test films ask for
SHORT, LONG = 2, 20_000  # epochs of the trial that ends while the other runs

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus")


@dataclass(frozen=True)
class Prometheus:
    """The HTTP interface of a server."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """Return the answer's data; a refusal (an expression that does not parse) is an HTTPError with its reason."""
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.get("query", query=expression)["result"]

    def value(self, expression: str) -> float:
        (found,) = self.query(expression)
        return float(found["value"][1])


def expressions(panel: dict[str, Any]) -> list[str]:
    """Return a panel's expressions with every study chosen, as Grafana sends them."""
    found = [target["expr"].replace("$study", ".*") for target in panel["targets"]]
    assert not any("$" in expression for expression in found)
    return found


def needs_gpu(panel: dict[str, Any]) -> bool:
    return "gpu" in panel.get("raystudyTags", [])


def eventually(what: Callable[[], Any]) -> None:
    """Wait until ``what`` returns nothing more to wait for."""
    until = time.monotonic() + GUARD_SECONDS
    while left := what():
        assert time.monotonic() < until, f"still waiting for {left}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A server that has seen a study's first trial end and its second one train; the study still runs."""
    folder = tmp_path_factory.mktemp("watching")
    tiny.make_films(folder)
    for name in sorted((folder / "films").iterdir())[: 2 * UNREADABLE : 2]:
        name.write_bytes(b"no film")
    more = {"mixtures": [50], "axes": {"training.epochs": [SHORT, LONG]}, "cohort": {"train": 12, "val": 6, "test": 6}}
    file = tiny.experiment_file(folder, folder / "studies", **more)
    ray_folder = Path(tempfile.mkdtemp(prefix="raystudy-"))  # Ray's socket names must be short
    environment = {"RAY_TMPDIR": str(ray_folder), "RAY_metrics_report_interval_ms": "1000"}
    text = (DASHBOARDS / "prometheus.yml").read_text()
    assert DISCOVERY in text
    text = text.replace(DISCOVERY, str(ray_folder / DISCOVERY.removeprefix("/tmp/")))
    # A scrape may take no longer than its interval: a second is too little on a machine that does other work.
    text = text.replace("scrape_interval: 10s", "scrape_interval: 5s").replace(" 10s", " 1s")
    (folder / "prometheus.yml").write_text(text)
    shutil.copy(DASHBOARDS / "alerts.yml", folder)
    server = Prometheus(f"http://127.0.0.1:{free_port()}")
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address={server.url.removeprefix('http://')}"]
    log = folder / "prometheus.log"
    with (
        driver(file, folder / "studies", "--set", "images.unreadable=drop", **environment) as study,
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out) as process,
    ):

        def wanted() -> list[str]:
            assert study.alive, study.end()
            assert process.poll() is None, log.read_text()
            try:
                finished = server.query('ray_raystudy_explanations_total{state="finished"} == 2')
                running = server.query("ray_raystudy_epoch > 2 and ray_raystudy_images_per_second > 0")
                found = {"explained": finished, "trains": running, "scraped twice": server.query("rate(up[5m])")}
                found["has no more to explain"] = server.query("ray_raystudy_explanation_queue == 0")
            except urllib.error.URLError:
                return ["prometheus"]
            return [name for name, series in found.items() if not series]

        try:
            eventually(wanted)
            yield server
        finally:
            process.terminate()
    shutil.rmtree(ray_folder, ignore_errors=True)


def test_every_panel_shows_something_and_a_wrong_name_shows_nothing(prometheus: Prometheus) -> None:
    shown = {p["title"]: [prometheus.query(e) for e in expressions(p)] for p in PANELS if not needs_gpu(p)}
    assert len(shown) >= 15
    assert [title for title, targets in shown.items() if not all(targets)] == []
    assert prometheus.query("ray_raystudy_trails") == []
    gpu = [p for p in PANELS if needs_gpu(p)]
    assert gpu
    for panel in gpu:
        for expression in expressions(panel):
            prometheus.query(expression)  # parses
    with pytest.raises(urllib.error.HTTPError):
        prometheus.query("sum(ray_raystudy_trials")
    assert prometheus.get("label/study/values") == ["tiny"]  # what the dashboard's variable offers


def test_every_label_of_a_legend_is_there(prometheus: Prometheus) -> None:
    for panel in (p for p in PANELS if not needs_gpu(p)):
        for target, expression in zip(panel["targets"], expressions(panel), strict=True):
            labels = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            for series in prometheus.query(expression):
                assert set(labels) <= set(series["metric"]), panel["title"]


def test_what_is_shown_is_what_happens(prometheus: Prometheus) -> None:
    states = {s["metric"]["state"]: s["value"][1] for s in prometheus.query("ray_raystudy_trials")}
    assert states.pop("finished") == states.pop("running") == "1"
    assert set(states.items()) == {(s, "0") for s in ("waiting", "interrupted", "failed", "diverged", "stopped")}
    accuracy = prometheus.query("ray_raystudy_accuracy")
    assert {s["metric"]["test_set"] for s in accuracy} == {"Test-100H1", "Test-100H2", "Test-50-50"}
    assert {s["metric"]["h1_share"] for s in accuracy} == {"50"}
    assert {s["value"][1] for s in prometheus.query("ray_raystudy_epochs")} == {str(SHORT), str(LONG)}
    assert prometheus.value("ray_raystudy_explanation_queue") == 0
    assert prometheus.value("ray_raystudy_retries_total") == 0  # a counter is there before it counts
    assert prometheus.value("ray_raystudy_quarantined_images") > 0
    eventually(lambda: [t for t in prometheus.get("targets")["activeTargets"] if t["health"] != "up"])
    assert prometheus.get("targets")["activeTargets"]


def test_films_that_cannot_be_read_raise_their_alert_and_no_other(prometheus: Prometheus) -> None:
    (group,) = prometheus.get("rules")["groups"]
    eventually(lambda: [] if prometheus.query('ALERTS{alertstate="firing"}') else ["the alert"])
    firing = prometheus.query('ALERTS{alertstate="firing"}')
    assert [alert["metric"]["alertname"] for alert in firing] == ["RaystudyQuarantine"]
    assert {rule["name"] for rule in group["rules"]} == set(PROVOKED)
