"""What DeepSpeed is given by ``engine.extra``, in whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.pretraining import pretraining
from tests.helpers.ranks import RankFailure, close_ranks, run_ranks
from tests.helpers.training import train

SECOND_COPY = {"zero_optimization": {"zero_hpz_partition_size": 2}}
REFUSED = {"zero_optimization": {"stage3_max_live_parameters": -1}}


@pytest.fixture
def own_ranks() -> Iterator[None]:
    """Ranks whose groups nobody has made yet, nor will find."""
    close_ranks(2)
    yield
    close_ranks(2)


@pytest.mark.slow
def test_a_second_copy_of_the_weights_is_right_at_a_start_and_at_a_resume(
    corpus: Path, tmp_path: Path, own_ranks: None
):
    def losses(name: str, steps: int, extra: dict[str, Any]) -> list[float]:
        values = pretraining(
            corpus,
            tmp_path,
            name,
            "llama",
            engine={"zero_stage": 3, "extra": extra},
            train={"steps": steps, "global_batch": 8, "micro_batch": 2},
            schedule={"name": "constant"},
        )
        return [step["loss"] for step in run_ranks(train, 2, values)[0]]

    plain = losses("plain", 4, {})
    copied = losses("copied", 2, SECOND_COPY) + losses("copied", 4, SECOND_COPY)
    assert copied == plain
    with pytest.raises(RankFailure, match=r"where:  engine.extra[\s\S]*without engine.extra it"):
        losses("refused", 2, REFUSED)
