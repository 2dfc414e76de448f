"""Originals of a study become an image store through Ray Data, on a folder and on S3."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from raystudy.errors import StudyError
from raystudy.images import prepare
from raystudy.images.decode import decode_film
from raystudy.images.prepare import BLOCK_FILMS, prepare_images
from raystudy.images.settings import ImageSettings
from raystudy.images.store import load_index, load_pixels, load_quarantine, pixels_key, read_catalog
from raystudy.storage import Storage, open_storage
from raystudy.streams import stream
from tests.images.films import encoded, film
from tests.images.hostile import hostile_files
from tests.s3_server import S3Server

SETTINGS = ImageSettings(size=32)
KILLER, FICKLE = "killer.png", "fickle.png"

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "root")
    return open_storage(request.getfixturevalue("s3_bucket"))


class Deadly(ImageSettings):
    """Settings with which a worker's decoder dies on ``KILLER``, and on ``FICKLE`` the first time only."""

    def __init__(self, marker: Path) -> None:
        super().__init__(size=32)
        object.__setattr__(self, "marker", marker)

    def __reduce__(self) -> tuple[object, ...]:
        return armed, (os.getpid(), self.__dict__["marker"])


def armed(driver: int, marker: Path) -> ImageSettings:
    def decode(data: bytes, name: str, settings: ImageSettings) -> np.ndarray:
        first = name == FICKLE and not marker.exists()
        if first:
            marker.touch()
        if first or name == KILLER:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode_film(data, name, settings)

    if os.getpid() != driver:
        prepare.decode_film = decode
    return SETTINGS


def write_films(storage: Storage, n: int, start: int = 0) -> pd.DataFrame:
    """Write n different PNG films; return their canonical columns."""
    rows = []
    for number in range(start, start + n):
        name = f"originals/{number % 3}/{number:05d}.png"
        storage.write_bytes(name, encoded(film(stream(7, "film", number), 40, 36), "PNG"))
        rows.append({"image_id": f"H1/{number:05d}.png", "uri": storage.address(name)})
    return pd.DataFrame(rows)


def blocks(storage: Storage) -> list[str]:
    return [path for path in storage.list("studies/_images") if "/blocks/" in path]


def test_films_come_back_as_decoded_in_the_order_asked_for(storage: Storage) -> None:
    table = write_films(storage, BLOCK_FILMS + 7)
    seen: list[tuple[int, int, float]] = []
    prepared = prepare_images(table, SETTINGS, storage.child("studies"), lambda *values: seen.append(values))
    assert (prepared.n_new, prepared.n_reused, len(prepared.quarantine)) == (len(table), 0, 0)
    assert seen[-1][:2] == (len(table), len(table))
    assert seen[-1][2] > 0

    shuffled = table.sample(frac=1, random_state=0)
    films = load_pixels(storage.child("studies"), prepared.key, shuffled["image_id"])
    assert films.image_ids == tuple(shuffled["image_id"])
    assert films.pixels.dtype == np.uint8
    for image_id, uri in shuffled.itertuples(index=False):
        original = storage.read_bytes(uri.removeprefix(storage.uri + "/"))
        np.testing.assert_array_equal(films.take([image_id])[0], decode_film(original, uri, SETTINGS))


def test_a_second_study_decodes_only_what_the_first_had_not(storage: Storage) -> None:
    table = write_films(storage, 20)
    studies = storage.child("studies")
    first = prepare_images(table.iloc[:15], SETTINGS, studies)
    renamed = table.iloc[5:].assign(image_id=lambda t: t["image_id"].str.replace("H1/", "X/"))
    second = prepare_images(renamed, SETTINGS, studies)
    assert (second.n_new, second.n_reused) == (5, 10)
    again = prepare_images(renamed, SETTINGS, studies)
    assert (again.n_new, again.n_reused, again.key) == (0, 15, second.key)
    assert first.key != second.key
    assert len(blocks(storage)) == 2
    np.testing.assert_array_equal(
        load_pixels(studies, second.key, ["X/00007.png"]).pixels,
        load_pixels(studies, first.key, ["H1/00007.png"]).pixels,
    )
    other = prepare_images(table.iloc[:3], ImageSettings(size=48), studies)
    assert (other.n_new, other.key.split("-")[0]) == (3, "squash48")


def test_the_catalogue_is_what_its_blocks_say(storage: Storage) -> None:
    table, studies, pixels = write_films(storage, BLOCK_FILMS + 3), storage.child("studies"), pixels_key(SETTINGS)
    storage.write_bytes("originals/2/00002.png", b"no film")
    assert len(prepare_images(table, SETTINGS, studies).quarantine) == 1
    first = read_catalog(studies, pixels)
    assert (len(first.films), first.loose, len(first.files)) == (len(table), 0, 1)
    studies.delete_tree(f"_images/{pixels}/catalog")
    anew = read_catalog(studies, pixels)
    assert anew.loose == 2
    pd.testing.assert_frame_equal(*(c.films.sort_values("fingerprint", ignore_index=True) for c in (first, anew)))


