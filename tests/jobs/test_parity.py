"""However a step is cut - ZeRO stage, ranks, micro-batches - the losses are those of one plain fp32
process.

Documents are kept apart, so ranks score unequal numbers of tokens; the gradient is clipped in most
steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.corpus import GPT2, LLAMA, run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {"gpt2": {**GPT2, "config": GPT2["config"] | NO_DROPOUT}, "llama": LLAMA}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model", MODELS)
def test_losses_are_those_of_one_process(corpus: Path, tmp_path: Path, model: str) -> None:
    def records(stage: int, ranks: int, micro_batch: int = 4) -> list[dict[str, Any]]:
        values = run_values(
            corpus,
            tmp_path,
            f"{stage}-{ranks}-{micro_batch}",
            model=MODELS[model],
            engine={"zero_stage": stage},
            data={"cross_document": False},
            optim={"lr": 1e-2, "clip_norm": 0.3},
            train={"steps": 10, "global_batch": 16, "micro_batch": micro_batch},
        )
        return run_ranks(train, ranks, values)[0]

    alone = records(0, 1, micro_batch=16)
    losses = [record["loss"] for record in alone]
    assert losses[0] - losses[-1] > 0.5, losses
    assert sum(record["grad_norm"] > 0.3 for record in alone) >= 5, "clipping was not at work"
    for ranks in (1, 2, 4):
        for stage in (0, 1, 2, 3):
            cut = records(stage, ranks)
            assert [record["loss"] for record in cut] == pytest.approx(losses, abs=1e-5), (
                stage,
                ranks,
            )
            norms = [record["grad_norm"] for record in alone]
            assert [record["grad_norm"] for record in cut] == pytest.approx(norms, rel=1e-4), (
                stage,
                ranks,
            )
            assert [record["batch_digest"] for record in cut] == [
                record["batch_digest"] for record in alone
            ], (stage, ranks)
