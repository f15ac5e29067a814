"""Attacks on saves and checkpoints, for test_kill and ``benchmarks/chaos_checkpoints.py``: what the
ranks do, and the attacker outside.

The ranks say what they save before they save it, so the attacker knows every state that may ever be
loaded.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from hfscale.checkpoint import layout
from hfscale.dist.world import Place
from hfscale.errors import CheckpointError
from tests.helpers.forks import Forks, say

RANKS, KEEP_LAST = 2, 2
# in the order of a save
PHASES = (
    "prepare",
    "snapshot",
    "writing",
    "record",
    "manifest",
    "rename",
    "prune",
    "committed",
)


# -------------------------------------------------------------------------------- what the ranks do
def opened(folder: str, stage: int, precision: str, async_: bool) -> tuple[Any, Any, Any]:
    from hfscale.checkpoint.manager import CheckpointManager
    from hfscale.config.schema import Checkpoint
    from tests.engine.tiny import tiny_config, tiny_engine

    config = tiny_config(stage, precision, world_size=RANKS)
    engine = tiny_engine(config)
    return config, engine, manager(CheckpointManager, Checkpoint, folder, engine, async_)


def manager(kind: Any, options: Any, folder: str, engine: Any, async_: bool) -> Any:
    config = options.model_validate(
        {"keep_last": KEEP_LAST, "every_minutes": None, "async": async_}
    )
    return kind(Path(folder), config=config, place=Place(engine.all.rank, RANKS))


def fingerprint(engine: Any) -> str:
    """Return the digest of every bit of the model and the optimizer."""
    from tests.engine.tiny import full_state

    digest = hashlib.sha256(str(engine.scalars()).encode())
    for name, tensors in sorted(full_state(engine).items()):
        for kind, tensor in sorted(tensors.items()):
            digest.update(f"{name} {kind}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def train(folder: str, stage: int, precision: str, async_: bool, steps: int) -> None:
    """Go on from the newest checkpoint and save after every step, until killed, or ``steps``
    further.
    """
    from hfscale.checkpoint.state import CheckpointState
    from tests.engine.tiny import train_step

    config, engine, checkpoints = opened(folder, stage, precision, async_)
    loaded = checkpoints.load_latest(engine)
    start = loaded.step if loaded else 0
    say("loaded", start, fingerprint(engine))
    try:
        for step in range(start + 1, start + steps + 1):
            train_step(engine, config, step)
            found = fingerprint(engine)
            say("saving", step, found)
            checkpoints.save(engine, CheckpointState(step=step))
            if steps < 100:  # to measure
                checkpoints.wait()
                say("took", checkpoints.stall_s + (checkpoints.write_s if async_ else 0.0))
        checkpoints.wait()
    except CheckpointError as error:
        say("failed", str(error))
        return
    say("done", step, found)
    engine.close()


def load_each(folders: list[str], stage: int, precision: str) -> None:
    """Load the newest good checkpoint of each folder into one engine, which is spoilt before
    each.
    """
    from hfscale.checkpoint.manager import CheckpointManager
    from hfscale.config.schema import Checkpoint

    _, engine, _ = opened(folders[0], stage, precision, False)
    for number, folder in enumerate(folders):
        for fragment in engine.fragments(owned=False):
            for tensor in fragment.tensors.values():
                tensor.fill_(number + 0.5)
        engine.after_load()
        try:
            loaded = manager(CheckpointManager, Checkpoint, folder, engine, False).load_latest(
                engine
            )
            say("case", loaded.step if loaded else 0, fingerprint(engine))
        except Exception as error:  # a CheckpointError, or a defect
            say("case", None, str(error))
    engine.close()


# ---------------------------------------------------------------------- the attacker on the outside
def phase(folder: Path, step: int) -> str:
    """Return how far the save of ``step`` had come when it was interrupted, from what lies on the
    disk.
    """
    partial = folder / f"{layout.step_name(step)}{layout.PARTIAL}"
    if (folder / layout.step_name(step)).exists():
        return (
            "prune"
            if any(folder.glob(f"*{layout.OLD}")) or len(layout.committed(folder)) > KEEP_LAST
            else "committed"
        )
    if not partial.exists():
        return "prepare"
    if (partial / layout.MANIFEST).exists():
        return "rename"
    written, records = _names(partial / layout.ENGINE), _names(partial / layout.RECORDS)
    if records is None or sum(name.endswith(".json") for name in records) == RANKS:
        return "manifest"
    return (
        "record"
        if any(name.endswith(".json") for name in records)
        else "writing"
        if written
        else "snapshot"
    )


def _names(folder: Path) -> list[str] | None:
    """Return what is in a folder that may be gone at any moment."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return None


def kill(pids: list[int], rng: random.Random) -> str:
    """Return what was killed: every rank, or one, and the others when they have had a moment to
    live on.
    """
    victims, alone = rng.sample(pids, len(pids)), rng.random() < 0.5
    os.kill(victims[0], signal.SIGKILL)
    if alone:
        time.sleep(rng.uniform(0, 0.1))
    for pid in victims[1:]:
        with suppress(ProcessLookupError):  # it had seen the other's end
            os.kill(pid, signal.SIGKILL)
    return "one rank" if alone else "every rank"


