"""A run that goes on with 2, 3 and 1 ranks after it began on 4, through the command line: every
step's batch is that of one rank alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.shards.manifest import Manifest
from tests.helpers.cli import hfscale
from tests.helpers.corpus import GPT2, run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow
BATCH = 24
STEPS_OF_AN_EPOCH = 5  # and a part of one


def test_four_ranks_then_two_then_three_then_one(corpus: Path, tmp_path: Path) -> None:
    """Stops after steps 3 (in the first epoch), 7 (in the second), 12 (in the third); 2 and 3 ranks
    each go over an epoch's end.
    """
    shards = corpus / "shards" / "validation"
    seq_len = Manifest.load(shards).tokens // (BATCH * STEPS_OF_AN_EPOCH + BATCH // 2)
    model = GPT2 | {"config": GPT2["config"] | {"n_layer": 1, "n_positions": seq_len}}

    def values(name: str) -> dict[str, Any]:
        return run_values(
            corpus,
            tmp_path / "runs",
            name,
            data={"seq_len": seq_len, "block": 32, "sources": [{"shards": str(shards)}]},
            model=model,
            train={"steps": 14, "global_batch": BATCH, "micro_batch": BATCH},
        )

    alone = run_ranks(train, 1, values("alone"))[0]
    elastic = tmp_path / "elastic.yaml"
    elastic.write_text(yaml.safe_dump(values("elastic")))
    for ranks, steps in ((4, 3), (2, 7), (3, 12), (1, 14)):
        hfscale(
            "pretrain",
            elastic,
            f"train.steps={steps}",
            f"train.micro_batch={BATCH // ranks}",
            "--procs",
            ranks,
        )

    parts = [
        json.loads(line)
        for line in (tmp_path / "runs" / "elastic" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in parts] == list(range(1, 15)), (
        "no step twice, none left out"
    )
    assert [record["batch_digest"] for record in parts] == [
        record["batch_digest"] for record in alone
    ]
    assert len({record["batch_digest"] for record in alone}) == 14
    assert [int(parts[step - 1]["epoch"]) for step in (3, 7, 12, 14)] == [0, 1, 2, 2]
    assert [record["attempt"] for record in parts] == [1] * 3 + [2] * 4 + [3] * 5 + [4] * 2
