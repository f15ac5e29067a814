"""What does it cost to watch a run? Details, TensorBoard and goodput, on and off in turns within
one process, at every 10th step.

Off are all observers but the figures of `metrics.jsonl` and the console; on is what a run has by
default. Both train the same steps, 10 a turn of which one is logged, so the machine's drifts cancel
in the ratio of neighbours. Beside the wall clock the processor time of all threads of a rank is
measured, which other work on the machine disturbs less.

    python -m benchmarks.watching [--pairs 60] [--procs 2 1]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.common import machine, ratio, record, spread, table, verdict
from benchmarks.overhead import MICRO_BATCH, SEQ_LEN, SHAPE, VOCAB, prepare
from hfscale.config.schema import RunConfig
from hfscale.training.loop import Trainer
from hfscale.training.observers.base import Observer, Step
from tests.helpers.ranks import close_ranks, run_ranks

EVERY = 10  # steps of a turn, of which the last one is logged
WARM_TURNS = 6
ALLOWED = 0.01  # of a step
MOST_S = 3600.0  # of a whole measurement

# of each turn: its wall clock and its processor time in seconds a step
Times = list[tuple[float, float]]


@dataclass
class Switch(Observer):
    """The last observer: after each turn it times it, and gives the next one the other half."""

    trainer: Trainer
    watched: list[Observer]
    quiet: list[Observer]
    turns: dict[bool, Times] = field(default_factory=lambda: {True: [], False: []})
    _on: bool = True
    _since: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        """Begin with a turn in which all is watched."""
        self._step = self.trainer.engine.step
        self._turn(on=True)

    def look(self, step: Step) -> None:
        """End a turn, if it is time."""
        if step.number % EVERY:
            return
        wall_s, cpu_s = self._since
        spent = (time.perf_counter() - wall_s) / EVERY, (time.process_time() - cpu_s) / EVERY
        if step.number > WARM_TURNS * EVERY:
            self.turns[self._on].append(spent)
        self._turn(on=not self._on)

    def _turn(self, *, on: bool) -> None:
        self._on = on
        self.trainer.observers = [*(self.watched if on else self.quiet), self]
        step = self._step if on else self._quiet_step
        self.trainer.engine.step = step  # type: ignore[method-assign]
        self._since = (time.perf_counter(), time.process_time())

    def _quiet_step(self, lr: float, **how: object) -> object:
        return self._step(lr, **{**how, "measure": False})  # type: ignore[arg-type]


def measure(folder: str, values: dict[str, object], threads: int) -> dict[bool, Times]:
    """Return the turns of one rank with and without what watches. For ``run_ranks``."""
    import torch

    from hfscale.dist.world import World
    from hfscale.monitor.metrics_log import MetricsLog
    from hfscale.monitor.writers.base import About
    from hfscale.run.run import Run
    from hfscale.training.observers.log import Figures, Log

    torch.set_num_threads(threads)
    config = RunConfig.model_validate(values)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Run(config, World.from_environment()).live(torch.device("cpu"))
    watched = [*trainer.observers]
    quiet = [one for one in watched if isinstance(one, Figures)]
    if any(isinstance(one, Log) for one in watched):
        plain = Path(folder) / f"plain-{config.run.name}"
        plain.mkdir()
        quiet.append(Log(MetricsLog(About(plain, "plain"), total_steps=trainer.total_steps)))
    switch = Switch(trainer, watched, quiet)
    switch.begin()
    trainer.run()
    trainer.observers = [*watched, *quiet[1:]]
    trainer.close()
    return switch.turns


def report(folder: Path, *, procs: int, threads: int, pairs: int) -> str:
    """Return the figures of one number of processes in markdown."""
    values = {
        "run": {"name": f"p{procs}", "root": str(folder / "runs")},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"seq_len": SEQ_LEN, "sources": [{"shards": str(folder / "shards")}]},
        "model": {"pretrained": str(folder / "model")},
        "objective": {"name": "clm"},
        "schedule": {"name": "constant"},
        "train": {
            "steps": (WARM_TURNS + 2 * pairs) * EVERY,
            "global_batch": MICRO_BATCH * procs,
            "micro_batch": MICRO_BATCH,
        },
        "engine": {"zero_stage": 1, "precision": "fp32"},
        "checkpoint": {"every_minutes": None},
        "metrics": {"every_steps": EVERY},
    }
    turns = run_ranks(measure, procs, str(folder), values, threads, timeout_s=MOST_S)[0]
    rows = []
    for number, clock in enumerate(("wall clock", "processor time of rank 0")):
        on = [turn[number] for turn in turns[True]]
        off = [turn[number] for turn in turns[False]]
        cost = ratio(on, off) - 1
        shown = [spread([1e3 * one for one in side], form="{:.1f}") for side in (off, on)]
        rows.append([clock, *shown, f"{100 * cost:+.2f} %, {verdict(cost, at_most=ALLOWED)}"])
    step_ms = 1e3 * median(turn[0] for turn in turns[False])
    return "\n".join(
        [
            f"### {procs} {'processes' if procs > 1 else 'process'} of {threads} threads",
            "",
            table(["", "off, ms a step", "on, ms a step", "on / off - 1"], rows),
            "",
            f"{len(turns[False])} pairs of turns of {EVERY} steps, a step of {step_ms:.0f} ms; "
            "ratios are medians over pairs. Other work on the machine is in the wall clock, and "
            "hardly in the processor time.",
        ]
    )


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--procs", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--threads", type=int, help="of each process; default: cores / processes")
    parser.add_argument("--no-record", action="store_true", help="print only")
    asked = parser.parse_args()
    where = machine("torch", "deepspeed", "tensorboard")
    with tempfile.TemporaryDirectory(prefix="hfscale-watching-") as folder:
        prepare(Path(folder))
        parts = [
            f"{where} GPT-2 of {SHAPE['n_layer']} layers, width {SHAPE['n_embd']}, vocabulary "
            f"{VOCAB}, {MICRO_BATCH} rows of {SEQ_LEN} tokens a process, fp32, ZeRO 1."
        ]
        for procs in asked.procs:
            threads = asked.threads or max(1, cores // procs)
            parts.append(report(Path(folder), procs=procs, threads=threads, pairs=asked.pairs))
    close_ranks()
    if asked.no_record:
        print("\n\n".join(parts))
    else:
        record("watching", "\n\n".join(parts))


if __name__ == "__main__":
    main()
