"""Lines of rank 0 and warnings of the others."""

from __future__ import annotations

import time

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


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    log.setup()
    with log.progress_bar("predicting", 4, unit=" examples") as bar:
        bar.update(4)
    assert capsys.readouterr().err == "", "short work says nothing"
    monkeypatch.setattr(log, "LINE_S", 0.01)
    for title in ("predicting", ""):
        with log.progress_bar(title, 4, unit=" examples") as bar:
            time.sleep(0.02)
            bar.update(3)
    [line] = capsys.readouterr().err.splitlines()
    assert "predicting: 3 of 4 examples, " in line, "a rank without a title is silent"
