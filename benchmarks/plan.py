"""What `hfscale plan` says of memory and speed, against real ranks: 40 configs on two CPU ranks.

    python -m benchmarks.plan [--only 8] [--seen FILE]

Architectures x stages, precisions, lengths, micro-batches and checkpointing. Each config trains a
few steps of the real trainer in two ranks of its own (forked, so that nothing is imported twice);
the peak is that of resident memory of the rank with more, the step the median. Planned memory is
compared as it is; planned steps times what the first run of the grid was off by, which is what
`hfscale plan --check` of that one run teaches. A step is measured by the clock and by the processor
time of its rank: what else a machine does is in the first alone. A quarter of an hour on two quiet
cores; `--seen FILE` keeps what was measured, and goes on from there.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import machine, record, table, verdict
from hfscale.config.load import load_values
from hfscale.config.schema import RunConfig
from hfscale.planning.plan import Plan, make_plan
from hfscale.planning.site import Asked
from tests.helpers.corpus import make_corpus
from tests.helpers.forks import Forks
from tests.helpers.pretraining import pretraining

RANKS, STEPS, VOCABULARY = 2, 4, 16_000
WIDE = {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
LLAMA = WIDE | {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
BERT = WIDE | {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {
    **{"vocab_size": VOCABULARY, "n_positions": 512, "n_embd": 384, "n_layer": 4, "n_head": 6},
    **{"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
}
T5 = {
    **{"vocab_size": VOCABULARY, "d_model": 256, "d_ff": 512, "d_kv": 32, "num_layers": 3},
    **{"num_heads": 8, "dropout_rate": 0.0},
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "llama": ("llama", LLAMA),
    "qwen3": ("llama", LLAMA | {"head_dim": 64}),
    "bert": ("bert", BERT),
    "t5": ("t5", T5),
}


@dataclass(frozen=True)
class Case:
    """One way to train. ``rows`` of a micro-batch, ``times`` of them a step and rank."""

    stage: int
    precision: str
    seq_len: int
    rows: int
    times: int
    checkpointing: bool


CASES = (
    Case(0, "fp32", 128, 2, 1, False),
    Case(1, "fp32", 256, 2, 2, False),
    Case(1, "bf16", 256, 2, 2, True),
    Case(2, "fp32", 128, 4, 1, True),
    Case(2, "bf16", 256, 2, 2, False),
    Case(3, "fp32", 128, 2, 2, False),
    Case(3, "bf16", 256, 4, 1, False),
    Case(3, "fp32", 256, 2, 1, True),
)


def grid(folder: Path, corpus: Path) -> Iterator[tuple[str, Case, dict[str, Any]]]:
    """Yield each config with its name and case; one architecture after the other."""
    for name, (kind, values) in KINDS.items():
        architecture = "qwen3" if name == "qwen3" else None
        for number, case in enumerate(CASES):
            config = pretraining(
                corpus,
                folder,
                f"{name}-{number}",
                kind,
                data={"seq_len": case.seq_len},
                train={
                    "steps": STEPS,
                    "global_batch": case.rows * case.times * RANKS,
                    "micro_batch": case.rows,
                },
                checkpoint={"every_steps": 2, "every_minutes": None},
                engine={
                    "zero_stage": case.stage,
                    "precision": case.precision,
                    "activation_checkpointing": case.checkpointing,
                },
            )
            model = config["model"]
            config["model"] = {
                "architecture": architecture or model["architecture"],
                "config": values,
            }
            yield name, case, config


def peak_rss() -> int:
    """Return the most bytes that were resident since ``forget_peak``."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Count the peak of this process anew."""
    Path("/proc/self/clear_refs").write_text("5")


SEEN = ("base", "peak", "step_s", "cpu_s", "save_s")


def train(config_values: dict[str, Any]) -> dict[str, float]:
    """Return what a rank's run took, the largest of all ranks: ``base`` and ``peak`` (bytes), the
    median ``step_s`` and ``cpu_s`` (of its processor in a step), and the last ``save_s``.
    """
    import torch

    from hfscale.dist.world import World
    from hfscale.run.run import Run

    torch.set_num_threads(1)
    forget_peak()
    base = peak_rss()
    config = RunConfig.model_validate(config_values)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Run(config, World.from_environment()).live(torch.device("cpu"))
    seconds, own = list[float](), list[float]()
    update = trainer.update

    def timed(*args: Any, **kwargs: Any) -> Any:
        begun, worked = time.perf_counter(), time.process_time()
        stats = update(*args, **kwargs)
        seconds.append(time.perf_counter() - begun)
        own.append(time.process_time() - worked)
        return stats

    trainer.update = timed  # type: ignore[method-assign]
    trainer.run()
    trainer.close()
    save_s = trainer.checkpoints.save_s
    values = [base, peak_rss(), median(seconds[1:]), median(own[1:]), save_s]
    most = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(SEEN, most.tolist(), strict=True))


