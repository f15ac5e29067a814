"""tokens/s and MFU on one GPU: `hfscale pretrain` against a hand-written torch loop and a
hand-written DeepSpeed loop, bf16.

Needs no network: it makes its own token shards. One GPT-2 of 124 M and one Llama-like model of 1 B
parameters, each with and without compile; the candidates stay alive together on the GPU and take
turns. What to bring is in gpu.md. Before that, kernels.py looks whether documents are kept apart on
this GPU's kernels.

    python -m benchmarks.gpu [--models gpt2-124m llama-1b] [--turns 5] [--out FILE]
    # all of its code on a CPU, in a few minutes; the figures mean nothing
    python -m benchmarks.gpu --tiny
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import kernels
from benchmarks.candidates import Work
from benchmarks.common import machine, ratio, record, spread, table
from benchmarks.synthetic import make_shards, make_tokenizer
from benchmarks.turns import Job, Turn, end_with_jobs, take_turns

OURS, TORCH_LOOP, DS_LOOP = (
    "hfscale pretrain",
    "hand-written torch loop",
    "hand-written DeepSpeed loop",
)


@dataclass(frozen=True)
class Model:
    """A model and how it is trained: a step is micro_batch x accumulation rows of ``seq_len``
    tokens.
    """

    architecture: str
    shape: dict[str, Any]
    seq_len: int
    micro_batch: int
    accumulation: int
    log_every: int  # steps; a turn is a few of these


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "gpt2-124m": Model(
        "gpt2",
        {
            "vocab_size": 50304,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            **NO_DROPOUT,
        },
        seq_len=1024,
        micro_batch=16,
        accumulation=4,
        log_every=10,
    ),
    "llama-1b": Model(
        "llama",
        {
            "vocab_size": 32768,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        seq_len=2048,
        micro_batch=4,
        accumulation=4,
        log_every=2,
    ),
}
TINY = {
    "gpt2-tiny": Model(
        "gpt2",
        {
            "vocab_size": 1024,
            "n_positions": 64,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 2,
            **NO_DROPOUT,
        },
        seq_len=64,
        micro_batch=2,
        accumulation=2,
        log_every=2,
    ),
    "llama-tiny": Model(
        "llama",
        {
            "vocab_size": 1024,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        seq_len=64,
        micro_batch=2,
        accumulation=2,
        log_every=2,
    ),
}


def prepare(folder: Path, model: Model, *, tokens: int) -> tuple[int, float]:
    """Return the parameters and flops a token of ``model``, after writing tokenizer, shards and
    transformers' config for it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from hfscale.models.flops import flops_per_token

    vocab = model.shape["vocab_size"]
    make_shards(
        folder / "shards",
        tokenizer=make_tokenizer(folder / "tokenizer", vocab_size=vocab),
        vocab_size=vocab,
        tokens=tokens,
    )
    config = AutoConfig.for_model(model.architecture, **model.shape, bos_token_id=0, eos_token_id=0)
    config.save_pretrained(folder / "model")
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    built.tie_weights()
    parameters = sum(p.numel() for p in built.parameters())
    return parameters, flops_per_token(built, seq_len=model.seq_len)


