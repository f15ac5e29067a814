"""What it costs to go on at another size or ZeRO stage: seconds and memory of the load, beside
reading the files as they are.

Saved on 4 CPU ranks, loaded on 1, 2, 3, 4, 6 and 8 at every stage. About 5 minutes on 4 idle cores:
``python -m benchmarks.elastic_load``. The memory is what a load holds beside the model and
optimizer themselves: anonymous memory of the largest rank, looked at from outside every few
milliseconds. Pages of the checkpoint's files are mapped and can go at any time, so they are not
counted.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import machine, record, spread, table, verdict
from hfscale.reports.prove import digests
from tests.helpers.forks import Forks, say

WRITERS, READERS, TURNS = 4, (1, 2, 3, 4, 6, 8), 3
ENGINES = [
    (0, "fp32", "none"),
    (1, "fp32", "none"),
    (2, "bf16", "none"),
    (3, "bf16", "none"),
    (3, "fp32", "none"),
    (1, "bf16", "optimizer"),
]
WIDTH, LAYERS, VOCABULARY = 512, 6, 8192  # 23 M parameters; 12 bytes each in a checkpoint


def opened(folder: str, stage: int, precision: str, offload: str) -> tuple[Any, Any]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from hfscale.checkpoint.manager import CheckpointManager
    from hfscale.config.schema import Checkpoint
    from hfscale.engine.engine import Engine
    from hfscale.engine.start import construction
    from tests.engine.tiny import tiny_config

    config = tiny_config(stage, precision, world_size=1, offload=offload)
    torch.manual_seed(1)
    with construction(config, device_type="cpu"):
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=8, use_cache=False
            )
        )
    engine = Engine.create(model, config=config, device=torch.device("cpu"))
    engine.fragments(owned=False)  # so that moments exist before and after
    return engine, CheckpointManager(Path(folder), config=Checkpoint(), place=engine.all)


def save(folder: str, stage: int, precision: str, offload: str) -> None:
    """Save moments that are not zero, so that a wrong one would be seen."""
    import torch

    engine, _ = opened(folder, stage, precision, offload)
    for number, fragment in enumerate(engine.fragments(owned=False)):
        for kind, tensor in fragment.tensors.items():
            if kind != "weight":
                tensor.copy_(torch.arange(tensor.numel()) % 1009 + number)
    _save(engine, folder, stage)
    engine.close()


def load(folder: str, stage: int, precision: str, offload: str, again: str | None) -> None:
    """Load as a run does, between two things said; then save what the ranks now hold in the folder
    ``again``.
    """
    import torch.distributed as torch_dist

    engine, checkpoints = opened(folder, stage, precision, offload)
    torch_dist.barrier()
    say("loading")
    time.sleep(0.1)  # until somebody looks
    torch_dist.barrier()
    began = time.perf_counter()
    checkpoints.load_latest(engine)
    torch_dist.barrier()
    say("loaded", time.perf_counter() - began)
    if again:
        _save(engine, again, stage)
    engine.close()


def _save(engine: Any, folder: str, stage: int) -> None:
    from hfscale.checkpoint.manager import CheckpointManager
    from hfscale.checkpoint.state import CheckpointState
    from hfscale.config.schema import Checkpoint

    checkpoints = CheckpointManager(Path(folder), config=Checkpoint(), place=engine.all)
    checkpoints.save(engine, CheckpointState(step=1, world_size=engine.all.size, zero_stage=stage))
    checkpoints.wait()


def anonymous_kib(pid: int) -> int:
    """Return the anonymous memory of a process, in KiB; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def measured(forks: Forks, world_size: int, *case: Any) -> tuple[float, float]:
    """Return seconds, and MiB beside the state, of one load."""
    pids = forks.start(load, world_size, *case)
    forks.line("loading")
    before = [anonymous_kib(pid) for pid in pids]
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            for pid, kib in zip(pids, before, strict=True):
                most[0] = max(most[0], anonymous_kib(pid) - kib)
            time.sleep(0.002)

    looking = threading.Thread(target=look)
    looking.start()
    [seconds] = forks.line("loaded")
    done.set()
    looking.join()
    assert forks.gone() == [0] * world_size
    return seconds, most[0] / 1024


