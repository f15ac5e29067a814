"""A run starts from another run, checkpoint or export at any ZeRO stage with exactly its model;
what does not fit is refused by name.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

from hfscale.checkpoint import layout
from hfscale.config.corpus import CorpusConfig
from hfscale.config.schema import RunConfig
from hfscale.corpus.build import build_shards
from hfscale.errors import CheckpointError, ConfigError
from hfscale.jobs import export
from hfscale.run import origin
from hfscale.run.run import Run
from hfscale.tokenizer import tokenizer_digest
from tests.helpers.corpus import GPT2, LLAMA, run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow
# nothing moves
STILL = {
    "optim": {"lr": 1e-30},
    "train": {"steps": 1},
    "schedule": {"name": "constant", "warmup_steps": 0},
}


def values(corpus: Path, folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    validation = {"shards": str(corpus / "shards" / "validation"), "every_steps": 100, "rows": 16}
    return run_values(
        corpus,
        folder / "runs",
        name,
        **{**sections, "data": {"validation": validation, **sections.get("data", {})}},
    )


def pretrained(path: Path, **config: Any) -> dict[str, Any]:
    return {"architecture": None, "config": config, "pretrained": str(path)}


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``runs/gpt2`` (tied, ZeRO 3, bf16), ``runs/llama`` (not tied, ZeRO 1, fp32), ``export`` of
    the first, and ``loss.json``.
    """
    folder, losses = tmp_path_factory.mktemp("weights"), {}
    for name, model, engine in (
        ("gpt2", GPT2, {"zero_stage": 3, "precision": "bf16"}),
        ("llama", LLAMA, {"zero_stage": 1}),
    ):
        done = values(
            corpus,
            folder,
            name,
            model=model,
            engine=engine,
            checkpoint={"every_steps": 3, "every_minutes": None},
        )
        losses[name] = run_ranks(train, 2, done)[0][-1]["validation_loss"]
        (folder / "runs" / name / "config.yaml").write_text(yaml.safe_dump(done))
    export.run(str(folder / "runs" / "gpt2"), folder / "export")
    (folder / "loss.json").write_text(json.dumps(losses))
    return folder


@pytest.mark.parametrize(
    ("name", "source", "stage", "precision"),
    [
        ("gpt2", "runs/gpt2", 1, "bf16"),
        ("gpt2", "runs/gpt2/checkpoints/step-00000006", 3, "bf16"),
        ("gpt2", "export", 3, "bf16"),
        ("llama", "runs/llama", 0, "fp32"),
        ("llama", "runs/llama", 3, "fp32"),
    ],
)
def test_the_first_loss_is_the_sources(
    corpus: Path, folder: Path, tmp_path: Path, name: str, source: str, stage: int, precision: str
) -> None:
    ours = values(
        corpus,
        tmp_path,
        "run",
        model=pretrained(folder / source),
        engine={"zero_stage": stage, "precision": precision},
        **STILL,
    )
    Run(RunConfig.model_validate(ours)).check()
    records = run_ranks(train, 2, ours)[0]
    assert records[0]["validation_loss"] == json.loads((folder / "loss.json").read_text())[name]
    state = layout.newest_state(tmp_path / "runs" / "run")
    assert state is not None and str(state.pretrained).startswith(str(folder / source))


def test_a_larger_tokenizer_grows_the_vocabulary_and_hardly_moves_the_loss(
    corpus: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = shutil.copytree(corpus / "tokenizer", tmp_path / "tokenizer")
    larger = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    larger.add_tokens([f"<new-{number}>" for number in range(24)])
    larger.save(str(tokenizer / "tokenizer.json"))
    settings = yaml.safe_load((corpus / "corpus.yaml").read_text())
    settings |= {
        "tokenizer": {"path": str(tokenizer)},
        "source": {**settings["source"], "path": str(corpus / "text")},
    }
    built = build_shards(
        CorpusConfig.model_validate(
            {**settings, "shards": {**settings["shards"], "path": str(tmp_path / "shards")}}
        )
    )
    sides = {
        "sources": [{"shards": str(built["train"].folder)}],
        "validation": {"shards": str(built["validation"].folder), "every_steps": 100, "rows": 16},
    }
    grown = values(
        corpus,
        tmp_path,
        "run",
        model=pretrained(folder / "runs/llama"),
        data=sides,
        tokenizer={"path": str(tokenizer)},
        **STILL,
    )
    logging.getLogger("hfscale").propagate = True
    for source, said in ((corpus / "tokenizer", False), (tokenizer, True)):
        caplog.clear()
        for weights in ("runs/llama/checkpoints/step-00000006", "export"):
            origin.warn_of_tokenizer(folder / weights, tokenizer_digest(source))
            assert ("are those of another tokenizer" in caplog.text) == said
    [record] = run_ranks(train, 2, grown)[0]
    before = json.loads((folder / "loss.json").read_text())["llama"]
    assert before < record["validation_loss"] < before + 0.05, (
        "24 of 536 ids at the mean logit take at most log(536/512)"
    )


def refused(
    corpus: Path, tmp_path: Path, model: dict[str, Any], kind: type[Exception] = CheckpointError
) -> str:
    with pytest.raises(kind) as error:
        Run(RunConfig.model_validate(values(corpus, tmp_path, "run", model=model))).check()
    return str(error.value)


def meddle(checkpoint: Path) -> None:
    """Edit the model's config, in as many bytes."""
    config = checkpoint / "config.json"
    config.write_text(
        config.read_text().replace('"initializer_range": 0.02', '"initializer_range": 0.03')
    )


def test_an_edited_config_of_the_runs_own_newest_checkpoint_is_not_believed(
    corpus: Path, folder: Path, tmp_path: Path
) -> None:
    checkpoints = Path(shutil.copytree(folder / "runs/gpt2", tmp_path / "runs/run")) / "checkpoints"
    config = RunConfig.model_validate(
        values(corpus, tmp_path, "run", model=pretrained(folder / "export"))
    )
    assert origin.pretrained_folder(config) == checkpoints / "step-00000006"
    meddle(checkpoints / "step-00000006")
    assert origin.pretrained_folder(config) == checkpoints / "step-00000003"


def test_what_cannot_give_its_weights_is_refused_before_anything_is_built(
    corpus: Path, folder: Path, tmp_path: Path
) -> None:
    assert "h.0.mlp.c_fc.weight" in refused(
        corpus, tmp_path, pretrained(folder / "export", n_inner=64)
    )
    cut = shutil.copytree(folder / "export", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    edited = Path(
        shutil.copytree(folder / "runs/llama", tmp_path / "edited"), "checkpoints/step-00000006"
    )
    meddle(edited)
    for name in (edited, edited.parents[1]):
        assert "config.json does not have the digest" in refused(corpus, tmp_path, pretrained(name))
    assert "missing or damaged" in refused(corpus, tmp_path, pretrained(cut))
    assert "neither a folder" in refused(
        corpus, tmp_path, pretrained(tmp_path / "nowhere"), ConfigError
    )
    assert not (tmp_path / "runs").exists()