def measure(
    work: Work, *, turns: int, lines: int
) -> tuple[dict[str, list[Turn]], dict[str, float]]:
    """Return each candidate's turns, and its last loss."""
    jobs: list[Job] = []
    commands = {
        OURS: work.ours(),
        TORCH_LOOP: work.peer("torch_loop.py"),
        DS_LOOP: work.peer("deepspeed_loop.py"),
    }
    try:
        for name, command in commands.items():
            jobs.append(
                Job(name, command, env={"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})
            )
            jobs[-1].warm_up(lines=3)
            print(f"{name}: started", flush=True)
        taken = take_turns(jobs, turns=turns, lines=lines)
        return taken, {job.name: list(job.losses.values())[-1] for job in jobs}
    finally:
        for job in jobs:
            job.kill()


def rows_of(
    name: str,
    work: Work,
    taken: dict[str, list[Turn]],
    losses: dict[str, float],
    *,
    flops: float,
    peak: float | None,
) -> list[list[str]]:
    """Return the table's lines of one model."""
    ours = [turn.step_s for turn in taken[OURS]]
    lines = []
    for candidate, turns in taken.items():
        seconds = [turn.step_s for turn in turns]
        tokens_per_s = work.tokens_per_step / median(seconds)
        mfu = f"{tokens_per_s * flops / peak:.1%}" if peak else ""
        slower = "" if candidate == OURS else f"{ratio(seconds, ours):.3f}"
        lines.append(
            [
                name,
                "yes" if work.compile else "no",
                candidate,
                f"{tokens_per_s:,.0f}",
                mfu,
                spread([1e3 * s for s in seconds], form="{:.1f}"),
                slower,
                f"{losses[candidate]:.3f}",
            ]
        )
    return lines


def options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--compile", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--lines", type=int, default=3, help="logged steps in a turn")
    parser.add_argument(
        "--tiny", action="store_true", help="small models, on whatever device is there"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="write the table to this file, after each model, and not into RESULTS.md",
    )
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the sections ``gpu_isolation`` and ``gpu`` of RESULTS.md, or the
    file that is asked for.
    """
    from hfscale.models.flops import peak_flops

    asked = options()
    end_with_jobs()
    if not (asked.tiny or torch.cuda.is_available()):
        raise SystemExit("there is no GPU here; `--tiny` runs the same code on a CPU")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    peak = peak_flops(device, precision="bf16")
    what = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else "no GPU: a trial of the code, the figures mean nothing"
    )
    where = f"{what}; {machine('torch', 'deepspeed', 'transformers')}"
    models, tokens = (
        (TINY, 10**5) if asked.tiny else ({name: MODELS[name] for name in asked.models}, 3 * 10**7)
    )
    if asked.tiny or asked.out is not None:
        print(kernels.report(tiny=asked.tiny, turns=asked.turns), flush=True)
    else:
        record("gpu_isolation", kernels.report(turns=asked.turns))
    lines: list[list[str]] = []
    for name, model in models.items():
        with tempfile.TemporaryDirectory(prefix="hfscale-gpu-") as folder:
            parameters, flops = prepare(Path(folder), model, tokens=tokens)
            for compiled in asked.compile:
                work = Work(
                    Path(folder),
                    seq_len=model.seq_len,
                    micro_batch=model.micro_batch,
                    accumulation=model.accumulation,
                    log_every=model.log_every,
                    compile=compiled == "yes",
                    model={"architecture": model.architecture, "config": model.shape},
                )
                work.write_rows(limit=10**6)
                taken, losses = measure(work, turns=asked.turns, lines=asked.lines)
                lines += rows_of(
                    f"{name} ({parameters / 1e6:,.0f} M)",
                    work,
                    taken,
                    losses,
                    flops=flops,
                    peak=peak,
                )
                report(where, lines, models, turns=asked.turns, out=asked.out, tiny=asked.tiny)


def report(
    where: str,
    lines: list[list[str]],
    models: dict[str, Model],
    *,
    turns: int,
    out: Path | None,
    tiny: bool,
) -> None:
    """Write what is known so far: a machine may be taken away in between."""
    header = [
        "model",
        "compile",
        "",
        "tokens/s",
        "MFU",
        "ms a step (quartiles)",
        "ours / it",
        "last loss",
    ]
    steps = "; ".join(
        f"{name}: {m.micro_batch} rows x {m.seq_len} tokens x accumulation {m.accumulation}"
        for name, m in models.items()
    )
    body = (
        f"{where}\n\n{table(header, lines)}\n\nbf16, ZeRO 1, one process; a step is {steps}. "
        f"{turns} turns each; ratios are medians "
        "over the turns. MFU counts 6 N + 12 L H T flops a token (the causal half not taken "
        "off), against the dense 16-bit peak of "
        "the data sheet. The torch loop keeps fp32 weights and computes in bf16 under autocast."
    )
    if out is not None:
        out.write_text(body + "\n")
    elif not tiny:
        record("gpu", body)
    if out is not None or tiny:
        print(body, flush=True)


if __name__ == "__main__":
    main()
