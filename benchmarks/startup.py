"""How soon the command line answers: `hfscale --help`, and a config with mistakes, against an empty
Python program. And how soon a run has done its first step, new and resumed, against a hand-written
DeepSpeed loop on the same model, which saves nothing and checks nothing.

python -m benchmarks.startup [--turns 15] [--starts 5] [--procs 2]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks import overhead
from benchmarks.candidates import Work
from benchmarks.common import interleaved, machine, ratio, record, spread, table, verdict
from benchmarks.turns import Job, end_with_jobs
from hfscale.checkpoint import layout
from hfscale.reports.goodput import ledger

BAD_CONFIG = """\
run: {name: bad}
tokenizer: {path: tokenizer}
data: {seq_len: 128, sources: [{shards: shards}]}
model: {architecture: gpt2}
objective: {name: clm}
train: {steps: 10, global_batch: seven, micro_batsh: 8}
"""
NOTHING, HELP, REFUSED = "python -c pass", "hfscale --help", "a config with two mistakes, refused"
OURS, RESUMED, LOOP = "hfscale pretrain", "... resumed", "hand-written DeepSpeed loop"
ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}


def timed(command: list[str], *, code: int, says: str = "") -> Callable[[], float]:
    """Return a function that runs ``command`` and returns its seconds, after checking what it
    answered.
    """

    def run() -> float:
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        elapsed = time.perf_counter() - start
        said = done.stdout + done.stderr
        if done.returncode != code or says not in said or "Traceback" in said:
            raise SystemExit(f"{command} ended with {done.returncode} and said:\n{said}")
        return elapsed

    return run


def hfscale() -> list[str]:
    """Return the installed command of this environment, or the same started as a module."""
    installed = Path(sys.executable).with_name("hfscale")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "launch.cli"]


def commands(folder: Path, *, turns: int) -> str:
    """Return the report on commands that answer at once."""
    config = folder / "bad.yaml"
    config.write_text(BAD_CONFIG)
    refuse = [*hfscale(), "pretrain", str(config)]
    taken = interleaved(
        {
            NOTHING: timed([sys.executable, "-c", "pass"], code=0),
            HELP: timed([*hfscale(), "--help"], code=0, says="pretrain"),
            REFUSED: timed(refuse, code=2, says="micro_batch"),
        },
        repeats=turns,
        warm=2,
    )
    targets = {HELP: 0.3, REFUSED: 1.0}
    rows = [
        [
            f"`{name}`" if name != REFUSED else name,
            spread(seconds, form="{:.3f}"),
            f"{ratio(seconds, taken[NOTHING]):.1f}",
            verdict(median(seconds), at_most=targets[name]) if name in targets else "",
        ]
        for name, seconds in taken.items()
    ]
    figures = table(["", "s (quartiles)", "x empty Python", "target, s"], rows)
    return f"{figures}\n\n{turns} turns, files in the cache."


def first_step_s(name: str, command: list[str]) -> float:
    """Return the seconds from the start of a command to its first logged step, then end it."""
    start = time.perf_counter()
    job = Job(name, command, env=ENV)
    try:
        return job.wait().seen_s - start
    finally:
        job.kill()


def read_s(folder: Path) -> tuple[float, int]:
    """Return the seconds that it takes to read all files of ``folder``, and their bytes."""
    start = time.perf_counter()
    size = sum(len(file.read_bytes()) for file in folder.rglob("*") if file.is_file())
    return time.perf_counter() - start, size


def first_steps(work: Work, *, starts: int) -> str:
    """Return the report on starts that take turns: ours, ours resumed, the loop."""
    work.write_rows(limit=10**4)
    run = work.folder / "runs" / work.name
    seconds: dict[str, list[float]] = {OURS: [], RESUMED: [], LOOP: []}
    parts: list[dict[str, float]] = []
    reads: list[str] = []
    for turn in range(starts):
        shutil.rmtree(run, ignore_errors=True)
        seconds[OURS].append(first_step_s(OURS, work.ours()))
        parts.append(ledger(run).start())
        shutil.rmtree(run)
        once = replace(work, steps=1)
        subprocess.run(once.ours(), check=True, capture_output=True, env=os.environ | ENV)
        seconds[RESUMED].append(first_step_s(RESUMED, work.ours()))
        loaded_s = ledger(run).attempts[-1].start["weights"]
        disk_s, size = read_s(layout.committed(run / "checkpoints")[0])
        reads.append(
            f"{size / 1e6:,.0f} MB loaded in {loaded_s:.2f} s, read alone in {disk_s:.3f} s"
        )
        seconds[LOOP].append(first_step_s(LOOP, work.peer("deepspeed_loop.py")))
        print(f"  start {turn + 1}/{starts}", file=sys.stderr)
    rows = [
        [
            name,
            spread(taken, form="{:.2f}"),
            "" if name == LOOP else verdict(ratio(taken, seconds[LOOP]), at_most=1.2),
        ]
        for name, taken in seconds.items()
    ]
    middle = sorted(parts, key=lambda one: sum(one.values()))[len(parts) // 2]
    cut = ", ".join(f"{name} {s:.2f}" for name, s in middle.items() if s >= 0.01)
    return "\n\n".join(
        [
            f"First step of a GPT-2 of width {overhead.SHAPE['n_embd']} on {work.procs} processes:",
            table(["", "s (quartiles)", "x the loop"], rows),
            f"{starts} starts in turns. The parts of our middle start, s: {cut}. "
            f"The checkpoint of the resumed: {'; '.join(reads)}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=15, help="of the commands that answer at once")
    parser.add_argument("--starts", type=int, default=5, help="of each run")
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--no-record", action="store_true", help="print only")
    asked = parser.parse_args()
    end_with_jobs()
    where = machine("pydantic", "typer", "torch", "deepspeed", "transformers")
    with tempfile.TemporaryDirectory(prefix="hfscale-startup-") as folder:
        home = Path(folder)
        parts = [where, commands(home, turns=asked.turns)]
        overhead.prepare(home)
        work = Work(
            home,
            seq_len=overhead.SEQ_LEN,
            micro_batch=overhead.MICRO_BATCH,
            procs=asked.procs,
            log_every=1,
        )
        parts.append(first_steps(work, starts=asked.starts))
    body = "\n\n".join(parts)
    if asked.no_record:
        print(body)
    else:
        record("startup", body)


if __name__ == "__main__":
    main()
