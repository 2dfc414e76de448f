"""The committed Prometheus configuration and alerts, checked by promtool: each alert is silent, then fires."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

DASHBOARDS = Path(__file__).parents[2] / "dashboards"

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")


def promtool(*arguments: str, folder: Path = DASHBOARDS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=60)


def test_promtool_accepts_configuration_and_rules() -> None:
    checked = promtool("check", "config", "prometheus.yml")
    assert checked.returncode == 0, checked.stderr
    rules = promtool("check", "rules", "alerts.yml")
    assert rules.returncode == 0, rules.stderr
    assert f"{len(PROVOKED)} rules found" in rules.stdout


STUDY = 'study="s"'
# alert -> series by the minute, the last minute at which it is silent, the first at which it fires, its summary then
PROVOKED: dict[str, tuple[dict[str, str], int, int, str]] = {
    "RaystudyTrialStuck": (
        {f'ray_raystudy_last_event_seconds{{{STUDY},trial_id="t"}}': "0+60x30"},
        16, 17, "t has said nothing for 17m 0s",
    ),
    "RaystudyRetries": (  # two drivers, one after the other
        {
            f'ray_raystudy_retries_total{{{STUDY},WorkerId="1"}}': "0 0 1 2 2x20 _x20",
            f'ray_raystudy_retries_total{{{STUDY},WorkerId="2"}}': "_x25 0 1 1 2 2x20",
        },
        27, 28, "s: 4 retries in half an hour",
    ),
    "RaystudyNoProgress": (
        {
            f'ray_raystudy_trials{{{STUDY},state="waiting"}}': "2x30",
            f'ray_raystudy_trials{{{STUDY},state="running"}}': "1x4 0x30",
            f'ray_raystudy_explanations_total{{{STUDY},state="finished"}}': "0x6 1x30",
        },
        18, 19, "s: trials wait and none runs",
    ),
    "RaystudyQuarantine": (
        {
            f"ray_raystudy_images{{{STUDY}}}": "0 1000x20",
            f"ray_raystudy_quarantined_images{{{STUDY}}}": "0 10x8 11x20",
        },
        9, 10, "s: 1.1% of the images cannot be read",
    ),
    "RaystudyDriverGone": (
        {
            f'ray_raystudy_trials{{{STUDY},state="waiting"}}': "20x5 stale",
            f'ray_raystudy_trials{{{STUDY},state="running"}}': "2x5 stale",
            f'ray_raystudy_trials{{{STUDY},state="finished"}}': "1x5 stale",
            f"ray_raystudy_on_cluster{{{STUDY}}}": "1x5 stale",
        },
        15, 16, "s: its driver is gone, 22 trials waited or ran when it was last seen",
    ),
}  # fmt: skip


# what no alert of a driver that is gone, and none of a study that does not go on, follows
WAITING, RUNNING, ON_CLUSTER = (
    f"ray_raystudy_{name}" for name in ('trials{state="waiting",', 'trials{state="running",', "on_cluster{")
)
WELL = {
    "the study is done": {
        f'{WAITING}WorkerId="1"': "2x5 0x5 stale",
        f'{RUNNING}WorkerId="1"': "1x9 0 stale",
        f'{ON_CLUSTER}WorkerId="1"': "1x10 stale",
    },
    "the next driver did the rest": {
        f'{WAITING}WorkerId="1"': "20x5 stale",
        f'{RUNNING}WorkerId="1"': "2x5 stale",
        f'{ON_CLUSTER}WorkerId="1"': "1x5 stale",
        f'{WAITING}WorkerId="2"': "_x9 20x5 0x5 stale",
        f'{RUNNING}WorkerId="2"': "_x9 0x5 2x4 0 stale",
        f'{ON_CLUSTER}WorkerId="2"': "_x9 1x11 stale",
    },
    "its own Ray ended before it could say that the last trial had": {
        f'{WAITING}WorkerId="1"': "2x5 0x5 stale",
        f'{RUNNING}WorkerId="1"': "1x11 stale",
        f'{ON_CLUSTER}WorkerId="1"': "0x11 stale",
    },
    "only what failed is tried again, and its explanations go on": {
        f'{WAITING}WorkerId="1"': "20x60 stale",
        f'{RUNNING}WorkerId="1"': "0x60 stale",
        f'{ON_CLUSTER}WorkerId="1"': "0x60 stale",
        'ray_raystudy_explanations_total{state="finished"': "0x4 1x8 2x8 3x8 4x8 5x8 6x8 stale",
    },
}


@pytest.mark.parametrize("case", WELL)
def test_a_driver_that_works_or_ended_well_raises_no_alert(case: str, tmp_path: Path) -> None:
    series = [{"series": f"{name},{STUDY}}}", "values": values} for name, values in WELL[case].items()]
    alerts = ("RaystudyDriverGone", "RaystudyNoProgress")
    quiet = [{"eval_time": f"{m}m", "alertname": a, "exp_alerts": []} for m in range(0, 120, 4) for a in alerts]
    shutil.copy(DASHBOARDS / "alerts.yml", tmp_path)
    test = {"interval": "1m", "input_series": series, "alert_rule_test": quiet}
    tree = {"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "well.yml").write_text(yaml.safe_dump(tree))
    shown = promtool("test", "rules", "well.yml", folder=tmp_path)
    assert shown.returncode == 0, shown.stdout


def provoke(alert: str, rules: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Let promtool look at an alert at its two minutes."""
    series, silent, firing, summary = PROVOKED[alert]
    (rule,) = [r for r in yaml.safe_load(rules)["groups"][0]["rules"] if r["alert"] == alert]
    labels = {"study": "s", **rule["labels"], **({"trial_id": "t"} if alert == "RaystudyTrialStuck" else {})}
    expected = {"exp_labels": labels, "exp_annotations": {"summary": summary}}
    looks = [
        {"eval_time": f"{silent}m", "alertname": alert, "exp_alerts": []},
        {"eval_time": f"{firing}m", "alertname": alert, "exp_alerts": [expected]},
    ]
    given = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": given, "alert_rule_test": looks}
    (folder / "alerts.yml").write_text(rules)
    tree = {"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": [test]}
    (folder / "provoked.yml").write_text(yaml.safe_dump(tree))
    return promtool("test", "rules", "provoked.yml", folder=folder)


@pytest.mark.parametrize("alert", PROVOKED)
def test_an_alert_is_silent_until_its_limit_and_fires_beyond_it(alert: str, tmp_path: Path) -> None:
    rules = (DASHBOARDS / "alerts.yml").read_text()
    shown = provoke(alert, rules, tmp_path)
    assert shown.returncode == 0, shown.stdout
    wrong = provoke(alert, rules.replace("ray_raystudy_", "ray_raystudie_"), tmp_path)
    assert wrong.returncode == 1  # a name that nobody exports never fires
