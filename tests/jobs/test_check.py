"""What does not fit together is said before anything is built, with what to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.config.schema import RunConfig
from hfscale.errors import UserError
from hfscale.run.run import Run
from tests.helpers.cli import hfscale
from tests.helpers.corpus import GPT2, run_values

LONG = {"config": GPT2["config"] | {"n_positions": 16}}


def config(corpus: Path, tmp_path: Path, **sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(run_values(corpus, tmp_path, "run", **sections))


def test_what_fits_is_accepted(corpus: Path, tmp_path: Path) -> None:
    Run(
        config(
            corpus, tmp_path, data={"validation": {"shards": str(corpus / "shards" / "validation")}}
        )
    ).check()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"architecture": "gtp2"}}, ["unknown architecture", "did you mean gpt2"]),
        ({"model": {"config": {"n_layers": 2}}}, ["no such config key", "n_layer"]),
        ({"model": LONG}, ["rows of 32 tokens", "16 positions", "n_positions=32"]),
        ({"model": {"config": {"vocab_size": 100}}}, ["100 ids for a tokenizer of 512"]),
        ({"objective": {"name": "cml"}}, ["unknown objective", "clm"]),
        ({"objective": {"options": {"smoothing": 1}}}, ["smoothing", "objective.options"]),
        ({"data": {"seq_len": 10**6}}, ["no shard is as long as a row", "seq_len"]),
        (
            {"tokenizer": {"path": "no/such/tokenizer"}},
            ["tokenizer.path", "hfscale tokenizer train"],
        ),
    ],
)
def test_what_does_not_fit_is_named(
    corpus: Path, tmp_path: Path, sections: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        Run(config(corpus, tmp_path, **sections)).check()
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


def test_flash_attention_that_is_not_here_is_said(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Run(config(corpus, tmp_path, model={"attention": "flash_attention_2"})).check()
    assert "flash-attn is not installed here" in caplog.text


def test_shards_of_another_tokenizer_are_refused(corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(corpus / "tokenizer", other)
    content = (other / "tokenizer.json").read_text("utf-8")
    (other / "tokenizer.json").write_text(
        content.replace('"add_prefix_space":false', '"add_prefix_space":true').replace(
            '"add_prefix_space": false', '"add_prefix_space": true'
        ),
        "utf-8",
    )
    with pytest.raises(
        UserError, match=r"made with another tokenizer[\s\S]*build the shards again"
    ):
        Run(config(corpus, tmp_path, tokenizer={"path": str(other)})).check()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "debug"])
def test_a_dry_run_checks_and_says_all_and_writes_nothing(
    corpus: Path, tmp_path: Path, launcher: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_values(corpus, tmp_path / "runs", "first")))
    text = hfscale("pretrain", path, "--dry-run", "--launcher", launcher, "--procs", 2).stdout
    assert str(tmp_path / "runs" / "first") in text
    if launcher == "local":
        assert "global_batch 16 = micro_batch 4 x accumulation 2 x world_size 2" in text
        assert text.count("-m hfscale.worker") == 2
    refused = hfscale(
        "pretrain",
        path,
        "--dry-run",
        "--launcher",
        launcher,
        "model.architecture=gtp2",
        check=False,
    )
    assert (
        refused.returncode == 2
        and "did you mean gpt2" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    assert not (tmp_path / "runs").exists()
