"""One corpus for all tests of jobs."""
from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.corpus import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``tokenizer/`` and ``shards/{train,validation}/``."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))
