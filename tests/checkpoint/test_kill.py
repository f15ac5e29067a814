"""kill -9 from outside, at random moments of saves: the next start loads the newest committed checkpoint, bit for bit."""
from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from hfscale.checkpoint import layout
from hfscale.checkpoint.manifest import verify

ROOT = Path(__file__).resolve().parents[2]
KILLS = 30


class Ranks:
    """Two ranks at a time, and what they say."""

    def __init__(self, errors: Path) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, "-m", "tests.checkpoint.kill_target"], cwd=ROOT, text=True, env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors.open("w"))

    def start(self, folder: Path, *, steps: int) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder} {steps} {port}\n")
        self.process.stdin.flush()
        return [int(pid) for pid in self.line("ranks")]

    def line(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.split()[1:]
            assert not line.startswith("gone"), f"the ranks ended before they said {word!r}"
        raise AssertionError("the ranks' parent is gone")


def phase(folder: Path) -> str:
    """Return what a kill interrupted."""
    partial = next(folder.glob("step-*.partial"), None)
    if partial is None:
        return "pruning" if any(folder.glob("*.old")) else "between saves"
    if (partial / "manifest.json").exists():
        return "manifest there, not renamed"
    return f"writing, {len(list(partial.glob('records/*.json')))} of 2 ranks done"


@pytest.mark.slow
def test_killed_at_random_moments_every_start_loads_the_newest_and_nothing_else(tmp_path):
    rng, phases, ranks = random.Random(3), Counter(), Ranks(tmp_path / "errors")
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    for _ in range(KILLS):
        pids = ranks.start(killed, steps=10_000)
        newest = layout.committed(killed)
        assert ranks.line("loaded") == ([str(layout.step_of(newest[-1])), "True"] if newest else ["0", "None"])
        time.sleep(rng.uniform(0.05, 0.25))
        rng.shuffle(pids)
        os.kill(pids[0], signal.SIGKILL)
        time.sleep(rng.choice([0.0, 0.02]))  # the other one dies at once, or writes on for a moment
        os.kill(pids[1], signal.SIGKILL)
        ranks.line("gone")
        phases[phase(killed)] += 1
        assert all(not verify(checkpoint) for checkpoint in layout.committed(killed))
    print("interrupted:", *(f"{count:3} {name}" for name, count in sorted(phases.items())), sep="\n  ")
    assert not (killed / "rejected").exists()

    last = layout.step_of(layout.committed(killed)[-1])
    endings = []
    for folder in (killed, straight):  # the run that was killed so often, and one that never was
        ranks.start(folder, steps=last + 2)
        endings.append(ranks.line("done"))
        assert ranks.line("gone") == ["0", "0"]
    assert endings[0] == endings[1]
    ranks.process.communicate(timeout=20)
