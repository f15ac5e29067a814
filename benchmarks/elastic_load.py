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
    from hfscale.engine.engine import Engine, construction
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
            most[0] = max(
                [
                    most[0],
                    *(anonymous_kib(pid) - kib for pid, kib in zip(pids, before, strict=True)),
                ]
            )
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


def main() -> None:
    """Measure and record."""
    rows, wrong, worst, size = [], 0, 0.0, 0
    with tempfile.TemporaryDirectory() as home, Forks(Path(home) / "errors") as forks:
        for number, (stage, precision, offload) in enumerate(ENGINES):
            folder = Path(home) / str(number)
            forks.run(save, WRITERS, str(folder), stage, precision, offload)
            checkpoint = folder / "step-00000001"
            expected, size = (
                digests(checkpoint),
                sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()),
            )
            target, base = (
                ENGINES[(number + 2) % len(ENGINES)],
                [read_s(checkpoint) for _ in range(TURNS)],
            )
            for world_size in READERS:
                # in turns over the engines that load, each size at another stage than it was saved,
                # and back
                stage_to, _, offload_to = (
                    target if world_size % 2 else ENGINES[(number + world_size) % len(ENGINES)]
                )
                again = Path(home) / "again"
                taken = [
                    measured(
                        forks,
                        world_size,
                        str(folder),
                        stage_to,
                        precision,
                        offload_to,
                        None if turn else str(again),
                    )
                    for turn in range(TURNS)
                ]
                wrong += digests(again / checkpoint.name) != expected
                shutil.rmtree(again)
                extra = max(mib for _, mib in taken)
                worst = max(worst, extra)
                rows.append(
                    [
                        f"ZeRO {stage}, {precision}{', offload' if offload != 'none' else ''}",
                        world_size,
                        f"ZeRO {stage_to}{', offload' if offload_to != 'none' else ''}",
                        spread([s for s, _ in taken]),
                        spread(base),
                        f"{extra:.0f}",
                    ]
                )
                print(*rows[-1], sep="  ", flush=True)
    record(
        "elastic_load",
        "\n\n".join(
            [
                f"{machine('torch', 'deepspeed')} GPT-2 of width {WIDTH} and {LAYERS} layers, "
                f"{size / 2**20:.0f} MiB a checkpoint, saved on "
                f"{WRITERS} ranks; {TURNS} loads each, verification included. Beside it, "
                "reading and hashing the files in one process.",
                table(
                    [
                        "saved at",
                        "ranks",
                        "loaded at",
                        "load, s (quartiles)",
                        "read and hash, s",
                        "MiB beside the state",
                    ],
                    rows,
                ),
                "Loads after which weights or moments, saved again, have other digests: "
                f"{wrong}, {verdict(wrong, at_most=0)}. Most memory of a "
                f"rank beside the state: {worst:.0f} MiB, {worst * 2**20 / size:.2f} of a "
                "checkpoint.",
            ]
        ),
    )


if __name__ == "__main__":
    main()
