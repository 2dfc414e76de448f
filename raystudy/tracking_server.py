"""Whether an MLflow server, database or library is one that this raystudy speaks: asked before a study relies on it.

In flow ``tracking.uri``; out flow nothing, or a refusal with its remedy.  Nothing is made or changed there.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import threading
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import alembic.util
import requests
import sqlalchemy
import sqlalchemy.exc
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from urllib3.exceptions import LocationParseError

from raystudy.errors import StudyError

OLDEST, FIRST_UNKNOWN = (3, 1), (4, 0)  # versions of MLflow whose interface raystudy speaks
PATIENCE_SECONDS = 2.0  # with one that need not answer


def check_server(uri: str, *, must_answer: bool = True) -> None:
    """Refuse an MLflow whose version this raystudy does not speak, or (``must_answer``) that does not answer.

    Raises
    ------
    StudyError : also an address that is none, whether it must answer or not.
    """
    check_library()
    if uri.startswith(("http://", "https://")):
        for version in _server_version(uri, must_answer):
            _check_version("server", version, uri)
    else:
        _check_database(uri, must_answer)


def check_library() -> str:
    """Refuse an MLflow library that this raystudy does not speak; return its version."""
    version = importlib.metadata.version("mlflow")
    _check_version("library", version, "this machine")
    return version


def _check_version(what: str, version: str, where: str) -> None:
    number = tuple(int(p) for p in version.split(".")[:2] if p.isdigit())
    if not OLDEST <= number < FIRST_UNKNOWN:
        raise StudyError(
            f"MLflow {what} {version} is not supported",
            where=where,
            remedy=f"use MLflow {OLDEST[0]}.{OLDEST[1]} or newer, below {FIRST_UNKNOWN[0]}",
        )


def _server_version(uri: str, must_answer: bool) -> list[str]:
    try:
        answer = requests.get(f"{uri.rstrip('/')}/version", timeout=10 if must_answer else PATIENCE_SECONDS)
        answer.raise_for_status()
    except (requests.exceptions.InvalidURL, LocationParseError):  # the latter is no RequestException
        raise StudyError(
            "this is no address of an MLflow server", where=uri, remedy="for example http://127.0.0.1:5000"
        ) from None
    except requests.RequestException as error:
        if not must_answer:
            return []
        raise StudyError(
            f"MLflow does not answer: {first_line(error)}",
            where=uri,
            remedy="start `mlflow server`, or use sqlite:///mlflow.db",
        ) from None
    return [answer.text.strip()[:40]]


def _check_database(uri: str, must_answer: bool) -> None:
    """Refuse a database that cannot be opened, or whose tables the MLflow installed here cannot use.

    MLflow itself brings an older database up to date only where a table is missing.
    """
    try:
        sqlalchemy.make_url(uri)
    except (ValueError, sqlalchemy.exc.ArgumentError):  # the former of a port that is none
        raise StudyError(
            "this is no address of a database",
            where="tracking.uri",
            remedy="for example sqlite:///mlflow.db or postgresql://USER@HOST:5432/DATABASE",
        ) from None
    try:
        file = _sqlite_file(uri) if uri.startswith("sqlite") else None  # that it is wrong is seen at once
        revision, tables = _tables(uri, file) if must_answer else _tables_if_it_answers(uri, file)
    except (OSError, ImportError, sqlalchemy.exc.SQLAlchemyError, alembic.util.CommandError) as error:
        raise StudyError(
            f"MLflow's database cannot be opened: {first_line(error)}",
            where="tracking.uri",
            remedy="name a file in a folder that is there, for example sqlite:///mlflow.db",
        ) from None
    if revision is None:
        return
    newest, known = _known_revisions()
    if revision not in known:
        raise StudyError(
            f"MLflow's database is of a version (revision {revision}) that the MLflow installed here, "
            f"{check_library()}, does not know",
            where="tracking.uri",
            remedy="install the newer MLflow that wrote it, or name another database with --tracking-uri",
        )
    from raystudy.tracking import known_tables  # it alone imports mlflow, which takes seconds

    if revision != newest and tables >= known_tables():
        raise StudyError(
            f"MLflow's database was written by an older MLflow (revision {revision}, this one writes {newest})",
            where="tracking.uri",
            remedy=f"copy it, then `mlflow db upgrade {sqlalchemy.make_url(uri).render_as_string()}`",
        )


def _tables_if_it_answers(uri: str, file: Path | None) -> tuple[str | None, set[str]]:
    """Return the same as `_tables`, or (None, empty) when a database is away, silent or not to be opened."""
    answers: list[tuple[str | None, set[str]]] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # every driver has its own words for it
            answers.append(_tables(uri, file))

    thread = threading.Thread(target=ask, daemon=True)  # a driver may wait for minutes: it is left behind
    thread.start()
    thread.join(PATIENCE_SECONDS)
    return answers[0] if answers else (None, set())


def _sqlite_file(uri: str) -> Path:
    """Return the file of a SQLite address; an OSError says why it can be none."""
    file = Path(uri.partition("://")[2].removeprefix("/").partition("?")[0])
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent}")
    if file.exists():
        with file.open("rb") as base:
            if base.read(16) not in (b"", b"SQLite format 3\0"):
                raise OSError(f"{file} is no SQLite database")
    return file


def _tables(uri: str, file: Path | None) -> tuple[str | None, set[str]]:
    """Return the revision of a database (None: it has none yet) and the names of its tables; ``file``: of SQLite."""
    if file is not None:
        if not file.exists():
            return None, set()
        uri = f"sqlite:///file:{quote(str(file.absolute()))}?mode=ro&uri=true"
    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as connection:
            heads = MigrationContext.configure(connection).get_current_heads()
            return next(iter(heads), None), set(sqlalchemy.inspect(connection).get_table_names())
    finally:
        engine.dispose()


def _known_revisions() -> tuple[str | None, set[str]]:
    """Return the newest revision of the installed MLflow, and all that it knows."""
    package = find_spec("mlflow")
    assert package is not None
    assert package.origin is not None
    scripts = ScriptDirectory(str(Path(package.origin).parent / "store" / "db_migrations"))
    return scripts.get_current_head(), {script.revision for script in scripts.walk_revisions()}


def first_line(error: Exception) -> str:
    """Return what went wrong in few words, without the client's wrapping."""
    text = str(error).strip()
    for reason in ("Connection refused", "timed out", "Name or service not known", "Connection aborted"):
        if reason in text:
            return reason.lower()
    return text.splitlines()[0][:200] if text else type(error).__name__
