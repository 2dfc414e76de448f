"""One small Ray for all tests of a session."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator

import pytest

from tests.s3_server import S3Server


@pytest.fixture(scope="session")
def ray_local(s3_environment: S3Server) -> Iterator[None]:
    """Ray with two CPUs and a GPU that is only counted.

    Its workers know the S3 server's address (start it with ``s3_server``).
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray warns of its own defaults while it starts
        import ray

        from raystudy.orchestrate.session import WORKERS_A_CPU

        ray.init(
            address="local",  # whatever else runs on this machine
            num_cpus=2,
            num_gpus=1,
            include_dashboard=False,
            object_store_memory=200_000_000,
            _system_config={"num_workers_soft_limit": 2 * WORKERS_A_CPU},  # as a study's own
            log_to_driver=False,
            logging_level=logging.ERROR,
            ignore_reinit_error=True,
        )
    yield
    ray.shutdown()
