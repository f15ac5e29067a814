"""A run that starts from another run, and what is said when it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.checkpoint import manifest
from hfscale.config.schema import RunConfig
from hfscale.errors import CheckpointError
from hfscale.reports.show import derived
from hfscale.run.run import Run
from tests.helpers.cli import hfscale
from tests.helpers.corpus import run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at ZeRO 1 on two ranks, with a `latest` file that points nowhere."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "run.yaml").write_text(
        yaml.safe_dump(run_values(corpus, folder, "first", train={"steps": 12}))
    )
    hfscale("pretrain", folder / "run.yaml", "--procs", 2)
    (folder / "first/checkpoints/latest").write_text("step-99999999")
    return folder / "first"


def values(corpus: Path, root: Path, source: Path, **sections: Any) -> dict[str, Any]:
    return run_values(
        corpus,
        root,
        "second",
        model={"architecture": None, "pretrained": str(source), "config": {}},
        **sections,
    )


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def copy(first: Path, folder: Path) -> tuple[Path, Path]:
    run = Path(shutil.copytree(first, folder / "source"))
    return run, run / "checkpoints/step-00000012"


def test_a_run_goes_on_from_another_runs_weights_and_then_from_its_own(
    corpus: Path, tmp_path: Path, first: Path
) -> None:
    source, _ = copy(first, tmp_path)
    path = tmp_path / "second.yaml"
    sections = {
        "engine": {"zero_stage": 3, "precision": "fp32"},
        "train": {"steps": 2, "global_batch": 16, "micro_batch": 4},
    }
    path.write_text(yaml.safe_dump(values(corpus, tmp_path, source, **sections)))
    hfscale("pretrain", path, "--procs", 2)
    before, after = losses(source), losses(tmp_path / "second")
    assert after[0] < before[3] < before[0], (
        "it would be as far as the first run's first step with fresh weights"
    )
    shutil.rmtree(source)  # a run that has saved needs its source no more
    hfscale("pretrain", path, "--procs", 1, "train.steps=3")
    assert len(losses(tmp_path / "second")) == 3


def test_a_run_of_tokens_goes_on_with_another_batch_to_its_end(
    corpus: Path, tmp_path: Path
) -> None:
    """80 rows in steps of 8; after 4 of them in steps of 16, which are 3: none is left out, and the
    rate goes on falling.

    It does so too where that second part is stopped and goes on.
    """

    def asked(rows: int, batch: int) -> dict[str, Any]:
        lengths = {"steps": None, "tokens": rows * 32, "global_batch": batch, "micro_batch": 8}
        sections = {
            "train": lengths,
            "schedule": {"name": "linear", "warmup_steps": 2},
            "checkpoint": {"every_steps": 1, "keep_last": 9, "every_minutes": None},
        }
        return run_values(corpus, tmp_path, "run", **sections)

    def records(rows: int, batch: int) -> list[dict[str, Any]]:
        return run_ranks(train, 1, asked(rows, batch))[0]

    first = records(32, 8)
    assert [record["step"] for record in first] == [1, 2, 3, 4]
    shown = dict(derived(RunConfig.model_validate(asked(80, 16))))
    assert (shown["steps"], shown["tokens"]) == ("7", "2,560"), "what was done with 8 rows counts"
    wider = records(80, 16)
    assert [record["step"] for record in wider] == [5, 6, 7]
    assert wider[-1]["tokens_seen"] == 80 * 32
    peak = run_values(corpus, tmp_path, "run")["optim"]["lr"]
    falling = [1 - 0.9 * (rows - 16) / (80 - 16) for rows in (48, 64, 80)]  # 16 rows of warm-up
    assert [record["lr"] / peak for record in wider] == pytest.approx(falling)

    shutil.rmtree(tmp_path / "run/checkpoints/step-00000007")  # as if it was killed before
    [again] = records(80, 16)
    exact = ("step", "loss", "lr", "grad_norm", "batch_digest", "tokens_seen")
    assert [again[key] for key in exact] == [wider[-1][key] for key in exact]


def test_a_run_without_a_checkpoint_is_refused_as_a_source(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "source/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint yet(.|\n)*the command that began it"):
        Run(RunConfig.model_validate(values(corpus, tmp_path, tmp_path / "source"))).check()


def test_a_damaged_source_is_named_before_anything_is_loaded(
    corpus: Path, tmp_path: Path, first: Path
) -> None:
    source, checkpoint = copy(first, tmp_path)
    path, file = tmp_path / "second.yaml", checkpoint / "engine/rank-00001.safetensors"
    path.write_text(yaml.safe_dump(values(corpus, tmp_path, source)))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused = hfscale("pretrain", path, "--procs", 1, check=False)
    assert (
        refused.returncode == 2
        and "rank-00001.safetensors" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    file.write_bytes(content[:-1])  # half copied: seen without reading, on the login node
    with pytest.raises(CheckpointError, match=r"damaged(.|\n)*rank-00001"):
        Run(RunConfig.model_validate(values(corpus, tmp_path, source))).check()


def test_a_source_of_a_newer_format_is_refused_as_that(
    corpus: Path, tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, checkpoint = copy(first, tmp_path)
    with monkeypatch.context() as patched:
        entries = manifest.read_manifest(checkpoint)
        patched.setattr(manifest, "VERSION", manifest.VERSION + 1)
        manifest.write_manifest(checkpoint, entries, step=12)
    with pytest.raises(CheckpointError, match="newer version"):
        Run(RunConfig.model_validate(values(corpus, tmp_path, source))).check()
