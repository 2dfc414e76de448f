"""The disk is full, or the object storage is away for a while: a refusal that names it, then the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raystudy.storage import Storage, open_storage
from raystudy.streams import stream
from raystudy.study import Study
from raystudy.trial import run_trial
from tests.faults.conftest import Tally, Undisturbed
from tests.faults.processes import driver, wait_until
from tests.s3_server import Door, S3Server
from tests.trial_example import FILES, data, spec

HERE = Path(__file__).parents[2]
OWN_MOUNTS = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]  # for one process

FULL_DISK = """
import json, subprocess, sys
from raystudy.errors import StudyError
from raystudy.storage import open_storage
from raystudy.trial import run_trial
from tests.trial_example import data, spec

folder, kept, *sizes = sys.argv[1:]
refusals = []
for n, size in enumerate(sizes):
    option = f"size={size}" if n == 0 else f"remount,size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder], check=True)
    try:
        run_trial(spec(), *data(), open_storage(folder), checkpoint_pause=0.0)
    except StudyError as error:
        refusals.append([error.what, error.where, error.remedy])
subprocess.run(["cp", "-r", f"{folder}/.", kept], check=True)
print(json.dumps(refusals))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a trial that nothing happened to."""
    storage = open_storage(tmp_path_factory.mktemp("whole"))
    run_trial(spec(), *data(), storage)
    return files(storage)


def files(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read_bytes(name) for name in FILES}


def fill_disks(folder: Path, whole: dict[str, bytes], sizes: list[str]) -> int:
    """Run a trial on a disk of one size after the other, the last large enough; return how often it was full."""
    disk, kept = folder / "disk", folder / "kept"
    disk.mkdir(parents=True)
    kept.mkdir()
    done = subprocess.run(
        [*OWN_MOUNTS, sys.executable, "-c", FULL_DISK, str(disk), str(kept), *sizes],
        capture_output=True, text=True, timeout=240, check=False, cwd=HERE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    refusals = json.loads(done.stdout)
    for what, where, remedy in refusals:
        assert "No space left on device" in what
        assert where.startswith(str(disk))
        assert "free space" in remedy
    assert files(open_storage(kept)) == whole
    return len(refusals)


def test_a_trial_on_a_full_disk_names_it_and_goes_on_when_there_is_room(
    whole: dict[str, bytes], tmp_path: Path, tally: Tally
) -> None:
    full = fill_disks(tmp_path, whole, ["100k", "2m", "200m"])
    tally(f"disk full {full} times, identical")
    assert full == 2


@pytest.mark.faults
def test_disks_of_many_sizes_fill_up_anywhere(whole: dict[str, bytes], tmp_path: Path, tally: Tally) -> None:
    draw = stream(31, "disks")
    full = 0
    for n in range(4):
        sizes = sorted(int(size) for size in draw.integers(50, 6_000, 6))
        full += fill_disks(tmp_path / f"{n}", whole, [*(f"{size}k" for size in sizes), "200m"])
    tally(f"disk full {full} times, identical")
    assert full >= 4


@pytest.mark.faults
def test_a_study_on_a_full_disk_says_so_and_ends_when_there_is_room(
    undisturbed: Undisturbed, tmp_path: Path, tally: Tally
) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=4m tmpfs {disk} && cp -r {undisturbed.root}/_images {disk}"
    run = f"{sys.executable} -m raystudy.cli run {undisturbed.file} --storage {disk}"
    script = (
        f"{mount} && {{ {run}; echo code $?; }} && mount -o remount,size=200m {disk} && {run} && cp -r {disk} {kept}"
    )
    done = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", script], capture_output=True, text=True, timeout=400, check=False, cwd=HERE
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert "code 1" in said or "code 2" in said
    undisturbed.assert_same(kept)
    tally("a study's disk was full, then identical")


def test_a_trial_waits_for_object_storage_that_is_away(
    whole: dict[str, bytes],
    s3_server: S3Server,
    s3_bucket: str,
    tally: Tally,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    door = Door(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{door.port}")
    asked = iter(range(1, 1000))
    away = (5, 40)  # in the warm stage, and later

    def should_stop() -> bool:
        if next(asked) in away:
            door.close()
            threading.Timer(3, door.open).start()
        return False

    storage = open_storage(s3_bucket)
    run_trial(spec(), *data(), storage, should_stop=should_stop, checkpoint_pause=0.0)
    assert files(storage) == whole
    door.close()
    tally(f"S3 away {len(away)} times for 3 s, identical")


@pytest.mark.faults
def test_a_study_waits_for_object_storage_that_is_away_for_half_a_minute(
    undisturbed: Undisturbed, s3_server: S3Server, s3_bucket: str, tally: Tally
) -> None:
    door = Door(s3_server.port)
    study = Study.at(s3_bucket, "tiny")
    address = {**s3_server.environment(), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{door.port}"}
    with driver(undisturbed.file, s3_bucket, **address) as started:
        assert wait_until(lambda: any("/events/" in n for n in study.storage.list("trials")), started)
        door.close()
        time.sleep(30)
        door.open()
        code, out = started.end()
    assert code == 0, out
    undisturbed.assert_same(s3_bucket)
    door.close()
    tally("S3 away for 30 s during a study, identical")
