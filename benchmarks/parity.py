"""Are the losses those of one fp32 process, for every objective and family, at ZeRO stages 0 to 3
on 1, 2 and 4 ranks?

    python -m benchmarks.parity [--steps 10]

Each kind of tests/helpers/pretraining.py trains for 10 steps on a small corpus (made here by the
commands of the README), without dropout, with clipping: once in one process with the whole batch at
once, then in every other cut, documents apart where the family can. The first loss stands beside
the theoretical one: ln V where all tokens are equally likely; ln V + 1/2 for T5, whose first logits
have variance 1; ln N for N texts whose embeddings do not tell them apart.

In bf16: how far is the gradient of a step from a float64 sum of the same bf16 micro-gradients, over
1 to 256 of them? (``--bf16``: only this, under a heading of its own.) About 10 minutes on four
cores.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, record, table, verdict
from hfscale.tokenizer import load_tokenizer, vocabulary_size
from tests.engine.tiny import accumulation_error
from tests.helpers.corpus import make_corpus
from tests.helpers.pretraining import PRETRAINING, pretraining
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

BATCH, LIMIT = 16, 1e-5
MICRO_BATCHES = (1, 8, 64, 256)
# value, ZeRO stage: of what config/rules.py refuses because it changes numbers without a word
UNSAFE: dict[str, tuple[object, int]] = {
    "communication_data_type": ("bf16", 2),
    "torch_autocast": ({"enabled": True, "dtype": "bfloat16"}, 1),
    "data_types": ({"grad_accum_dtype": "bf16"}, 1),
}
APART = {
    "gpt2",
    "llama",
    "bert",
    "roberta",
    "modernbert",
}  # the others look at whole rows, or take one document of each


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--bf16", action="store_true", help="only the accumulation in bf16")
    args = parser.parse_args()
    accumulation()
    if args.bf16:
        return
    steps = args.steps
    began = time.perf_counter()
    where = machine("torch", "deepspeed", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "corpus")
        rows, worst = [], 0.0
        for kind in PRETRAINING:
            row, distance = parity(corpus, Path(folder) / kind, kind, steps)
            worst = max(worst, distance)
            rows.append(row)
            print(*row, sep="  ", flush=True)
        moved = [
            [
                f"`{key}: {json.dumps(value)}` at ZeRO {stage}",
                f"{unsafe(corpus, Path(folder) / key, {key: value}, stage, steps):.1e}",
            ]
            for key, (value, stage) in UNSAFE.items()
        ]
    header = [
        "objective, model",
        "first loss",
        "in theory",
        "last loss",
        *(f"ZeRO {stage}" for stage in range(4)),
    ]
    record(
        "parity",
        f"{where}\n\n{table(header, rows)}\n\n"
        f"The last columns: the largest difference of a loss of {steps} steps (batch {BATCH}, "
        "clipping at 0.3, no dropout) on 1, 2 and "
        "4 ranks from one fp32 process that takes the whole batch at once. Largest: "
        f"{worst:.1e}, {verdict(worst, at_most=LIMIT)}. "
        "First losses are equal at every stage and world size to the same difference. "
        f"{time.perf_counter() - began:.0f} s.\n\n"
        "Options of DeepSpeed that `engine.extra` refuses, since they change the losses of "
        "GPT-2 on 2 ranks in fp32 without a word:\n\n"
        f"{table(['option', 'largest difference'], moved)}",
    )


def accumulation() -> None:
    """Record the errors of gradients that are added up over micro-batches in bf16."""
    began = time.perf_counter()
    rows = []
    for ranks in (1, 2):
        for stage in range(4):
            errors = [run_ranks(accumulation_error, ranks, stage, n)[0] for n in MICRO_BATCHES]
            rows.append([f"{stage}", f"{ranks}", *(f"{error:.1e}" for error in errors)])
            print(*rows[-1], sep="  ", flush=True)
    record(
        "accumulation",
        f"{machine('torch', 'deepspeed', 'transformers')}\n\n"
        f"{table(['ZeRO', 'ranks', *(f'{n} micro-batches' for n in MICRO_BATCHES)], rows)}\n\n"
        "The distance of a step's gradient in bf16 from a float64 sum of the same bf16 "
        "micro-gradients, relative to it. Every stage adds "
        "up in fp32 (0 runs as 1), over micro-batches and over ranks. "
        f"{time.perf_counter() - began:.0f} s.",
    )


def parity(corpus: Path, root: Path, kind: str, steps: int) -> tuple[list[str], float]:
    """Return the table's row of ``kind``, and the largest difference in it."""

    def losses(stage: int, ranks: int, micro_batch: int) -> list[float]:
        values: dict[str, Any] = pretraining(
            corpus,
            root,
            f"{stage}-{ranks}-{micro_batch}",
            kind,
            engine={"zero_stage": stage},
            optim={"clip_norm": 0.3},
            data={"cross_document": kind not in APART},
            train={"steps": steps, "global_batch": BATCH, "micro_batch": micro_batch},
        )
        return [step["loss"] for step in run_ranks(train, ranks, values)[0]]

    alone = losses(0, 1, BATCH)
    far = {
        (stage, ranks): max(abs(a - b) for a, b in zip(losses(stage, ranks, 4), alone, strict=True))
        for ranks in (1, 2, 4)
        for stage in range(4)
    }
    by_stage = [max(far[stage, ranks] for ranks in (1, 2, 4)) for stage in range(4)]
    objective, architecture, *_ = PRETRAINING[kind]
    options = ", ".join(f"{key} {value}" for key, value in objective.get("options", {}).items())
    name = f"{objective['name']}{f' ({options})' if options else ''}, {architecture}"
    theory = math.log(vocabulary_size(load_tokenizer(root / "tokenizer"))) + (
        0.5 if architecture == "t5" else 0.0
    )
    if objective["name"] == "contrastive":
        theory = math.log(BATCH) + objective.get("options", {}).get("mlm_weight", 0.0) * theory
    return [
        name,
        f"{alone[0]:.3f}",
        f"{theory:.3f}",
        f"{alone[-1]:.3f}",
        *(f"{value:.1e}" for value in by_stage),
    ], max(by_stage)


def unsafe(corpus: Path, root: Path, extra: dict[str, Any], stage: int, steps: int) -> float:
    """Return the largest difference of a loss that an option of DeepSpeed makes."""

    def losses(name: str, extra: dict[str, Any]) -> list[float]:
        values = pretraining(
            corpus,
            root,
            name,
            "gpt2",
            engine={"zero_stage": stage, "extra": extra},
            optim={"clip_norm": 0.3},
            train={"steps": steps, "global_batch": BATCH, "micro_batch": 4},
        )
        return [step["loss"] for step in run_ranks(train, 2, values)[0]]

    return max(
        abs(a - b) for a, b in zip(losses("with", extra), losses("without", {}), strict=True)
    )


if __name__ == "__main__":
    main()
