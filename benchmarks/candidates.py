"""One piece of training work, and the commands that do it: `hfscale pretrain`, and peers that read
a flat file of the same rows.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PEERS = Path(__file__).parent / "peers"
OPTIM = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}
SEED = 17
FOREVER = 1_000_000  # steps; more than any job reaches before it is ended


@dataclass(frozen=True)
class Work:
    """What every candidate is given. ``folder`` holds tokenizer/, shards/ and model/ (transformers'
    config, perhaps weights).
    """

    folder: Path
    seq_len: int
    micro_batch: int
    accumulation: int = 1
    procs: int = 1
    precision: str = "bf16"
    zero_stage: int = 1
    compile: bool = False
    log_every: int = 10
    steps: int = FOREVER
    model: dict[str, Any] = field(
        default_factory=dict
    )  # the config's section; empty: the weights in model/

    @property
    def name(self) -> str:
        return f"p{self.procs}-l{self.log_every}-{'compiled' if self.compile else 'plain'}"

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.procs

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len

    @property
    def rows(self) -> Path:
        return self.folder / f"rows-{self.global_batch}.bin"

    def ours(self) -> list[str]:
        """Return the command of hfscale, with its config written."""
        config = {
            "run": {"name": self.name, "root": str(self.folder / "runs"), "seed": SEED},
            "tokenizer": {"path": str(self.folder / "tokenizer")},
            "data": {"seq_len": self.seq_len, "sources": [{"shards": str(self.folder / "shards")}]},
            "model": self.model or {"pretrained": str(self.folder / "model")},
            "objective": {"name": "clm"},
            "optim": OPTIM,
            "schedule": {"name": "constant"},
            "train": {
                "steps": self.steps,
                "global_batch": self.global_batch,
                "micro_batch": self.micro_batch,
            },
            "engine": {
                "zero_stage": self.zero_stage,
                "precision": self.precision,
                "compile": self.compile,
            },
            "metrics": {"every_steps": self.log_every},
        }
        file = self.folder / f"ours-{self.name}.yaml"
        file.write_text(yaml.safe_dump(config))
        return [
            sys.executable,
            "-m",
            "launch.cli",
            "pretrain",
            str(file),
            "--procs",
            str(self.procs),
        ]

    def peer(self, script: str) -> list[str]:
        """Return the command of a peer, with its work file written."""
        content = {
            "model": str(self.folder / "model"),
            "rows": str(self.rows),
            "dtype": "<u2",
            "seq_len": self.seq_len,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "steps": self.steps,
            "log_every": self.log_every,
            **OPTIM,
            "zero_stage": self.zero_stage,
            "precision": self.precision,
            "compile": self.compile,
            "scratch": str(self.folder / "trainer"),
        }
        file = self.folder / f"work-{self.name}.json"
        file.write_text(json.dumps(content))
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(self.procs),
            str(PEERS / script),
            str(file),
        ]

    def write_rows(self, *, limit: int) -> None:
        """Write at most ``limit`` rows for the peers: one epoch or less, in the order in which
        hfscale trains on them.
        """
        from hfscale.dist.world import Place
        from hfscale.stream.loader import Stream
        from hfscale.stream.rows import TokenRows
        from tests.helpers.orders import order_of

        rows = TokenRows(self.folder / "shards", seq_len=self.seq_len)
        order = order_of(rows.shard_rows, seed=SEED, lanes="auto", block=1024)
        stream = Stream(
            rows,
            order,
            global_batch=self.global_batch,
            micro_batch=self.global_batch,
            place=Place(),
        )
        with open(self.rows, "wb") as file:
            for _ in range(min(order.rows, limit) // self.global_batch):
                file.write(stream.take()[0].ids_BL.numpy().astype("<u2").tobytes())
                stream.advance()
        stream.close()