def read_s(folder: Path) -> float:
    """Return the seconds to read and hash all files of a checkpoint in one process: what no load
    can do without.
    """
    from hfscale.checkpoint.manifest import verify

    began = time.perf_counter()
    assert not verify(folder)
    return time.perf_counter() - began


@dataclass
class Findings:
    """What all loads came to: rows of the table, and what is said below it."""

    rows: list[list[object]] = field(default_factory=list)
    wrong: int = 0  # loads after which weights or moments have other digests
    worst_mib: float = 0.0  # beside the state, of a rank
    size: int = 0  # bytes of a checkpoint


def target_of(number: int, world_size: int) -> tuple[int, str, str]:
    """Return the engine that loads what the engine ``number`` saved.

    In turns over the engines, each size at another stage than it was saved, and back.
    """
    onward = 2 if world_size % 2 else world_size
    return ENGINES[(number + onward) % len(ENGINES)]


def named(*words: str, offload: str) -> str:
    """Return an engine in words."""
    return ", ".join([*words, "offload"] if offload != "none" else words)


def sweep(forks: Forks, home: Path, number: int, findings: Findings) -> None:
    """Save with the engine ``number``, load that at all sizes, and put down what was found."""
    stage, precision, offload = ENGINES[number]
    folder, again = home / str(number), home / "again"
    forks.run(save, WRITERS, str(folder), stage, precision, offload)
    checkpoint = folder / "step-00000001"
    expected = digests(checkpoint)
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    findings.size = sum(file.stat().st_size for file in files)
    base = [read_s(checkpoint) for _ in range(TURNS)]
    saved_at = named(f"ZeRO {stage}", precision, offload=offload)
    for world_size in READERS:
        stage_to, _, offload_to = target_of(number, world_size)
        case = (str(folder), stage_to, precision, offload_to)
        taken = []
        for turn in range(TURNS):
            kept = None if turn else str(again)
            taken.append(measured(forks, world_size, *case, kept))
        findings.wrong += digests(again / checkpoint.name) != expected
        shutil.rmtree(again)
        extra_mib = max(mib for _, mib in taken)
        findings.worst_mib = max(findings.worst_mib, extra_mib)
        load_s = spread([seconds for seconds, _ in taken])
        loaded_at = named(f"ZeRO {stage_to}", offload=offload_to)
        row = [saved_at, world_size, loaded_at, load_s, spread(base), f"{extra_mib:.0f}"]
        findings.rows.append(row)
        print(*row, sep="  ", flush=True)


def report(findings: Findings) -> str:
    """Return the section of RESULTS.md."""
    size, worst_mib, wrong = findings.size, findings.worst_mib, findings.wrong
    header = ["saved at", "ranks", "loaded at", "load, s (quartiles)", "read and hash, s"]
    return (
        f"{machine('torch', 'deepspeed')} GPT-2 of width {WIDTH} and {LAYERS} layers, "
        f"{size / 2**20:.0f} MiB a checkpoint, saved on "
        f"{WRITERS} ranks; {TURNS} loads each, verification included. Beside it, "
        "reading and hashing the files in one process.\n\n"
        f"{table([*header, 'MiB beside the state'], findings.rows)}\n\n"
        "Loads after which weights or moments, saved again, have other digests: "
        f"{wrong}, {verdict(wrong, at_most=0)}. Most memory of a "
        f"rank beside the state: {worst_mib:.0f} MiB, {worst_mib * 2**20 / size:.2f} of a "
        "checkpoint."
    )


def main() -> None:
    """Measure and record."""
    findings = Findings()
    with tempfile.TemporaryDirectory() as home, Forks(Path(home) / "errors") as forks:
        for number in range(len(ENGINES)):
            sweep(forks, Path(home), number, findings)
    record("elastic_load", report(findings))


if __name__ == "__main__":
    main()
