"""Fixtures that several rooms share."""

from hypothesis import settings

from tests.counts import pytest_terminal_summary  # noqa: F401
from tests.devices import device  # noqa: F401
from tests.golden_vectors import golden, golden_recipe, shared_dir  # noqa: F401
from tests.mlflow_server import mlflow_server  # noqa: F401
from tests.ray_local import ray_local  # noqa: F401
from tests.s3_server import s3_bucket, s3_environment, s3_server  # noqa: F401
from tests.sqlite_store import empty_store, sqlite  # noqa: F401
from tests.tiny_study import tiny_study  # noqa: F401

settings.register_profile("any machine", deadline=None)  # no example is too slow
settings.load_profile("any machine")
