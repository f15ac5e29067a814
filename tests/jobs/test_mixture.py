"""Real runs on a mixture: the loss of each source, other numbers of ranks, other weights on a
resume, and the batch time machine.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hfscale.config.load import to_yaml
from hfscale.config.schema import RunConfig
from hfscale.errors import DataError
from hfscale.reports.batch import rebuild
from hfscale.run.run import Run
from tests.helpers.corpus import GPT2, run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def mixed(
    corpus: Path,
    root: Path,
    name: str,
    *,
    weights: tuple[float, float] = (0.7, 0.3),
    **sections: dict[str, Any],
) -> dict[str, Any]:
    shards = [str(corpus / "shards" / part) for part in ("train", "validation")]
    sources = [
        {"name": "big", "shards": shards[0], "weight": weights[0]},
        {"name": "small", "shards": shards[1], "weight": weights[1]},
    ]
    return run_values(
        corpus,
        root,
        name,
        **{
            "data": {"seq_len": 32, "block": 32, "cross_document": False, "sources": sources},
            "model": {**GPT2, "config": GPT2["config"] | NO_DROPOUT},
            **sections,
        },
    )


def first_step(values: dict[str, Any]) -> list[tuple[int, float, int]]:
    """Return source, sum of the losses and number of scored tokens of each row of this rank's first
    step, one row at a time.
    """
    from hfscale.dist.world import World
    from hfscale.run.run import Run

    config = RunConfig.model_validate(values)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Run(config, World.from_environment()).live(torch.device("cpu"))
    found = []
    with trainer.engine.eval_mode(), torch.no_grad():
        for batch in map(trainer.objective.collate, trainer.stream.take()):
            losses = torch.nn.functional.cross_entropy(
                trainer.objective.logits(trainer.engine, batch).transpose(1, 2),
                batch.labels_BT,
                ignore_index=-100,
                reduction="none",
            )  # type: ignore[attr-defined]
            found += list(
                zip(
                    batch.source_B.tolist(),
                    losses.sum(1).tolist(),
                    (batch.labels_BT != -100).sum(1).tolist(),
                )
            )
    trainer.close()
    return found


def test_source_loss_is_a_recomputation_on_any_number_of_ranks(
    corpus: Path, tmp_path: Path
) -> None:
    records = {
        ranks: run_ranks(train, ranks, mixed(corpus, tmp_path, f"{ranks}"))[0] for ranks in (1, 2)
    }
    rows = [
        row for rank in run_ranks(first_step, 2, mixed(corpus, tmp_path, "again")) for row in rank
    ]
    expected = {
        name: sum(total for source, total, _ in rows if source == number)
        / sum(n for source, _, n in rows if source == number)
        for number, name in enumerate(("big", "small"))
    }
    assert records[2][0]["source_loss"] == pytest.approx(expected, rel=1e-5)
    tokens = Counter(
        {number: sum(n for source, _, n in rows if source == number) for number in (0, 1)}
    )
    assert records[2][0]["loss"] == pytest.approx(
        (tokens[0] * expected["big"] + tokens[1] * expected["small"]) / tokens.total(),
        rel=1e-5,
    )
    for one, two in zip(records[1], records[2], strict=True):
        assert one["batch_digest"] == two["batch_digest"]
        assert one["source_loss"] == pytest.approx(two["source_loss"], abs=1e-5)
        assert one["source_epoch"] == two["source_epoch"]


def test_one_source_says_nothing_of_sources(corpus: Path, tmp_path: Path) -> None:
    record = run_ranks(
        train,
        1,
        run_values(
            corpus, tmp_path, "one", train={"steps": 1, "global_batch": 4, "micro_batch": 4}
        ),
    )[0][0]
    assert not {"source_loss", "source_epoch"} & record.keys()


def test_other_weights_on_a_resume_and_every_step_is_rebuilt(corpus: Path, tmp_path: Path) -> None:
    """Step 5 of 8 is in the middle of a block when the weights change; the run's record of what it
    saw stays right.
    """
    length = {"global_batch": 12, "micro_batch": 3}
    first = mixed(corpus, tmp_path, "run", train={"steps": 5, **length})
    second = mixed(corpus, tmp_path, "run", weights=(0.1, 0.9), train={"steps": 9, **length})
    records = run_ranks(train, 2, first)[0] + run_ranks(train, 1, second)[0]
    folder = tmp_path / "run"
    (folder / "config.yaml").write_text(to_yaml(RunConfig.model_validate(second)))
    assert [record["step"] for record in records] == list(range(1, 10))
    steps = [rebuild(folder, step=record["step"]) for record in records]
    assert [step.digest for step in steps] == [record["batch_digest"] for record in records]
    seen = [row for step in steps for row in step.rows]
    assert len({(row.source, row.shard, row.start) for row in seen}) == len(seen) == 9 * 12
    assert {row.source for row in seen[:64]} == {"big", "small"}
    # two blocks of 22 and 10; step 5 ends at row 60
    assert Counter(row.source for row in seen[:64]) == {
        "big": 44,
        "small": 20,
    }
    assert Counter(row.source for row in seen[64:96]) == {"big": 3, "small": 29}
    Run(RunConfig.model_validate(second)).read(device_type="cpu")
    gone = {**second, "data": {**second["data"], "sources": second["data"]["sources"][:1]}}
    with pytest.raises(DataError, match="small of the checkpoint is gone"):
        Run(RunConfig.model_validate(gone)).read(device_type="cpu")
