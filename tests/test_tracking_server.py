"""Which MLflow a study can write to: the version of a server, the revision of a database, and none that is away."""

import contextlib
import socket
import time
from pathlib import Path

import pytest
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from raystudy.config import Tracking
from raystudy.errors import StudyError
from raystudy.tracking_server import check_server
from tests.mlflow_server import MLflowServer
from tests.s3_server import free_port

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's own, of its SQLAlchemy


def test_the_check_accepts_this_server_and_sqlite(mlflow_server: MLflowServer) -> None:
    check_server(mlflow_server.uri)
    check_server("sqlite:///mlflow.db")


def test_a_database_that_mlflow_refuses_as_too_old_is_refused_with_the_remedy(sqlite: Tracking) -> None:
    check_server(sqlite.uri)
    with contextlib.closing(sqlalchemy.create_engine(sqlite.uri).raw_connection()) as base:
        base.cursor().execute("update alembic_version set version_num = '451aebb31d03'")
        base.commit()
    with pytest.raises(MlflowException, match="out-of-date"):
        MlflowClient(tracking_uri=sqlite.uri).search_experiments()
    for must_answer in (True, False):
        with pytest.raises(StudyError, match="was written by an older MLflow") as refusal:
            check_server(sqlite.uri, must_answer=must_answer)
        assert f"mlflow db upgrade {sqlite.uri}" in str(refusal.value)


def test_a_file_that_can_be_no_database_is_refused_although_a_server_may_be_away(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database")
    for file in (tmp_path / "nowhere" / "m.db", tmp_path, tmp_path / "text.db"):
        with pytest.raises(StudyError, match="cannot be opened"):
            check_server(f"sqlite:///{file}", must_answer=False)


def test_a_database_of_a_newer_mlflow_is_refused_on_a_server_too_although_it_need_not_answer(
    mlflow_server: MLflowServer,
) -> None:
    if not mlflow_server.backend.startswith("postgresql"):
        pytest.skip("PostgreSQL is not installed")
    uri = mlflow_server.backend.rpartition("/")[0] + "/newer"
    for where, statements in (
        (mlflow_server.backend, ["create database newer"]),
        (uri, ["create table alembic_version (version_num text)", "insert into alembic_version values ('ffffffff')"]),
    ):
        engine = sqlalchemy.create_engine(where, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(sqlalchemy.text(statement))
        engine.dispose()
    for must_answer in (True, False):
        check_server(mlflow_server.backend, must_answer=must_answer)
        with pytest.raises(StudyError, match="install the newer MLflow"):
            check_server(uri, must_answer=must_answer)


def test_a_database_that_is_away_or_silent_delays_and_refuses_nothing_when_it_need_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        for port in (free_port(), silent.getsockname()[1]):
            began = time.monotonic()
            check_server(f"postgresql://mlflow@127.0.0.1:{port}/postgres", must_answer=False)
            assert time.monotonic() - began < 60  # the silent one would never answer
    check_server("nothing://127.0.0.1/postgres", must_answer=False)
