"""What `hfscale plan` says of memory and speed, against real ranks: 40 configs on two CPU ranks.

    python -m benchmarks.plan [--only 8]

Architectures x stages, precisions, lengths, micro-batches and checkpointing. Each config trains a
few steps of the real trainer in two ranks of its own (forked, so that nothing is imported twice);
the peak is that of resident memory of the rank with more, the step the median. Planned memory is
compared as it is, and beside what the process itself takes; times after one run of the same
architecture and precision has shown what its operators take here. A quarter of an hour on two
cores.
"""

from __future__ import annotations

import argparse
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
from hfscale.planning.memory import PROCESS_BYTES
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
    return make_plan(config, Asked(gpu="cpu", gpus=RANKS, memory_gib=64))


def main() -> None:
    """Measure the grid, and record it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, default=len(KINDS) * len(CASES), help="configs")
    asked = parser.parse_args()
    about = machine("torch", "deepspeed", "transformers")
    begun = time.monotonic()
    lines = list[list[object]]()
    with tempfile.TemporaryDirectory() as name, Forks(Path(name, "errors")) as forks:
        corpus = make_corpus(Path(name, "corpus"))
        configs = [*grid(Path(name, "runs"), corpus)][: asked.only]
        for kind, case, values in configs:
            plan = planned(values)
            seen = forks.run(train, RANKS, values)
            lines.append([kind, case, plan, seen])
            print(kind, case, plan.peak / 2**20, seen, flush=True)
    report(about, lines, minutes=(time.monotonic() - begun) / 60)


def report(about: str, lines: list[list[Any]], *, minutes: float) -> None:
    """Record what was measured."""
    first: dict[tuple[str, str], float] = {}
    rows, memory_errors, own_errors, time_errors = [], [], [], []
    for kind, case, plan, seen in lines:
        off = plan.peak / seen["peak"] - 1
        own = (plan.peak - PROCESS_BYTES) / (seen["peak"] - seen["base"]) - 1
        memory_errors.append(abs(off))
        own_errors.append(abs(own))
        ratio = seen["step_s"] / plan.step_s
        key = (kind, case.precision)
        learnt = key in first
        slow = ratio / first.setdefault(key, ratio) - 1
        if learnt:
            time_errors.append(abs(slow))
        rows.append(
            [
                *(kind, case.stage, case.precision, f"{case.rows} x {case.seq_len} x {case.times}"),
                "yes" if case.checkpointing else "no",
                *(f"{seen['peak'] / 2**20:,.0f}", f"{plan.peak / 2**20:,.0f}", f"{off:+.1%}"),
                *(f"{own:+.0%}", f"{seen['step_s']:.2f}", f"{slow:+.0%}" if learnt else "learnt"),
            ]
        )
    within = sum(error <= 0.10 for error in memory_errors) / len(memory_errors)
    beside = sum(error <= 0.10 for error in own_errors) / len(own_errors)
    in_time = sum(error <= 0.20 for error in time_errors) / max(1, len(time_errors))
    header = [
        *("model", "stage", "precision", "rows x tokens x times", "checkpointing", "peak, MiB"),
        *("planned", "off", "off beside the process", "step, s", "off after one run"),
    ]
    body = [
        f"{about} {minutes:.0f} minutes.",
        "",
        table(header, rows),
        "",
        f"- peak within 10 %: {within:.0%} of {len(rows)}: {verdict(within, at_least=0.95)}",
        f"- the same beside the {PROCESS_BYTES / 2**20:.0f} MiB of a process: {beside:.0%}, median "
        f"error {median(own_errors):.0%}",
        f"- step within 20 % after one run of the architecture and precision: {in_time:.0%} of "
        f"{len(time_errors)}: {verdict(in_time, at_least=0.95)}",
    ]
    record("Plan", "\n".join(body))


if __name__ == "__main__":
    main()
