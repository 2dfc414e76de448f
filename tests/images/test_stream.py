"""A study that is too large for a node's memory is streamed from a file of the node, with the same results."""

from __future__ import annotations

import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raystudy.errors import StudyError
from raystudy.images import stream
from raystudy.images.settings import ImageSettings
from raystudy.images.store import FOLDER, Film, load_pixels, pixels_key, write_block
from raystudy.storage import Storage, open_storage
from raystudy.streams import stream as random_stream

IDS = [f"H1/{number:03d}" for number in range(30)]


@pytest.fixture
def store(tmp_path: Path) -> tuple[Storage, str]:
    """Thirty films in three blocks, indexed in another order."""
    storage, settings = open_storage(tmp_path / "studies"), ImageSettings(size=32)
    pixels, key = pixels_key(settings), f"{pixels_key(settings)}-0123456789ab"
    rng = random_stream(0, "pixels")
    rows = []
    for block in range(3):
        ids = IDS[block::3]
        films = [Film(name, "", rng.integers(0, 256, (32, 32), dtype=np.uint8), None) for name in ids]
        films.insert(2, Film("bad", "", None, "truncated"))
        written = write_block(storage, pixels, films, 32).to_pylist()
        rows += [{**row, "image_id": row["fingerprint"]} for row in written if row["reason"] is None]
    storage.write_table(f"{FOLDER}/{key}/index.parquet", pa.Table.from_pylist(rows))
    return storage, key


def test_streamed_films_are_the_same_in_the_same_seeded_order(store: tuple[Storage, str], tmp_path: Path) -> None:
    storage, key = store
    order = [IDS[i] for i in random_stream(3, "order").permutation(len(IDS))]
    loaded, mapped = load_pixels(storage, key, order), stream.map_pixels(storage, key, order, tmp_path / "node")
    assert isinstance(mapped.pixels, np.memmap)
    assert mapped.image_ids == loaded.image_ids == tuple(order)
    for epoch in range(3):
        batch = [order[i] for i in random_stream(3, "order", epoch).permutation(len(order))[:8]]
        np.testing.assert_array_equal(mapped.take(batch), loaded.take(batch))
        np.testing.assert_array_equal(mapped.rows(batch), loaded.rows(batch))


def test_what_travels_to_another_node_is_the_way_to_the_films(store: tuple[Storage, str], tmp_path: Path) -> None:
    storage, key = store
    mapped = stream.map_pixels(storage, key, IDS, tmp_path / "node")
    travelling = pickle.dumps(mapped)
    assert len(travelling) < mapped.pixels.nbytes / 10
    shutil.rmtree(tmp_path / "node")  # the other node has no such file yet
    arrived = pickle.loads(travelling)
    np.testing.assert_array_equal(arrived.take(IDS[::-1]), load_pixels(storage, key, IDS[::-1]).pixels)


def test_the_share_of_memory_decides(store: tuple[Storage, str], tmp_path: Path) -> None:
    storage, key = store
    tiny = len(IDS) * 32 * 32 / stream.node_memory() / 2
    assert isinstance(stream.open_pixels(storage, key, IDS, tiny, tmp_path / "node").pixels, np.memmap)
    assert not isinstance(stream.open_pixels(storage, key, IDS, 4 * tiny, tmp_path / "node").pixels, np.memmap)


def test_the_first_trial_of_a_node_builds_the_file_for_all(store: tuple[Storage, str], tmp_path: Path) -> None:
    storage, key = store
    node = tmp_path / "node"
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda _: stream.map_pixels(storage, key, IDS, node), range(4)))
    assert len(list(node.glob("*.u8"))) == 1
    storage.delete_tree()  # the file alone serves the later ones
    later = stream.map_pixels(storage, key, IDS, node)
    assert all((array.pixels == later.pixels).all() for array in arrays)


def test_a_build_that_was_cut_off_is_built_again(store: tuple[Storage, str], tmp_path: Path) -> None:
    storage, key = store
    node = tmp_path / "node"
    path = Path(str(stream.map_pixels(storage, key, IDS, node).pixels.filename))
    path.rename(path.with_suffix(".aside"))
    path.with_suffix(".aside").write_bytes(b"half")
    np.testing.assert_array_equal(
        stream.map_pixels(storage, key, IDS, node).pixels, load_pixels(storage, key, IDS).pixels
    )


@pytest.mark.parametrize("size", [0, 30 * 32 * 32 - 1, 30 * 32 * 32 + 4096])
def test_a_file_of_another_size_is_built_again(store: tuple[Storage, str], tmp_path: Path, size: int) -> None:
    storage, key = store
    path = Path(str(stream.map_pixels(storage, key, IDS, tmp_path / "node").pixels.filename))
    os.truncate(path, size)
    np.testing.assert_array_equal(
        stream.map_pixels(storage, key, IDS, tmp_path / "node").pixels, load_pixels(storage, key, IDS).pixels
    )


def test_the_folder_of_the_films_is_this_users_alone(
    store: tuple[Storage, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream.tempfile, "gettempdir", lambda: str(tmp_path))
    node = tmp_path / f"raystudy-films-{os.getuid()}"
    stream.map_pixels(*store, IDS)
    assert node.stat().st_mode & 0o777 == 0o700
    node.chmod(0o755)  # made by an earlier version
    stream.map_pixels(*store, IDS)
    assert node.stat().st_mode & 0o777 == 0o700

    def refused() -> None:
        with pytest.raises(StudyError, match="another user's") as refusal:
            stream.map_pixels(*store, IDS)
        assert str(node) in str(refusal.value)
        assert "TMPDIR" in refusal.value.remedy

    node.chmod(0o777)
    refused()
    node.rename(tmp_path / "other")
    (tmp_path / "other").chmod(0o700)
    node.symlink_to(tmp_path / "other")
    refused()
    node.unlink()
    node.write_bytes(b"")
    refused()
    node.unlink()
    node.mkdir(mode=0o700)
    if os.getuid() == 0:
        os.chown(node, 65534, 65534)
        refused()


def test_files_that_nobody_used_for_long_are_removed_when_another_is_built(
    store: tuple[Storage, str], tmp_path: Path
) -> None:
    storage, key = store
    node = tmp_path / "node"
    old, cut, recent = (node / name for name in ("old.u8", "cut.aside", "recent.u8"))
    node.mkdir(mode=0o700)
    for path, days in ((old, stream.KEPT_DAYS + 1), (cut, stream.KEPT_DAYS + 1), (recent, stream.KEPT_DAYS - 1)):
        path.write_bytes(b"films")
        os.utime(path, (time.time() - days * 86400,) * 2)
    used = Path(str(stream.map_pixels(storage, key, IDS, node).pixels.filename))
    assert {path.name for path in node.iterdir() if path.suffix in (".u8", ".aside")} == {recent.name, used.name}
    os.utime(used, (time.time() - (stream.KEPT_DAYS + 1) * 86400,) * 2)
    stream.map_pixels(storage, key, IDS, node)  # being used is what counts
    stream.map_pixels(storage, key, IDS[:9], node)
    assert used.exists()


def test_no_room_on_the_node_is_said_before_anything_is_written(
    store: tuple[Storage, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, key = store
    full = type(stream.shutil.disk_usage(tmp_path))(10, 10, 0)
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: full)
    with pytest.raises(StudyError, match="TMPDIR"):
        stream.map_pixels(storage, key, IDS, tmp_path / "node")
    assert not list((tmp_path / "node").glob("*.u8"))
