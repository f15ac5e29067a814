"""What it costs to keep documents apart: forward and backward with `data.cross_document` true and
false, and the mask alone.

    python -m benchmarks.masks [--turns 7] [--threads 4]

The step is the objective's own (collate, loss, backward) on a bare model on the CPU, 4,096 tokens,
documents of 300 tokens on average. The models are small, so attention is a larger share of the step
than in a real one. Two minutes; on a GPU see benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import interleaved, machine, ratio, record, spread, table
from hfscale.config.schema import Model, Named
from hfscale.models.build import build_model
from hfscale.objectives.base import Setting, load_objective
from hfscale.objectives.isolation import attention_masks
from hfscale.stream.rows import Rows
from hfscale.training.accounting import Accounting

VOCAB, TOKENS, MEAN = 4096, 4096, 300
LENGTHS = (512, 1024, 2048)
MODELS = {
    "gpt2": {
        "n_layer": 4,
        "n_embd": 256,
        "n_head": 4,
        "n_positions": 2048,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
}
HEADER = [
    "model",
    "dtype",
    "seq_len",
    "ms a step, cross_document true",
    "false",
    "false / true",
    "of it the mask, ms",
    "share",
]


def make_rows(seq_len: int) -> Rows:
    """Return rows of random ids and documents."""
    rng, n = torch.Generator().manual_seed(0), TOKENS // seq_len
    ids_BL = torch.randint(VOCAB, (n, seq_len + 1), generator=rng)
    boundaries = (torch.rand(n * seq_len, generator=rng) < 1 / MEAN).nonzero().squeeze(1)
    return Rows(
        ids_BL,
        boundaries,
        torch.ones(n, dtype=torch.bool),
        torch.zeros(n, dtype=torch.int16),
        torch.arange(n),
    )


def stepper(model: torch.nn.Module, rows: Rows, *, cross_document: bool) -> Callable[[], float]:
    """Return a function that makes one forward and backward pass and returns its seconds."""
    n, length = rows.ids_BL.shape
    objective = load_objective(
        Named(name="clm"),
        Setting(
            seq_len=length - 1,
            micro_batch=n,
            cross_document=cross_document,
            model_config=model.config,
        ),
    )  # type: ignore[arg-type]

    accounting = Accounting(objective)

    def step() -> float:
        began = time.perf_counter()
        batch = objective.collate(rows)
        for loss in accounting.losses(model, [batch], accounting.counts([batch])):
            loss.backward()
        model.zero_grad()
        return time.perf_counter() - began

    return step


def mask_s(
    model: torch.nn.Module, documents_BT: Tensor, *, dtype: torch.dtype, turns: int
) -> float:
    """Return the median seconds that the masks of a batch take."""
    taken = []
    config: Any = model.config
    for _ in range(turns):
        began = time.perf_counter()
        attention_masks(documents_BT, dtype=dtype, config=config, causal=True)
        taken.append(time.perf_counter() - began)
    return median(taken)


def line_of(model: torch.nn.Module, seq_len: int, *, dtype: torch.dtype, turns: int) -> list[str]:
    """Return the table's cells of one length: steps that cross documents, steps that keep them
    apart, and the mask alone.
    """
    rows = make_rows(seq_len)
    steps = {
        "crossing": stepper(model, rows, cross_document=True),
        "apart": stepper(model, rows, cross_document=False),
    }
    taken = interleaved(steps, repeats=turns, warm=2)
    assert rows.document_ids_BL is not None
    alone_s = mask_s(model, rows.document_ids_BL[:, :-1], dtype=dtype, turns=3 * turns)
    crossing_ms, apart_ms = ([1e3 * seconds for seconds in taken[name]] for name in steps)
    return [
        spread(crossing_ms, form="{:.0f}"),
        spread(apart_ms, form="{:.0f}"),
        f"{ratio(apart_ms, crossing_ms):.2f}",
        f"{1e3 * alone_s:.1f}",
        f"{1e3 * alone_s / median(apart_ms):.1%}",
    ]


def main() -> None:
    """Measure, print, and write the section ``masks`` of RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    where, lines = machine("torch", "transformers"), []
    for name, shape in MODELS.items():
        for dtype in (torch.float32, torch.bfloat16):
            model = build_model(
                Model(architecture=name, config=shape),
                auto_model="AutoModelForCausalLM",
                vocab_size=VOCAB,
                seq_len=max(LENGTHS),
                seed=1,
                dtype=dtype,
            )
            for seq_len in LENGTHS:
                cells = line_of(model, seq_len, dtype=dtype, turns=asked.turns)
                lines.append([name, str(dtype).removeprefix("torch."), seq_len, *cells])
    record(
        "masks",
        f"""{where} {asked.threads} threads, sdpa, {TOKENS:,} tokens a step, 4 layers of width 256,
vocabulary {VOCAB}; medians (quartiles) of {asked.turns} turns.

{table(HEADER, lines)}

The mask is made once a batch for all layers. The rest of the cost is that sdpa skips half of the
scores where it is told `is_causal`, and none where it is given a mask; in wider models it is a
smaller share.""",
    )


if __name__ == "__main__":
    main()
