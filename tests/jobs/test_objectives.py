"""Every way to pretrain, with the real engine: the same losses for any cut, an exact resume, an
export that transformers uses.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hfscale.checkpoint.weights import open_weights
from hfscale.config.schema import Model, RunConfig
from hfscale.jobs import export
from hfscale.models.build import build_model, special_ids
from hfscale.run.run import Run
from hfscale.tokenizer import load_tokenizer
from tests.helpers.pretraining import PRETRAINING, pretraining
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow
# whose parity is in test_parity.py
OTHERS = [kind for kind in PRETRAINING if kind not in ("gpt2", "llama")]
# ZeRO stage and precision of the resume; a kind that is not named takes the hardest
EXACT_AT = {
    "bert": (2, "bf16"),
    "t5": (3, "bf16"),
    "bart": (1, "fp32"),
    "contrastive": (1, "bf16"),
}
GROWN_AT = {"gpt2": 1, "modernbert": 0, "bart": 2}  # of a start from a transformers folder
# these start as another kind does
LIKE_ANOTHER = ("llama", "roberta", "contrastive_mlm")
WITH_HEAD = {"clm": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
EXACT = ("loss", "grad_norm", "batch_digest")


@pytest.mark.parametrize("kind", OTHERS)
def test_losses_are_those_of_one_process(corpus: Path, tmp_path: Path, kind: str) -> None:
    def records(stage: int, ranks: int, micro_batch: int) -> list[dict[str, Any]]:
        values = pretraining(
            corpus,
            tmp_path,
            f"{stage}-{ranks}",
            kind,
            engine={"zero_stage": stage},
            optim={"clip_norm": 0.3},
            train={"steps": 5, "global_batch": 16, "micro_batch": micro_batch},
        )
        return run_ranks(train, ranks, values)[0]

    alone = records(0, 1, 16)
    losses = [record["loss"] for record in alone]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses)), losses
    for stage, ranks, micro_batch in ((3, 2, 4), (1, 2, 8), (2, 4, 2)):
        cut = records(stage, ranks, micro_batch)
        assert [record["loss"] for record in cut] == pytest.approx(losses, abs=1e-5), (stage, ranks)
        assert [record["grad_norm"] for record in cut] == pytest.approx(
            [record["grad_norm"] for record in alone], rel=1e-3
        ), (stage, ranks)
        assert [record["batch_digest"] for record in cut] == [
            record["batch_digest"] for record in alone
        ]


@pytest.mark.parametrize("kind", OTHERS)
def test_it_resumes_exactly_and_leaves_as_a_model_that_transformers_uses(
    corpus: Path, tmp_path: Path, kind: str
) -> None:
    stage, precision = EXACT_AT.get(kind, (3, "fp32"))
    config: dict[str, Any] = PRETRAINING[kind][2]
    dropout = {key: 0.1 for key in config if "dropout" in key}
    values = pretraining(
        corpus,
        tmp_path,
        "run",
        kind,
        engine={"zero_stage": stage, "precision": precision},
        train={"steps": 4, "global_batch": 16, "micro_batch": 4},
        checkpoint={"every_steps": 2, "every_minutes": None},
        data={
            "validation": {
                "shards": str(corpus / "shards/validation"),
                "every_steps": 2,
                "rows": 12,
            }
        },
    )
    values["model"]["config"] = config | dropout
    first = run_ranks(train, 2, values)[0]
    checkpoints = tmp_path / "run" / "checkpoints"
    # as if killed after step 2 was saved
    shutil.move(checkpoints / "step-00000004", tmp_path / "aside")
    second = run_ranks(train, 2, values)[0]
    assert [
        [record[key] for key in (*EXACT, "validation_loss") if key in record]
        for record in first[2:]
    ] == [
        [record[key] for key in (*EXACT, "validation_loss") if key in record] for record in second
    ]
    assert digests(tmp_path / "aside") == digests(checkpoints / "step-00000004")

    config = RunConfig.model_validate(values)
    assert {
        key.removeprefix("validation_") for key in first[1] if key.startswith("validation_")
    } == Run(config).shape.objective.validated()

    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(values))
    usage = export.run(str(tmp_path / "run"), tmp_path / "out")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(usage, {})
    assert len(said.getvalue()) > 20


@pytest.mark.parametrize("kind", [kind for kind in PRETRAINING if kind not in LIKE_ANOTHER])
def test_it_goes_on_from_a_transformers_folder_with_more_tokens(
    corpus: Path, tmp_path: Path, kind: str
) -> None:
    stage = GROWN_AT.get(kind, 3)
    objective, architecture, config, _ = PRETRAINING[kind]
    plain = load_tokenizer(corpus / "tokenizer")
    auto_model = WITH_HEAD.get(objective["name"], "AutoModelForMaskedLM")
    source = build_model(
        Model(architecture=architecture, config=config),
        auto_model=auto_model,
        vocab_size=len(plain),
        seq_len=32,
        seed=1,
        overrides=special_ids(plain),
    )
    source.save_pretrained(tmp_path / "theirs")
    values = pretraining(
        corpus,
        tmp_path,
        "run",
        kind,
        engine={"zero_stage": stage},
        optim={"lr": 1e-9, "weight_decay": 0.0},
        train={"steps": 1, "global_batch": 16, "micro_batch": 4},
    )
    values["model"] = {"pretrained": str(tmp_path / "theirs")}
    [record] = run_ranks(train, 2, values)[0]
    assert math.isfinite(record["loss"])

    reader = open_weights(tmp_path / "run" / "checkpoints" / "step-00000001")
    words = source.get_input_embeddings().weight.detach()
    more = len(load_tokenizer(values["tokenizer"]["path"]))
    assert more > len(plain)
    name = next(name for name in reader.names() if tuple(reader.shape(name)) == (more, 32))
    grown = reader.read(name)
    torch.testing.assert_close(grown[: len(plain)], words, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        grown[len(plain) :], words.mean(0).expand(len(grown) - len(plain), -1), rtol=0, atol=1e-6
    )


def digests(checkpoint: Path) -> dict[str, str]:
    """Return file -> SHA-256 of every rank's weights and moments."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {
        entry["path"]: entry["sha256"] for entry in files if entry["path"].startswith("engine/")
    }
