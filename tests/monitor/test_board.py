"""TensorBoard as a user sees it: of a real run that was resumed, by its files and in a browser."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hfscale.monitor.tags import NO_CURVES, TAGS, numbered
from tests.helpers.browser import browser, wait_for
from tests.helpers.cli import hfscale
from tests.helpers.corpus import run_values

STEPS = 12
PROMPT = "def __init__(self"


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two sources on two ranks that went on from step 7."""
    folder = tmp_path_factory.mktemp("board")
    shards = corpus / "shards"
    values = run_values(
        corpus,
        folder,
        "mine",
        data={
            "sources": [
                {"name": "web", "shards": str(shards / "train"), "weight": 3},
                {"name": "books", "shards": str(shards / "validation")},
            ],
            "validation": {"shards": str(shards / "validation"), "every_steps": 4, "rows": 16},
            "cross_document": False,
        },
        train={"steps": STEPS},
        metrics={"every_steps": 2, "tensorboard": True, "samples": {"prompts": [PROMPT]}},
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    for steps in (7, STEPS):
        hfscale("pretrain", "run.yaml", "--procs", "2", f"train.steps={steps}", cwd=folder)
    return folder / "mine"


@pytest.fixture(scope="module")
def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard")).Reload()


def lines(path: Path) -> Iterator[dict[str, float]]:
    return map(json.loads, path.read_text().splitlines())


def test_a_resumed_run_has_one_curve(run: Path, events: EventAccumulator):
    loss = {record["step"]: record["loss"] for record in lines(run / "metrics.jsonl")}
    curve = {event.step: event.value for event in events.Scalars("1 loss/train")}
    assert [*curve] == sorted({2, 4, 6, 7, 8, 10, STEPS})
    assert curve == {step: pytest.approx(value) for step, value in loss.items()}
    assert len(events.Scalars("1 loss/train")) == len(curve), "one point a step"


def test_every_curve_is_explained_and_has_a_place(events: EventAccumulator):
    """A new tag needs a row in the table, from which docs/monitoring.md is made."""
    plain = [name.split(" ", 1)[1] for name in events.Tags()["scalars"]]
    explained = [tag for tag in TAGS if tag.name != "loss/*"]
    assert [name for name in plain if not any(tag.matches(name) for tag in explained)] == []
    wanted = {
        *("loss/train", "loss/validation", "loss/train_source/web", "loss/validation_perplexity"),
        *("optim/lr", "optim/grad_norm", "optim/clipped_share", "optim/grad_norm/layers.1"),
        *("optim/update_ratio/head", "speed/tokens_per_s", "speed/tflops", "time/step"),
        *("time/p50/forward", "time/max/step", "memory/peak", "memory/host"),
        *("goodput/compute", "goodput/start"),
        *("data/epoch/books", "data/padding_share", "data/documents_a_row", "data/tokens_seen"),
    }
    assert wanted - {*plain} == set()


def test_details_agree_with_the_figures(run: Path):
    records = {record["step"]: record for record in lines(run / "metrics.jsonl")}
    details = [*lines(run / "details.jsonl")]
    assert [line["step"] for line in details] == [*records]
    for line in details:
        tags = {name for name in line if name not in NO_CURVES}
        norms = [line[name] for name in tags if name.startswith("optim/grad_norm/")]
        whole = math.sqrt(sum(norm**2 for norm in norms))
        assert whole == pytest.approx(records[line["step"]]["grad_norm"], rel=1e-5)
        assert 0.9 < sum(line[name] for name in tags if name.startswith("goodput/")) <= 1 + 1e-9
        assert line["data/padding_share"] == 0 and line["data/documents_a_row"] >= 1
        assert all(
            line[f"time/max/{name}"] >= line[f"time/p50/{name}"] for name in ("data", "step")
        )


def test_runs_compare_by_what_people_vary(events: EventAccumulator):
    """TensorBoard's table shows the first five columns by name."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    tag = "_hparams_/session_start_info"
    start = HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)
    columns = start.session_start_info.hparams
    assert sorted(columns)[:2] == ["1 optim.lr", "2 train.global_batch"]
    assert columns["1 optim.lr"].number_value == 1e-2
    assert columns["model.architecture"].string_value == "gpt2"
    assert not [name for name in columns if name.startswith(("cluster", "metrics"))]


def test_config_and_environment_are_there_to_read(events: EventAccumulator):
    def text(tag: str) -> str:
        return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()

    assert "global_batch: 16" in text("run/config")
    assert "pretrain run.yaml --procs 2" in text("run/environment")
    assert numbered("loss/train") == "1 loss/train"


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """Where TensorBoard shows the run, started as the run says."""
    command = [sys.executable, "-m", "tensorboard.main", "--host", "localhost", "--port", "0"]
    where = f"mine:{run / 'tensorboard'}"
    server = subprocess.Popen([*command, "--logdir_spec", where], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = ""
        while not (ready := re.search(r"at (http://\S+) ", said)):
            line = server.stderr.readline()
            assert line, said
            said += line
        yield ready[1]
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_a_browser_shows_loss_layout_config_and_samples(address: str, tmp_path: Path):
    with browser(tmp_path) as page:
        page.get(f"{address}#timeseries")
        shown = wait_for(page, "mine/.", "1 loss/train", "2 optim", "6 data", "8 goodput")
        assert shown.index("1loss/train") < shown.index("2optim") < shown.index("3speed")
        page.get(f"{address}#custom_scalars")
        wait_for(page, "At a glance", "gradient norm", "tokens a second", "Layers")
        page.get(f"{address}#text")
        page.refresh()
        wait_for(page, "run/config", "global_batch: 16", "samples/continuations", PROMPT)
