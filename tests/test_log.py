"""Lines of rank 0 and warnings of the others."""
from __future__ import annotations

import pytest

from hfscale import log


def test_rank_0_speaks_and_others_warn(capsys: pytest.CaptureFixture[str]):
    log.setup()
    log.logger.info("hello")
    log.setup(rank=3)
    log.logger.info("nobody hears this")
    log.logger.warning("careful")
    seen = capsys.readouterr()
    assert seen.out == ""
    first, second = seen.err.splitlines()
    assert first.endswith(" hello")
    assert second.endswith("[rank 3] careful")
