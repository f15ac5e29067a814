"""Does hfscale cost anything? Its tokens/s against a hand-written DeepSpeed loop and against
transformers' Trainer.

The three train the same small GPT-2 from the same weights on the same rows, with the same batch,
precision, ZeRO stage, AdamW and clipping, and log every 10 steps. First each takes a few steps,
logging each, to show that they do the same work; then they take turns.

    python -m benchmarks.overhead [--launches 3] [--turns 5] [--procs 2 1] [--precision bf16]
                                  [--zero-stage 1]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.candidates import Work
from benchmarks.common import machine, ratio, record, spread, table, verdict
from benchmarks.synthetic import make_shards, make_tokenizer
from benchmarks.turns import Job, Turn, end_with_jobs, take_turns

VOCAB, SEQ_LEN, MICRO_BATCH = 4096, 128, 4
SHAPE = {
    "n_embd": 256,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": SEQ_LEN,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
SAME_STEPS = 8  # whose losses are compared first
OURS, LOOP, TRAINER = "hfscale pretrain", "hand-written DeepSpeed loop", "transformers Trainer"


def candidates(work: Work) -> dict[str, list[str]]:
    """Return the commands by name."""
    return {
        OURS: work.ours(),
        LOOP: work.peer("deepspeed_loop.py"),
        TRAINER: work.peer("hf_trainer.py"),
    }


def prepare(folder: Path) -> None:
    """Write tokenizer, shards and first weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer(folder / "tokenizer", vocab_size=VOCAB)
    make_shards(folder / "shards", tokenizer=tokenizer, vocab_size=VOCAB, tokens=8 * 10**6)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **SHAPE)
    ).save_pretrained(folder / "model")


def same_work(work: Work, env: dict[str, str]) -> str:
    """Return a sentence on how far apart the candidates' losses are; they start from the same
    weights and rows.
    """
    losses = {}
    for name, command in candidates(replace(work, log_every=1, steps=SAME_STEPS)).items():
        job = Job(name, command, env=env)
        try:
            for _ in range(SAME_STEPS):
                job.wait()
        finally:
            job.kill()
        losses[name] = np.array([job.losses[step] for step in range(1, SAME_STEPS + 1)])
    apart = {name: np.abs(losses[name] - losses[OURS]).max() for name in (LOOP, TRAINER)}
    if max(apart.values()) > 0.02:
        raise SystemExit(f"the candidates do not do the same work: {losses}")
    return (
        f"Same work: our losses of steps 1 and {SAME_STEPS} are {losses[OURS][0]:.4f} and "
        f"{losses[OURS][-1]:.4f}; over these steps "
        f"the others' are at most {apart[LOOP]:.4f} ({LOOP}) and {apart[TRAINER]:.4f} "
        f"({TRAINER}) away."
    )


def measure(work: Work, *, threads: int, launches: int, turns: int, lines: int) -> str:
    """Return the report on one number of processes. New launches even out what a process keeps for
    life (where its memory lies).
    """
    env = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    work.write_rows(limit=10**6)
    same = same_work(work, env)
    taken: dict[str, list[Turn]] = {}
    for _ in range(launches):
        shutil.rmtree(work.folder / "runs")
        jobs: list[Job] = []
        try:
            for name, command in candidates(work).items():
                jobs.append(Job(name, command, env=env))
                jobs[-1].warm_up(lines=3)
            for name, measured in take_turns(jobs, turns=turns, lines=lines).items():
                taken.setdefault(name, []).extend(measured)
        finally:
            for job in jobs:
                job.kill()
    return report(taken, work, threads=threads, launches=launches, lines=lines) + f"\n\n{same}"


def report(
    taken: dict[str, list[Turn]], work: Work, *, threads: int, launches: int, lines: int
) -> str:
    """Return the figures of ``taken`` in markdown."""
    seconds = {name: [turn.step_s for turn in turns] for name, turns in taken.items()}
    tokens = work.tokens_per_step
    rows: list[list[Any]] = []
    for name, steps in seconds.items():
        against = ratio(steps, seconds[OURS])  # of speeds: theirs takes so much longer
        rows.append(
            [
                name,
                f"{tokens / median(steps):,.0f}",
                spread([1e3 * s for s in steps], form="{:.1f}"),
                f"{1e3 * median(turn.step_cpu_s for turn in taken[name]):.1f}",
                "" if name == OURS else f"{against:.3f}",
            ]
        )
    loop, trainer = ratio(seconds[LOOP], seconds[OURS]), ratio(seconds[TRAINER], seconds[OURS])
    under = verdict(1e3 * median(seconds[OURS]), at_most=100)
    title = (
        f"{work.procs} {'processes' if work.procs > 1 else 'process'} of {threads} "
        f"threads, ZeRO {work.zero_stage}, {work.precision}"
    )
    return "\n".join(
        [
            f"### {title}",
            "",
            table(
                [
                    "",
                    "tokens/s",
                    "ms a step (quartiles)",
                    "ms of processor time a step",
                    "ours / it",
                ],
                rows,
            ),
            "",
            f"{len(seconds[OURS])} turns in {launches} launches, {10 * lines} steps each; "
            "ratios are medians over the turns. Of the loop: "
            f"{loop:.3f}, {verdict(loop, at_least=0.98)}. Of the Trainer: {trainer:.3f}, "
            f"{verdict(trainer, at_least=1.0)}. "
            f"Step: {under} ms.",
        ]
    )


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--procs", type=int, nargs="+", default=[2, 1])
    parser.add_argument(
        "--threads",
        type=int,
        help="of each process; default: cores / processes, as the local launcher has it",
    )
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--turns", type=int, default=5, help="in a launch")
    parser.add_argument("--lines", type=int, default=5, help="logged steps (of 10 steps) in a turn")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="print only")
    asked = parser.parse_args()
    end_with_jobs()
    where = machine("torch", "deepspeed", "transformers")
    with tempfile.TemporaryDirectory(prefix="hfscale-overhead-") as folder:
        prepare(Path(folder))
        parts = [
            f"{where} GPT-2 of {SHAPE['n_layer']} layers, width {SHAPE['n_embd']}, vocabulary "
            f"{VOCAB}, "
            f"{MICRO_BATCH} rows of {SEQ_LEN} tokens a process."
        ]
        for procs in asked.procs:
            work = Work(
                Path(folder),
                seq_len=SEQ_LEN,
                micro_batch=MICRO_BATCH,
                procs=procs,
                precision=asked.precision,
                zero_stage=asked.zero_stage,
            )
            parts.append(
                measure(
                    work,
                    threads=asked.threads or max(1, cores // procs),
                    launches=asked.launches,
                    turns=asked.turns,
                    lines=asked.lines,
                )
            )
            print(parts[-1], flush=True)
    if not asked.no_record:
        record("overhead", "\n\n".join(parts))


if __name__ == "__main__":
    main()
