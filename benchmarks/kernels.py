"""Are documents apart on the live kernels of this machine, do they agree, what does it cost? Run by
`python -m benchmarks.gpu` too.

    python -m benchmarks.kernels [--tiny]      # --tiny: on a CPU too, to try the code

For each model and attention (eager, sdpa with a mask, flash_attention_2 where it is installed) in
bf16, from the same weights: the leak probe, the relative L2 distance of the logits from those of
sdpa in fp32, and forward and backward with `data.cross_document` true and false.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from benchmarks.common import interleaved, machine, ratio, record, spread, table, verdict
from hfscale.config.schema import Model, Named
from hfscale.errors import ConfigError
from hfscale.models.build import build_model
from hfscale.objectives.base import Batch, Objective, Setting, load_objective
from hfscale.stream.rows import Rows
from hfscale.training.accounting import Accounting

VOCAB, ROWS, MEAN, TOLERANCE = 32768, 8, 300, 0.02
_LLAMA = {
    "num_hidden_layers": 12,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 128},
}
SMALL = {
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 2,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def build(
    name: str, attention: str, *, seq_len: int, tiny: bool, dtype: torch.dtype, device: torch.device
) -> Any:
    """Return the model on its device; the same weights whatever the attention and dtype."""
    shape = {key: SMALL.get(key, value) if tiny else value for key, value in SHAPES[name].items()}
    shape["n_positions" if name == "gpt2" else "max_position_embeddings"] = seq_len
    model = build_model(
        Model(architecture=name, config=shape, attention=attention),
        auto_model="AutoModelForCausalLM",
        vocab_size=VOCAB,
        seq_len=seq_len,
        seed=1,
        dtype=dtype,
    )
    return model.to(device).eval()  # type: ignore[arg-type]


def objective_of(model: Any, seq_len: int, *, cross_document: bool) -> Objective:
    setting = Setting(
        seq_len=seq_len, micro_batch=ROWS, cross_document=cross_document, model_config=model.config
    )
    return load_objective(Named(name="clm"), setting)


def make_rows(seq_len: int, mean: int) -> Rows:
    """Return rows of random ids and documents."""
    rng = torch.Generator().manual_seed(0)
    boundaries = (torch.rand(ROWS * seq_len, generator=rng) < 1 / mean).nonzero().squeeze(1)
    ids_BL = torch.randint(VOCAB, (ROWS, seq_len + 1), generator=rng)
    return Rows(
        ids_BL,
        boundaries,
        torch.ones(ROWS, dtype=torch.bool),
        torch.zeros(ROWS, dtype=torch.int16),
        torch.arange(ROWS),
    )


def stepper(
    model: Any, objective: Objective, batch: Batch, device: torch.device
) -> Callable[[], float]:
    """Return a function that makes one forward and backward pass and returns its milliseconds."""

    def step() -> float:
        _wait(device)
        began = time.perf_counter()
        for loss in Accounting(objective).losses(model, [batch], {"clm": 1}):
            loss.backward()
        _wait(device)
        model.zero_grad()
        return 1e3 * (time.perf_counter() - began)

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, *, tiny: bool, device: torch.device, turns: int) -> list[list[str]]:
    """Return the table's lines of one model."""
    seq_len = 64 if tiny else 1024
    rows = make_rows(seq_len, 20 if tiny else MEAN)
    shape = {"seq_len": seq_len, "tiny": tiny, "device": device}
    whole = build(name, "sdpa", dtype=torch.float32, **shape)
    expected = _logits(objective_of(whole, seq_len, cross_document=False), whole, rows, device)
    del whole
    lines = []
    for attention in ("eager", "sdpa", "flash_attention_2"):
        if attention == "flash_attention_2" and not (
            device.type == "cuda" and is_flash_attn_2_available()
        ):
            lines.append([name, attention, "not installed here", *[""] * 5])
            continue
        model = build(name, attention, dtype=torch.bfloat16, **shape)
        apart, crossing = (
            objective_of(model, seq_len, cross_document=which) for which in (False, True)
        )
        try:
            apart.check(model, device=device)
            probe = "apart"
        except ConfigError as error:
            probe = f"**refused**: {error.what}"
        logits = _logits(apart, model, rows, device)
        distance = ((logits - expected).norm() / expected.norm()).item()
        taken = interleaved(
            {
                which: stepper(model, objective, objective.collate(rows).to(device), device)
                for which, objective in (("true", crossing), ("false", apart))
            },
            repeats=turns,
            warm=2,
        )
        lines.append(
            [
                name,
                attention,
                probe,
                f"{distance:.4f}",
                verdict(distance, at_most=TOLERANCE),
                spread(taken["true"], form="{:.1f}"),
                spread(taken["false"], form="{:.1f}"),
                f"{ratio(taken['false'], taken['true']):.2f}",
            ]
        )
    return lines


@torch.no_grad()
def _logits(objective: Objective, model: Any, rows: Rows, device: torch.device) -> Tensor:
    batch = objective.collate(rows).to(device)
    logits: Tensor = objective.logits(model, batch)  # type: ignore[attr-defined]
    return logits.float().cpu()


def report(*, tiny: bool = False, turns: int = 7) -> str:
    """Return the section: every model and attention on the device that is here."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    what = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else "no GPU: a trial of the code, the times mean nothing"
    )
    lines = [
        line for name in SHAPES for line in measure(name, tiny=tiny, device=device, turns=turns)
    ]
    header = [
        "model",
        "attention",
        "leak probe",
        "distance from sdpa in fp32",
        "",
        "ms, cross_document true",
        "false",
        "false / true",
    ]
    return f"""{what}; {machine("torch", "transformers", "flash-attn")}

{table(header, lines)}

bf16, forward and backward of {ROWS} rows of {64 if tiny else 1024} tokens, documents of
{20 if tiny else MEAN} on average; medians (quartiles) of {turns} turns."""


def main() -> None:
    """Measure, print, and on a GPU write the section ``gpu_isolation`` of RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="small models, on whatever device is there; nothing is written",
    )
    tiny = parser.parse_args().tiny
    if not (tiny or torch.cuda.is_available()):
        raise SystemExit("there is no GPU here; `--tiny` runs the same code on a CPU")
    print(report(tiny=True)) if tiny else record("gpu_isolation", report())


if __name__ == "__main__":
    main()