def test_a_prepare_keeps_the_catalogue_that_another_wrote_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, pixels = open_storage(tmp_path), pixels_key(SETTINGS)
    table, studies = write_films(root, 8), root.child("studies")
    alone = prepare._decode_all

    def while_another_prepares(*given: Any) -> Any:
        monkeypatch.setattr(prepare, "_decode_all", alone)
        assert prepare_images(table[:5], SETTINGS, studies).n_new == 5
        return alone(*given)

    monkeypatch.setattr(prepare, "_decode_all", while_another_prepares)
    assert prepare_images(table[5:], SETTINGS, studies).n_new == 3
    found = read_catalog(studies, pixels)
    assert (len(found.films), found.loose, len(found.files)) == (8, 0, 2)
    assert prepare_images(table, SETTINGS, studies).n_reused == 8


def test_an_original_that_was_replaced_is_decoded_again(tmp_path: Path) -> None:
    root = open_storage(tmp_path)
    table = write_films(root, 4)
    first = prepare_images(table, SETTINGS, root.child("studies"))
    path = Path(table["uri"][1])
    path.write_bytes(encoded(film(stream(8, "film", 1), 40, 36), "PNG"))
    os.utime(path, ns=(1, 1))
    second = prepare_images(table, SETTINGS, root.child("studies"))
    assert (second.n_new, second.n_reused) == (1, 3)
    ids = list(table["image_id"])
    before, after = (load_pixels(root.child("studies"), p.key, ids).pixels for p in (first, second))
    assert [bool((a != b).any()) for a, b in zip(before, after, strict=True)] == [False, True, False, False]


def test_every_unusable_film_is_quarantined_with_its_reason(storage: Storage) -> None:
    table = write_films(storage, 6)
    good = storage.read_bytes("originals/0/00000.png")
    bad = {"a/cut.png": good[:-30], "a/empty.png": b"", "a/page.png": b"<html>", "a/wrong.jpg": good}
    for name, data in bad.items():
        storage.write_bytes(name, data)
    extra = [
        {"image_id": f"H1/{name}", "uri": storage.address(name)} for name in [*bad, "a/absent.png", "no/where.png"]
    ]
    double = [{"image_id": "H1/00005.png", "uri": storage.address("originals/1/00004.png")}]
    everything = pd.concat([table, pd.DataFrame(extra + double)], ignore_index=True)
    prepared = prepare_images(everything, SETTINGS, storage.child("studies"))
    reasons = dict(zip(prepared.quarantine["image_id"], prepared.quarantine["reason"], strict=True))
    assert {name.removeprefix("H1/"): reason.split(":")[0] for name, reason in reasons.items()} == {
        "a/cut.png": "truncated", "a/empty.png": "zero bytes", "a/page.png": "not an image",
        "a/wrong.jpg": "wrong extension", "a/absent.png": "missing", "no/where.png": "missing",
        "00005.png": "duplicated id",
    }  # fmt: skip
    studies = storage.child("studies")
    pd.testing.assert_frame_equal(load_quarantine(studies, prepared.key), prepared.quarantine)
    assert sorted(load_index(studies, prepared.key)["image_id"]) == sorted(table["image_id"][:5])
    with pytest.raises(StudyError, match=r"1 films are not in the image store: H1/a/cut\.png"):
        load_pixels(studies, prepared.key, ["H1/a/cut.png", "H1/00000.png"])


def test_hostile_files_never_reach_a_cohort_and_are_not_decoded_twice(tmp_path: Path) -> None:
    root = open_storage(tmp_path)
    rows = []
    for number, (name, data, _) in enumerate(hostile_files(21, 60)):
        path = f"originals/{number}/{name}"
        root.write_bytes(path, data)
        rows.append({"image_id": f"H1/{number}", "uri": root.address(path)})
    table = pd.concat([pd.DataFrame(rows), write_films(root, 3)], ignore_index=True)
    prepared = prepare_images(table, SETTINGS, root.child("studies"))
    assert sorted(prepared.quarantine["image_id"]) == sorted(row["image_id"] for row in rows)
    assert prepared.quarantine["reason"].str.len().min() > 0
    again = prepare_images(table, SETTINGS, root.child("studies"))
    assert again.n_new == 0
    pd.testing.assert_frame_equal(again.quarantine, prepared.quarantine)


def test_films_of_an_unprepared_study_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="raystudy prepare"):
        load_pixels(open_storage(tmp_path), "squash32-00000000-000000000000", ["a"])


