"""One suite for every kind of storage: a local folder, a real S3 server, and pyarrow's generic file system."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pytest

from raystudy.errors import StudyError
from raystudy.images.originals import locate
from raystudy.object_stores import ArrowFolder
from raystudy.storage import Storage, open_storage

AWKWARD = ["a b", "ü/é", "p%20q", "x#y", "t~z", "a+b=c", "{q}", "[z]", "a*b?", "…", "H1:0003", ".hidden", "a.json.gz"]


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "studies")
    return open_storage(request.getfixturevalue("s3_bucket") + "/some/studies")


def test_bytes_come_back_as_written(storage: Storage) -> None:
    content = bytes(range(256)) * 10_000
    storage.write_bytes("a/b/c.bin", content)
    assert storage.read_bytes("a/b/c.bin") == content
    for size in (1, 1000, len(content), len(content) + 1):
        assert storage.read_head("a/b/c.bin", size) == content[:size]
    storage.write_bytes("a/b/c.bin", b"")
    assert storage.read_bytes("a/b/c.bin") == storage.read_head("a/b/c.bin", 9) == b""


def test_awkward_names_are_kept(storage: Storage) -> None:
    for name in AWKWARD:
        storage.write_bytes(f"n/{name}", name.encode())
    assert storage.list("n") == sorted(f"n/{name}" for name in AWKWARD)
    assert [storage.read_bytes(f"n/{name}").decode() for name in AWKWARD] == AWKWARD


def test_a_missing_file_is_file_not_found(storage: Storage) -> None:
    storage.write_bytes("folder/file", b"x")
    for path in ("nothing", "folder/nothing", "folder", "no/such/folder/file"):
        assert not storage.exists(path)
        for read in (storage.read_bytes, lambda name: storage.read_head(name, 9)):
            with pytest.raises(FileNotFoundError):
                read(path)
        storage.delete(path) if path != "folder" else None
    assert storage.exists("folder/file")


def test_lists_are_recursive_sorted_and_by_folder(storage: Storage) -> None:
    assert storage.list() == []
    assert storage.list("never") == []
    for path in ("trials/b/spec.json", "trials/a/events", "trials2/x", "top"):
        storage.write_bytes(path, b"")
    assert storage.list("trials") == ["trials/a/events", "trials/b/spec.json"]
    assert storage.list() == ["top", "trials/a/events", "trials/b/spec.json", "trials2/x"]
    assert storage.child("trials", "b").list() == ["spec.json"]


def test_trees_and_files_can_be_deleted_twice(storage: Storage) -> None:
    for path in ("t/a/1", "t/a/2", "t/b", "ta"):
        storage.write_bytes(path, b"")
    storage.delete("t/b")
    storage.delete("t/b")
    storage.delete_tree("t/a")
    storage.delete_tree("t/a")
    assert storage.list() == ["ta"]
    storage.delete_tree()
    assert storage.list() == []


def test_json_and_tables_round_trip(storage: Storage) -> None:
    value = {"b": [1, 2.5, None, "ü"], "a": {"x": True}}
    storage.write_json("v.json", value)
    assert storage.read_json("v.json") == value
    first = storage.read_bytes("v.json")
    storage.write_json("v.json", dict(reversed(value.items())))
    assert storage.read_bytes("v.json") == first
    table = pa.table({"image_id": ["H1/a", "H2/b"], "label": pa.array([0, 1], pa.int8())})
    storage.write_table("t.parquet", table)
    assert storage.read_table("t.parquet").equals(table)
    assert storage.read_table("t.parquet", columns=["label"]).column_names == ["label"]


def test_no_number_that_json_lacks_is_written(storage: Storage) -> None:
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json("v.json", {"loss": float("nan")})
    assert storage.list() == []


def test_exactly_one_of_many_creates(storage: Storage) -> None:
    with ThreadPoolExecutor(12) as pool:
        won = list(pool.map(lambda i: storage.create_exclusive("lock", f"owner {i}".encode()), range(12)))
    assert sum(won) == 1
    assert storage.read_bytes("lock") == f"owner {won.index(True)}".encode()
    storage.delete("lock")
    assert storage.create_exclusive("lock", b"next")
    assert storage.list() == ["lock"]


def test_readers_never_see_half_a_file(storage: Storage) -> None:
    contents = {bytes([value]) * 200_000 for value in range(4)}
    storage.write_bytes("f", b"\0" * 200_000)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                storage.write_bytes("f", content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(storage.read_bytes("f") in contents for _ in range(50))
    finally:
        stop.set()
        writer.join()
    assert storage.list() == ["f"]


def test_events_are_appended_in_order_and_read_from_a_start(storage: Storage) -> None:
    assert storage.read_events("t/events") == []
    for number in range(12):
        storage.append_event("t/events", {"event": "epoch", "epoch": number, "text": "Zeile\nü"})
    assert [event["epoch"] for event in storage.read_events("t/events")] == list(range(12))
    assert [event["epoch"] for event in storage.read_events("t/events", start=10)] == [10, 11]
    assert storage.read_events("t/events", start=12) == []
    first = storage.first_event("t/events")
    assert (first or {})["epoch"] == 0
    assert storage.first_event("u/events") is None


def test_events_of_two_writers_are_all_kept(storage: Storage) -> None:
    def append(writer: int) -> None:
        for number in range(10):
            storage.append_event("events", {"writer": writer, "number": number})

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(append, range(3)))
    events = storage.read_events("events")
    assert len(events) == 30
    for writer in range(3):
        assert [event["number"] for event in events if event["writer"] == writer] == list(range(10))


def test_another_process_continues_the_events(storage: Storage) -> None:
    storage.append_event("events", {"from": "parent"})
    code = (
        "import pickle, sys; storage = pickle.loads(bytes.fromhex(sys.argv[1]));"
        "storage.append_event('events', {'from': 'child'})"
    )
    subprocess.run([sys.executable, "-c", code, pickle.dumps(storage).hex()], check=True)
    storage.append_event("events", {"from": "parent again"})
    assert [event["from"] for event in storage.read_events("events")] == ["parent", "child", "parent again"]


def test_stamps_change_with_the_content(storage: Storage) -> None:
    assert storage.stamps("films") == {}
    storage.write_bytes("films/a.png", b"one")
    storage.write_bytes("films/deeper/b.png", b"two")
    first = storage.stamps("films")
    assert list(first) == ["a.png"]
    assert first["a.png"].size == 3
    time.sleep(0.01)
    storage.write_bytes("films/a.png", b"eno")
    assert storage.stamps("films")["a.png"] != first["a.png"]


def test_pyarrow_sees_the_same_files(storage: Storage) -> None:
    storage.write_bytes("films/a.png", b"film")
    file_system, root = storage.filesystem()
    with file_system.open_input_stream(f"{root}/films/a.png") as file:
        assert file.read() == b"film"


def test_a_path_that_leaves_its_root_is_refused(storage: Storage) -> None:
    for path in ("../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "a/.", "a\\b", "a\0b"):
        with pytest.raises(ValueError, match="below its root"):
            storage.read_bytes(path)
        with pytest.raises(ValueError, match="below its root"):
            storage.write_bytes(path, b"")
        if path:
            with pytest.raises(ValueError, match="below its root"):
                storage.child(path)


def test_a_usable_storage_passes_the_probe_and_is_left_clean(storage: Storage) -> None:
    storage.check_writable()
    assert storage.list() == []


def test_a_storage_is_an_address(storage: Storage) -> None:
    assert pickle.loads(pickle.dumps(storage)) == storage
    assert storage.is_local == ("://" not in storage.uri)
    storage.child("a", "b/c").write_bytes("d", b"")
    assert storage.list() == ["a/b/c/d"]


# --- local ---


def test_a_torn_event_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.append_event("events", {"epoch": 1})
    with (tmp_path / "events").open("ab") as file:
        file.write(b'{"epoch": 2, "lo')
    assert storage.read_events("events") == [{"epoch": 1}]
    storage.append_event("events", {"epoch": 3})
    assert storage.read_events("events") == [{"epoch": 1}, {"epoch": 3}]
    (tmp_path / "events").write_bytes(b"?" + (tmp_path / "events").read_bytes()[1:])
    assert storage.first_event("events") is None  # damaged; the next one is not taken for it


def test_a_file_left_aside_by_a_crash_is_not_listed(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write_bytes("result.json", b"{}")
    (tmp_path / ".result.json.aside-0123456789abcdef0123").write_bytes(b"{")
    assert storage.list() == ["result.json"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/raystudy")):
        with pytest.raises(StudyError, match="--storage") as refusal:
            open_storage(place).check_writable()
        assert str(place) in str(refusal.value)


def test_a_folder_in_a_files_place_is_no_file_and_none_is_written_there(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    storage = open_storage(tmp_path)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("plan.json")
    for act in (lambda: storage.write_bytes("plan.json", b""), lambda: storage.append_event("plan.json", {})):
        with pytest.raises(StudyError, match=r"plan\.json: the folder cannot be used: Is a directory") as refusal:
            act()
        assert refusal.value.remedy
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_relative_and_file_addresses_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_storage("studies").uri == str(tmp_path / "studies")
    assert open_storage(f"file://{tmp_path}/st%20udies").uri == f"{tmp_path}/st udies"
    assert open_storage("S3://bucket/Films/").uri == "s3://bucket/Films"


@pytest.mark.parametrize("address", ["abfs://films@account.dfs.core.windows.net/a", "hdfs://user@host:8020/films"])
def test_a_container_or_user_before_the_host_is_no_secret(address: str) -> None:
    assert open_storage(address).uri == address
    with pytest.raises(StudyError, match="no credentials"):
        open_storage(address.replace("@", ":secret@"))


@pytest.mark.parametrize(
    "address", ["", "s3://", "s3://B", "s3://key:secret@bucket/x", "s3://bucket/x?endpoint_override=h", "wrong://x"]
)
def test_an_address_that_cannot_be_meant_is_refused_without_its_secret(address: str) -> None:
    with pytest.raises(StudyError) as refusal:
        open_storage(address).list()
    assert "secret@" not in str(refusal.value)


@pytest.mark.parametrize("scheme", ["s3", "S3", "gs", "gcs"])
@pytest.mark.parametrize("rest", ["/bucket/x", "bucket/x", "/key:secret@bucket/x?token=secret"])
def test_a_bucket_with_a_slash_too_few_is_no_folder(scheme: str, rest: str) -> None:
    with pytest.raises(StudyError, match="two slashes") as refusal:
        open_storage(f"{scheme}:{rest}")
    assert refusal.value.remedy == f"{scheme.lower()}://bucket/x"
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("address", "meant"),
    [("file:/tmp/x", "file:///tmp/x"), ("hdfs:/x", "hdfs://x"), ("s3:/bucket/a@b/c", "s3://bucket/a@b/c")],
)
def test_an_address_with_a_slash_too_few_is_no_folder(address: str, meant: str) -> None:
    with pytest.raises(StudyError, match="two slashes") as refusal:
        open_storage(address)
    assert refusal.value.remedy == meant


def test_a_folder_may_have_a_colon_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("./s3:x", "run:1", "s3/x"):
        assert open_storage(name).uri == str(tmp_path / name)


@pytest.mark.parametrize("scheme", ["gs", "gcs"])
def test_a_public_bucket_of_google_is_opened_without_credentials(scheme: str) -> None:
    assert open_storage(f"{scheme}://anonymous@bucket/films").uri == f"{scheme}://anonymous@bucket/films"
    root, folder, name = locate(f"{scheme}://anonymous@bucket/films/a.png")
    assert (root.uri, folder, name) == (f"{scheme}://anonymous@bucket", "films", "a.png")
    assert root.filesystem()[1] == "bucket"  # opened, not asked
    for user in ("someone", "anonymous:secret", "Anonymous"):
        with pytest.raises(StudyError, match="no credentials"):
            open_storage(f"{scheme}://{user}@bucket/films")
    with pytest.raises(StudyError, match="no credentials"):
        open_storage("s3://anonymous@bucket/films")


def test_linked_folders_are_listed_with_their_films_and_loops_end(tmp_path: Path) -> None:
    storage, elsewhere = open_storage(tmp_path / "root"), open_storage(tmp_path / "elsewhere")
    for place, path in ((storage, "a/1"), (elsewhere, "2"), (elsewhere, "deep/3")):
        place.write_bytes(path, b"")
    (tmp_path / "root/a/site").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/b").symlink_to("a")  # the same films by another way are other paths
    (tmp_path / "root/file").symlink_to(tmp_path / "elsewhere/2")
    for place, link, target in (
        ("root/a", "up", ".."),
        ("root/a", "here", "."),
        ("elsewhere/deep", "back", tmp_path / "root"),
        ("elsewhere/deep", "above", tmp_path),
        ("root", "nowhere", tmp_path / "absent"),
    ):
        (tmp_path / place / link).symlink_to(target)
    seen = ["a/1", "a/site/2", "a/site/deep/3", "b/1", "b/site/2", "b/site/deep/3", "file"]
    assert [path for path in storage.list() if path != "nowhere"] == seen
    assert storage.list("b") == ["b/1", "b/site/2", "b/site/deep/3"]
    assert [storage.read_bytes(path) for path in seen] == [b""] * len(seen)


def test_what_cannot_be_a_file_is_not_there_and_hides_no_other(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write_bytes("films/film", b"x")
    (tmp_path / "films" / "itself").symlink_to("itself")
    assert [*storage.stamps("films")] == ["film"]
    assert storage.stamps("a" * 300) == storage.stamps("films/itself") == {}


def test_deleting_a_tree_leaves_what_its_links_point_to(tmp_path: Path) -> None:
    storage, elsewhere = open_storage(tmp_path / "root"), open_storage(tmp_path / "elsewhere")
    storage.write_bytes("a/1", b"")
    elsewhere.write_bytes("2", b"kept")
    (tmp_path / "root/a/site").symlink_to(tmp_path / "elsewhere")
    storage.delete_tree("a")
    assert (storage.list(), elsewhere.read_bytes("2")) == ([], b"kept")
    (tmp_path / "root/b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StudyError, match="symbolic link"):
        storage.delete_tree("b")
    assert elsewhere.read_bytes("2") == b"kept"


# --- pyarrow's other file systems ---


def test_another_file_system_of_pyarrow_reads_and_writes_but_does_not_lock(tmp_path: Path) -> None:
    folder = ArrowFolder(pyarrow.fs.LocalFileSystem(), str(tmp_path), "gs://bucket")
    folder.write("a/b.png", b"film")
    assert folder.read("a/b.png") == b"film"
    assert (folder.read_head("a/b.png", 3), folder.read_head("a/b.png", 9)) == (b"fil", b"film")
    assert list(folder.list("")) == ["a/b.png"]
    assert list(folder.list("never")) == []
    assert folder.stamps("a")["b.png"].size == 4
    assert (folder.exists("a/b.png"), folder.exists("a")) == (True, False)
    with pytest.raises(FileNotFoundError):
        folder.read("a/c.png")
    with pytest.raises(StudyError, match="exclusive"):
        folder.create("lock", b"")
    folder.delete("a/b.png")
    folder.delete("a/b.png")
    folder.delete_tree("a")
    folder.delete_tree("a")
    assert list(folder.list("")) == []


def test_a_write_that_another_file_system_finds_no_place_for_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "nowhere" / "a")
    folder = ArrowFolder(pyarrow.fs.LocalFileSystem(), str(tmp_path), "local://folder")
    with pytest.raises(StudyError, match="local://folder/a: the storage does not answer as it should"):
        folder.write("a", b"1")
    with pytest.raises(FileNotFoundError):
        folder.read("a")


def test_a_folder_beside_the_current_one_is_named_without_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for address in ("../beside", f"file://{tmp_path}/here/../beside"):
        storage = open_storage(address)
        assert storage.uri == str(tmp_path / "beside")
        storage.write_bytes("film", b"x")
    root, folder, name = locate("../beside/film")
    assert root.read_bytes(f"{folder}/{name}") == b"x"
