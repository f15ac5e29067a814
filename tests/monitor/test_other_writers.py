"""Weights & Biases and MLflow, the real packages without a network: a resumed run goes on with its
run there.
"""

from __future__ import annotations

import logging
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hfscale.errors import ConfigError
from hfscale.monitor.writers.base import WRITERS, About, Writers, refuse_missing

CONFIG = {"optim.lr": 1e-3, "data.sources.0.name": "web", "engine.compile": False}
# blocks of LevelDB's log, in which wandb writes: crc32 (4 bytes), length (2), kind of piece (1)
BLOCK, HEADER, WHOLE, LAST = 2**15, struct.Struct("<IHB"), 1, 4


def attempt(name: str, run_dir: Path, *steps: int) -> None:
    about = About(run_dir, "mine", first_step=steps[0], config=CONFIG, texts={"run/config": "a: 1"})
    writers = Writers([name], about)
    for step in steps:
        writers.scalars(step, {"loss/train": 1 / step, "loss/source/a source, odd": 2.0})
    writers.close()


@pytest.fixture(autouse=True)
def _no_warning(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A writer that failed has said so."""
    with caplog.at_level(logging.WARNING, logger="hfscale"):
        yield
    assert [record.getMessage() for record in caplog.records if "left out" in record.msg] == []


def test_mlflow_goes_on_with_its_run(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    attempt("mlflow", tmp_path, 1, 2, 3)
    attempt("mlflow", tmp_path, 3, 4)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("hfscale")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.001"
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert [point.step for point in history] == [1, 2, 3, 3, 4]
    assert "loss/source/a source_ odd" in run.data.metrics
    assert [*tmp_path.rglob("run/config/0.md")], "the texts lie in the run directory"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere}/other.db")
    monkeypatch.chdir(elsewhere)
    attempt("mlflow", tmp_path, 5)
    other = MlflowClient(tracking_uri=f"sqlite:///{elsewhere}/other.db")
    ids = [other.get_experiment_by_name("hfscale").experiment_id]
    assert len(other.search_runs(ids)) == 1, "a run that is not in that store begins there"


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    attempt("wandb", tmp_path, 1, 2, 3)
    attempt("wandb", tmp_path, 3, 4)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1, "both attempts have one id"
    assert (tmp_path / "writers" / "wandb").read_text().strip() in files[0].name
    steps = [step for file in files for step in logged_steps(file)]
    assert set(steps) >= {1, 2, 3, 4}


def test_wandb_can_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    attempt("wandb", tmp_path, 1)
    assert not [*tmp_path.rglob("*.wandb")]


def logged_steps(file: Path) -> list[int]:
    """Return the steps that have a loss in a file of wandb."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = []
    for data in pieces(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {
            item.key or "/".join(item.nested_key): item.value_json for item in record.history.item
        }
        if "loss/train" in items:
            steps.append(int(items["step"]))
    return steps


def pieces(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log of LevelDB; the first 7 bytes are wandb's own."""
    at, data = 7, b""
    while at + HEADER.size <= len(content):
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(content, at)
        data += content[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in (WHOLE, LAST):
            yield data
            data = b""


@pytest.mark.parametrize("name", [name for name, plug in WRITERS.items() if plug.extra])
def test_a_writer_that_is_not_installed_is_named_with_its_extra(monkeypatch, name):
    refuse_missing([name])
    monkeypatch.setitem(sys.modules, WRITERS[name].packages[0], None)
    with pytest.raises(ConfigError, match=rf"not installed[\s\S]*pip install 'hfscale\[{name}\]'"):
        refuse_missing(["tensorboard", name])