def planned(values: dict[str, Any]) -> Plan:
    """Return the plan of a config on two ranks."""
    config = load_values(values, (), schema=RunConfig)
    return make_plan(config, Asked(gpu="cpu", gpus=RANKS, memory_gib=64, corrected=False))


def main() -> None:
    """Measure the grid, and record it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, default=len(KINDS) * len(CASES), help="configs")
    parser.add_argument("--seen", type=Path, help="keeps what was measured; goes on from there")
    asked = parser.parse_args()
    about = machine("torch", "deepspeed", "transformers")
    lines = list[Line]()
    with tempfile.TemporaryDirectory() as name, Forks(Path(name, "errors")) as forks:
        corpus = make_corpus(Path(name, "corpus"))
        kept = _kept(asked.seen)
        for kind, case, values in [*grid(Path(name, "runs"), corpus)][: asked.only]:
            key = values["run"]["name"]
            if key not in kept:
                kept[key] = forks.run(train, RANKS, values)
                if asked.seen:
                    asked.seen.write_text(json.dumps(kept))
            lines.append(Line(kind, case, planned(values), kept[key]))
            print(key, kept[key], flush=True)
    report(about, lines)


def _kept(file: Path | None) -> dict[str, dict[str, float]]:
    kept: dict[str, dict[str, float]] = {}
    return kept | json.loads(file.read_text()) if file and file.is_file() else kept


@dataclass(frozen=True)
class Line:
    """A config, its plan and what it took."""

    kind: str
    case: Case
    plan: Plan
    seen: dict[str, float]

    def off(self, name: str, *, by: float = 1.0) -> float:
        """Return by which part the plan, times ``by``, is off."""
        planned = self.plan.peak if name == "peak" else self.plan.step_s
        return by * planned / self.seen[name] - 1

    def cells(self, by: float) -> list[object]:
        """Return its row of the table; ``by`` is what one run has taught of the step."""
        case, seen, plan = self.case, self.seen, self.plan
        size = f"{case.rows} x {case.seq_len} x {case.times}"
        return [
            *(self.kind, case.stage, case.precision, size),
            "yes" if case.checkpointing else "no",
            *(f"{seen['peak'] / 2**20:,.0f}", f"{plan.peak / 2**20:,.0f}"),
            f"{self.off('peak'):+.1%}",
            *(f"{seen['cpu_s']:.2f}", f"{plan.step_s:.2f}", f"{self.off('cpu_s', by=by):+.0%}"),
            *(f"{seen['step_s']:.2f}", f"{seen['save_s']:.2f}", f"{plan.save_s:.2f}"),
        ]


def report(about: str, lines: list[Line]) -> None:
    """Record what was measured."""
    first = lines[0]
    by = first.seen["cpu_s"] / first.plan.step_s
    by_clock = first.seen["step_s"] / first.plan.step_s
    off = [line.off("peak") for line in lines]
    slow = [line.off("cpu_s", by=by) for line in lines[1:]]
    late = [line.off("step_s", by=by_clock) for line in lines[1:]]
    untaught = [line.off("cpu_s") for line in lines]
    within = _within(off, 0.10)
    by_each = sorted(_taught_by(line, lines) for line in lines)
    header = [
        *("model", "stage", "precision", "rows x tokens x times", "checkpointing", "peak, MiB"),
        *("planned", "off", "processor, s a step", "planned", "off after the first run"),
        *("by the clock, s", "save, s", "planned"),
    ]
    body = [
        about,
        "",
        table(header, [line.cells(by) for line in lines]),
        "",
        f"- peak within 10 %: {within:.0%} of {len(lines)}: {verdict(within, at_least=0.95)}",
        f"- a rank's processor time in a step within 20 % once the first run was checked: "
        f"{_within(slow, 0.20):.0%} of {len(slow)}: {verdict(_within(slow, 0.20), at_least=0.95)}; "
        f"before it, {_within(untaught, 0.20):.0%} of {len(lines)}",
        f"- the same, whichever run is the one that was checked: {by_each[0]:.0%} to "
        f"{by_each[-1]:.0%} of the others, usually {median(by_each):.0%}",
        f"- the same by the clock, with whatever else the machine had to do: "
        f"{_within(late, 0.20):.0%}",
    ]
    record("Plan", "\n".join(body))


def _taught_by(one: Line, lines: list[Line]) -> float:
    """Return the part of the others whose step is planned within 20 % once ``one`` was checked."""
    by = one.seen["cpu_s"] / one.plan.step_s
    return _within([line.off("cpu_s", by=by) for line in lines if line is not one], 0.20)


def _within(off: list[float], part: float) -> float:
    return sum(abs(one) <= part for one in off) / max(1, len(off))


if __name__ == "__main__":
    main()
