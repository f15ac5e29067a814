"""What every test gets: ranks that end with the session, and skips for hardware that is not
there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hfscale.log import logger
from tests.helpers.corpus import make_corpus
from tests.helpers.ranks import close_ranks

# many small processes at once: threads would only fight
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("DS_ACCELERATOR", "cpu") if not Path("/dev/nvidiactl").exists() else None


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``tokenizer/`` and ``shards/{train,validation}/`` of some of Python's own
    source.
    """
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session", autouse=True)
def _ranks_end_with_the_session() -> Iterator[None]:
    yield
    close_ranks()


@pytest.fixture(autouse=True)
def _the_logger_of_one_test_is_not_that_of_the_next() -> Iterator[None]:
    """A command run in this process sets its logger up; what pytest captures in later tests would
    come twice.
    """
    yield
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is none (found without importing torch)."""
    if Path("/dev/nvidiactl").exists():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
