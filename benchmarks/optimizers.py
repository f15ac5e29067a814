"""How many fewer steps does Muon need to AdamW's held-out loss, and what does a step of it cost?

    python -m benchmarks.optimizers [--steps 200] [--png PNG]

A small Llama (4 layers of 128) is trained on three texts that are on this machine anyhow: Python
(the standard library), C++ (the headers of torch), English (the words of packages: docs, licences,
descriptions). AdamW at four learning rates for so many steps; the best of them is the target. Then
Muon at three rates for 1/1.25 of the steps, each with the whole of its own schedule (cosine to a
tenth): its best must be at or below the target. The cost of a step is taken in turns, on the first
text. About half an hour on a core.
"""

from __future__ import annotations

import argparse
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import interleaved, machine, ratio, record, spread, table, verdict
from tests.helpers.cli import hfscale
from tests.helpers.corpus import run_values
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

FEWER = 1.25
RATES = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3), "muon": (2e-3, 4e-3, 8e-3)}
MEGABYTES = 6  # of each text
BATCH, ROW = 16, 128
PLACES: dict[str, tuple[Path, tuple[str, ...]]] = {
    "Python": (Path(sysconfig.get_path("stdlib")), ("*.py",)),
    "C++": (Path(torch.__file__).parent / "include", ("*.h", "*.cuh", "*.hpp")),
    "English": (Path(sysconfig.get_path("purelib")), ("*.md", "*.rst", "*.txt", "METADATA")),
}
CORPUS = """
source: {format: text, path: text, pattern: "*"}
split: {validation: 0.05}
tokenizer: {path: tokenizer, kind: bpe, vocab_size: 2048}
shards: {path: shards, shard_mb: 2}
"""
MODEL = {
    "architecture": "llama",
    "config": {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": ROW,
        "tie_word_embeddings": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--png", type=Path, help="where the curves go")
    args = parser.parse_args()
    began, where = time.perf_counter(), machine("torch", "deepspeed", "transformers")
    rows, curves = [], dict[str, dict[str, list[tuple[int, float]]]]()
    with tempfile.TemporaryDirectory() as folder:
        for text in PLACES:
            trial = Trial(text, Path(folder) / text)
            adamw = best(trial, "adamw", args.steps)
            muon = best(trial, "muon", round(args.steps / FEWER))
            curves[text] = {"AdamW": adamw.curve, "Muon": muon.curve}
            gap = muon.loss - adamw.loss
            rows.append(
                [
                    text,
                    f"{adamw.loss:.4f} ({adamw.lr:g})",
                    f"{muon.loss:.4f} ({muon.lr:g})",
                    verdict(gap, at_most=0.0),
                ]
            )
            print(*rows[-1], sep="  ", flush=True)
        cost = costs(Trial("Python", Path(folder) / "Python"))
    if args.png:
        draw(curves, args.png)
    header = [
        "text",
        f"AdamW, {args.steps} steps: held-out loss (rate)",
        f"Muon, {round(args.steps / FEWER)} steps",
        "Muon's minus AdamW's",
    ]
    record(
        "optimizers",
        f"{where}\n\n{table(header, rows)}\n\n"
        f"Llama, 4 layers of 128, {BATCH} rows of {ROW}; the best of {len(RATES['adamw'])} rates "
        f"(AdamW) and {len(RATES['muon'])} (Muon), each with its own cosine.\n\n{cost}\n\n"
        f"{time.perf_counter() - began:.0f} s.",
    )


class Run:
    """What a run came to."""

    def __init__(self, lr: float, steps: list[dict[str, Any]]) -> None:
        self.lr = lr
        self.curve = [
            (step["step"], step["validation_loss"])
            for step in steps
            if step.get("validation_loss") is not None
        ]
        self.loss = self.curve[-1][1]
        self.step_s = median(step["step_s"] for step in steps[5:])


class Trial:
    """Runs on one text, which is prepared here unless it is there."""

    def __init__(self, text: str, folder: Path) -> None:
        self.folder = folder
        if folder.exists():
            return
        (folder / "text").mkdir(parents=True)
        for number, file in enumerate(_some(*PLACES[text])):
            shutil.copy(file, folder / "text" / f"{number}{file.suffix}")
        (folder / "corpus.yaml").write_text(CORPUS)
        hfscale("tokenizer", "train", "corpus.yaml", cwd=folder)
        hfscale("shards", "build", "corpus.yaml", cwd=folder)

    def run(self, optimizer: str, lr: float, steps: int, *, ranks: int = 1, stage: int = 1) -> Run:
        """Return a run of so many steps."""
        name = f"{optimizer}-{lr}-{steps}-{ranks}-{time.monotonic_ns()}"
        validation = {"shards": str(self.folder / "shards" / "validation")}
        values = run_values(
            self.folder,
            self.folder / "runs",
            name,
            model=MODEL,
            data={"seq_len": ROW, "validation": {**validation, "every_steps": max(1, steps // 10)}},
            optim={"name": optimizer, "lr": lr},
            schedule={"name": "cosine", "warmup_steps": 10},
            train={"steps": steps, "global_batch": BATCH, "micro_batch": BATCH // ranks},
            engine={"zero_stage": stage},
        )
        return Run(lr, run_ranks(train, ranks, values, timeout_s=3600)[0])


def _some(place: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """Yield files of middling size until there are enough."""
    files = {file for pattern in patterns for file in place.rglob(pattern)}
    taken, seen = 0, set[bytes]()
    for file in sorted(files, key=lambda file: (file.name, str(file))):
        content = file.read_bytes() if file.is_file() else b""
        if not 2_000 < len(content) < 200_000 or content[:2000] in seen:
            continue
        seen.add(content[:2000])
        yield file
        taken += len(content)
        if taken > MEGABYTES * 1e6:
            return


def best(trial: Trial, optimizer: str, steps: int) -> Run:
    """Return the run with the lowest loss among the rates of an optimizer."""
    runs = [trial.run(optimizer, lr, steps) for lr in RATES[optimizer]]
    for run in runs:
        print(f"  {optimizer} {run.lr:g}: {run.loss:.4f}", flush=True)
    return min(runs, key=lambda run: run.loss)


def costs(trial: Trial) -> str:
    """Return what a step costs, Muon's beside AdamW's."""
    lines = []
    for ranks, stage in ((1, 1), (2, 1), (2, 3)):
        one = partial(_step_s, trial, ranks=ranks, stage=stage)
        names = {name: partial(one, name) for name in ("adamw", "muon")}
        taken = interleaved(names, repeats=3, warm=1)
        times = ratio(taken["muon"], taken["adamw"])
        lines.append([f"ZeRO {stage}, {ranks} ranks", *map(spread, taken.values()), f"{times:.2f}"])
    return table(["seconds a step", "AdamW", "Muon", "ratio"], lines)


def _step_s(trial: Trial, optimizer: str, *, ranks: int, stage: int) -> float:
    return trial.run(optimizer, 2e-3, 25, ranks=ranks, stage=stage).step_s


def draw(curves: dict[str, dict[str, list[tuple[int, float]]]], file: Path) -> None:
    """Draw the held-out losses of the best runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3.2), layout="constrained")
    for axes, (text, runs) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for name, curve in runs.items():
            axes.plot(*zip(*curve, strict=True), label=name)
        axes.set(title=text, xlabel="step", ylabel="held-out loss")
        axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