def test_a_storage_that_cannot_be_reached_stops_prepare_with_its_message(
    s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = pd.DataFrame([{"image_id": "a", "uri": "s3://no-such-bucket/a.png"}])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("raystudy.storage.RETRY_SECONDS", 0.5)
    with pytest.raises(StudyError, match="no answer"):
        prepare_images(table, SETTINGS, open_storage(tmp_path))


def test_a_storage_that_refuses_in_a_worker_is_one_message_too(tmp_path: Path) -> None:
    root = open_storage(tmp_path)
    table = write_films(root, 2)
    (tmp_path / "studies/_images").mkdir(parents=True)
    (tmp_path / "studies/_images" / prepare.pixels_key(SETTINGS)).write_bytes(b"a file where a folder should be")
    with pytest.raises(StudyError, match="--storage"):
        prepare_images(table, SETTINGS, root.child("studies"))


def test_a_film_that_kills_its_worker_is_quarantined_and_the_others_are_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "BLOCK_FILMS", 5)  # ten films a task
    root = open_storage(tmp_path)
    table = write_films(root, 18)
    for place, name in (("originals/0", KILLER), ("z", FICKLE)):  # the first task's and the last one's
        path = f"{place}/{name}"
        root.write_bytes(path, root.read_bytes("originals/0/00000.png"))
        table.loc[len(table)] = [f"H1/{name}", root.address(path)]
    seen: list[tuple[int, int, float]] = []
    studies = root.child("studies")
    prepared = prepare_images(table, Deadly(tmp_path / "marker"), studies, lambda *values: seen.append(values))
    assert prepared.quarantine.values.tolist() == [
        [f"H1/{KILLER}", root.address(f"originals/0/{KILLER}"), "its decoder died"]
    ]
    assert (tmp_path / "marker").exists()  # a worker that dies once takes no film along
    assert seen[-1][:2] == (len(table) - 1, len(table))
    readable = table["image_id"][table["image_id"] != f"H1/{KILLER}"]
    assert len(load_pixels(studies, prepared.key, readable).image_ids) == len(table) - 1
    again = prepare_images(table, SETTINGS, studies)  # another machine or decoder may read it
    assert (again.n_new, len(again.quarantine)) == (1, 0)


def test_workers_that_die_on_every_film_end_prepare_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "MOST_DEATHS", 1)
    monkeypatch.setattr(prepare, "TRIES", 2)
    root = open_storage(tmp_path)
    table = pd.DataFrame([{"image_id": str(n), "uri": root.address(f"{n}/{KILLER}")} for n in range(3)])
    for uri in table["uri"]:
        root.write_bytes(uri.removeprefix(f"{root.uri}/"), encoded(film(stream(7, "film"), 40, 36), "PNG"))
    with pytest.raises(StudyError, match="died on 2 films, 2 times each") as refusal:
        prepare_images(table, Deadly(tmp_path / "marker"), root.child("studies"))
    assert str(table["uri"][0]) in str(refusal.value)


def test_a_killed_prepare_goes_on_and_repeats_at_most_its_block(tmp_path: Path) -> None:
    """The driver dies by SIGKILL while a task is in the middle; finished blocks are kept."""
    root = open_storage(tmp_path)
    table = write_films(root, 6 * BLOCK_FILMS)
    table.to_pickle(tmp_path / "table.pickle")
    script = tmp_path / "driver.py"
    script.write_text(
        "import sys, time\n"
        "import pandas as pd, pyarrow as pa\n"
        "from raystudy.images import prepare\n"
        "from raystudy.images.settings import ImageSettings\n"
        "from raystudy.images.store import pixels_key\n"
        "from raystudy.storage import open_storage\n"
        "table = pd.read_pickle(sys.argv[1] + '/table.pickle')\n"
        "films, _ = prepare._admitted(table)\n"
        "batch = pa.Table.from_pandas(films.sort_values('uri')[['uri', 'fingerprint']], preserve_index=False)\n"
        "slow = prepare.decode_film\n"
        "prepare.decode_film = lambda *given: (time.sleep(0.005), slow(*given))[1]\n"
        "settings, storage = ImageSettings(size=32), open_storage(sys.argv[1] + '/studies')\n"
        "prepare.decode_batch(batch, settings, storage, pixels_key(settings))\n"
    )
    worker = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    try:
        while len(blocks(root)) < 2:
            assert worker.poll() is None
            time.sleep(0.02)
    finally:
        worker.kill()
        worker.wait()
    kept = len(blocks(root))
    assert 2 <= kept < 6
    prepared = prepare_images(table, SETTINGS, root.child("studies"))
    assert prepared.n_reused == kept * BLOCK_FILMS
    assert prepared.n_new == (6 - kept) * BLOCK_FILMS
    assert len(load_pixels(root.child("studies"), prepared.key, table["image_id"]).image_ids) == len(table)


def test_trials_share_one_array_of_the_node_without_a_copy(tmp_path: Path) -> None:
    import ray

    root = open_storage(tmp_path)
    table = write_films(root, 10)
    prepared = prepare_images(table, SETTINGS, root)
    films = load_pixels(root, prepared.key, table["image_id"])
    shared = ray.put(films)
    first, second = ray.get(shared), ray.get(shared)
    assert np.shares_memory(first.pixels, second.pixels)
    assert not first.pixels.flags.writeable
    np.testing.assert_array_equal(first.take(["H1/00003.png"]), films.take(["H1/00003.png"]))
