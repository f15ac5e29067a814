"""A writer draws, or is said once and left; it never harms the run."""

import logging
import threading

import pytest

from hfscale.config.load import load_values
from hfscale.config.schema import RunConfig
from hfscale.errors import ConfigError
from hfscale.monitor.writers import base
from hfscale.monitor.writers.base import About, Behind, Writers
from tests.helpers.corpus import run_values


def test_a_writer_that_fails_is_said_once_and_left(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file, where its folder would be")
    writers = Writers(["tensorboard"], About(tmp_path, "run"))
    with caplog.at_level(logging.WARNING):
        for step in range(20):
            writers.scalars(step, {"loss/train": 1.0})
        writers.close()
        writers.scalars(20, {"loss/train": 1.0})
    [warning] = [record.getMessage() for record in caplog.records]
    assert "tensorboard failed and is left out" in warning and "FileExistsError" in warning


def test_a_writer_that_stands_still_holds_nothing_up(monkeypatch, caplog):
    monkeypatch.setattr(base, "CLOSE_S", 0.2)
    monkeypatch.setattr(base, "WAITING", 3)
    begun, gate = threading.Event(), threading.Event()

    class Slow:
        def scalars(self, step, points):
            begun.set()
            gate.wait()

        def text(self, step, tag, text): ...
        def close(self): ...

    slow = Behind("slow", Slow)
    with caplog.at_level(logging.WARNING):
        slow.do(lambda writer: writer.scalars(0, {}))
        begun.wait()
        for step in range(9):
            slow.do(lambda writer, step=step: writer.scalars(step, {}))
        slow.close()
    gate.set()
    first, last = [record.getMessage() for record in caplog.records]
    assert "slower than the run" in first and "last points are lost" in last


def test_writers_are_asked_for_by_name(tmp_path):
    values = run_values(tmp_path, tmp_path, "run")

    def asked(metrics):
        return load_values({**values, "metrics": metrics}, [], schema=RunConfig).metrics.drawn_by

    assert asked({}) == ["tensorboard"]
    assert asked({"tensorboard": True}) == ["tensorboard"], "as configs of 0.1 say"
    assert asked({"tensorboard": False}) == []
    assert asked({"writers": []}) == []
    with pytest.raises(ConfigError, match=r"metrics\.writers[\s\S]*'tensorbord'[\s\S]*tensorboard"):
        asked({"writers": ["tensorbord"]})