@dataclass
class Chain:
    """One run that is attacked again and again, and all that it said it would save."""

    forks: Forks
    folder: Path
    stage: int
    precision: str
    async_: bool
    # step -> fingerprints; more than one would be an inexact resume
    saved: dict[int, set[str]] = field(default_factory=dict)
    save_s: float = 0.0

    def run(self, *, steps: int = 10**6) -> list[int]:
        return self.forks.start(
            train, RANKS, str(self.folder), self.stage, self.precision, self.async_, steps
        )

    def measure(self) -> None:
        """Learn how long a save takes, from its call to its last deletion."""
        self.run(steps=8)
        self.gone()
        self.save_s = median(
            took for word, *took_s in self.forks.said if word == "took" for took in took_s
        )

    def start(self) -> tuple[list[int], dict[str, Any]]:
        """Return the ranks that go on, and whether they loaded the newest committed checkpoint, bit
        for bit.
        """
        before = layout.committed(self.folder)
        pids = self.run()
        step, found = self.forks.line("loaded")
        expected = layout.step_of(before[-1]) if before else 0
        return pids, {
            "silent": bool(step) and {found} != self.saved.get(step),
            "recovered": step == expected,
            "rejected": (self.folder / layout.REJECTED).exists(),
        }

    def saving(self, number: int = 1) -> int:
        """Return the step whose save begins now, the ``number``-th from here."""
        for _ in range(number):
            step = int(self.forks.line("saving")[0])
        return step

    def gone(self) -> str:
        """Wait until no rank is left and note what they were saving; return what they said had
        failed.
        """
        self.forks.gone()
        failed = ""
        for word, *rest in self.forks.said:
            if word == "saving":
                self.saved.setdefault(rest[0], set()).add(rest[1])
            failed = rest[0] if word == "failed" else failed
        return failed

    def attacked(
        self, rng: random.Random, attack: Callable[[list[int]], str], *, at: str | None = None
    ) -> dict[str, Any]:
        """Return what one attack did: at a moment uniform over the save's duration, or as soon as
        the phase ``at`` is seen.
        """
        pids, verdict = self.start()
        step, moment = self.saving(rng.randint(1, 3)), rng.uniform(0, self.save_s)
        if at is None:
            time.sleep(moment)
        else:
            deadline = time.monotonic() + 1.0
            while phase(self.folder, step) != at and time.monotonic() < deadline:
                pass
        hit = phase(self.folder, step)
        what = attack(pids)
        return {"before": verdict, "attack": what, "phase": hit, "step": step}


# ------------------------------------------------------------------------------------------- damage
def _flip(path: Path, rng: random.Random, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _zeros(path: Path, rng: random.Random, _: Path) -> None:
    """A block that never reached the disk."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    path.write_bytes(data)


DAMAGE: dict[
    str, Callable[[Path, random.Random, Path], object]
] = {  # (file, random, the same file of another checkpoint)
    "a flipped bit": _flip,
    "zeros in it": _zeros,
    "cut short": lambda path, rng, _: os.truncate(path, rng.randrange(path.stat().st_size)),
    "empty": lambda path, _, __: os.truncate(path, 0),
    "deleted": lambda path, _, __: path.unlink(),
    "more at its end": lambda path, rng, _: path.write_bytes(
        path.read_bytes() + rng.randbytes(rng.randint(1, 999))
    ),
    "that of another checkpoint": lambda path, _, other: shutil.copy(other, path),
}
FOLDERS: dict[
    str, Callable[[Path, random.Random, Path], object]
] = {  # (checkpoint, random, another checkpoint)
    "half copied": lambda at, rng, _: [
        path.unlink() for path in files(at)[rng.randint(1, len(files(at)) - 1) :]
    ],
    "a rank's file of another checkpoint added": lambda at, _, other: shutil.copy(
        other / layout.rank_file(0), at / layout.rank_file(9)
    ),
    "another checkpoint copied over it in part": lambda at, rng, other: [
        shutil.copy(path, at / path.relative_to(other))
        for path in rng.sample(files(other), rng.randint(1, len(files(other)) - 1))
    ],
    "under another name": lambda at, rng, _: at.rename(
        at.with_name(layout.step_name(layout.step_of(at) + rng.randint(1, 99)))
    ),
}


def files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def contents(checkpoint: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in files(checkpoint)}


def damaged(folder: Path, rng: random.Random, *, spare: int = 1) -> tuple[int, list[str]]:
    """Damage the newest checkpoints of ``folder``, all but the oldest ``spare`` at most; return the
    newest good step and what was done.
    """
    found = layout.committed(folder)
    bad, done = found[-rng.randint(1, len(found) - spare) :], []
    for checkpoint in bad:
        before = contents(checkpoint)
        other = found[0] if checkpoint is not found[0] else found[1]
        if rng.random() < 0.2:
            kind = rng.choice(list(FOLDERS))
            FOLDERS[kind](checkpoint, rng, other)
            done.append(f"folder: {kind}")
        else:
            kind, path = rng.choice(list(DAMAGE)), rng.choice(files(checkpoint))
            DAMAGE[kind](path, rng, other / path.relative_to(checkpoint))
            done.append(f"{path.name}: {kind}")
        if contents(checkpoint) == before:  # another checkpoint's file may be the same
            done[-1] = f"{(path := files(checkpoint)[0]).name}: deleted"
            path.unlink()
    good = found[: len(found) - len(bad)]
    return layout.step_of(good[-1]) if good else 0, done


def histogram(phases: Iterable[str]) -> str:
    counts = Counter(phases)
    return "\n".join(f"  {counts[name]:4} {name}" for name in PHASES)
