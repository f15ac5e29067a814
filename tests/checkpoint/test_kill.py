"""kill -9 from outside, at moments uniform over a save: the next start loads the newest committed
checkpoint, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

from hfscale.checkpoint import layout
from hfscale.checkpoint.manifest import verify
from tests.checkpoint.chaos import PHASES, Chain, damaged, files, histogram, kill, load_each
from tests.helpers.forks import Forks

KILLS = 30  # at uniform moments; the phases that these miss are then aimed at
AIMED = 10  # tries for each of them


@pytest.mark.slow
def test_killed_at_any_moment_every_start_loads_the_newest_and_nothing_else(tmp_path: Path):
    rng, hit = random.Random(3), []
    with Forks(tmp_path / "errors") as forks:
        killed = Chain(forks, tmp_path / "killed", 1, "bf16", True)
        killed.measure()

        def once(at: str | None = None) -> None:
            case = killed.attacked(rng, lambda pids: kill(pids, rng), at=at)
            assert case["before"] == {"silent": False, "recovered": True, "rejected": False}, case
            killed.gone()
            hit.append(case["phase"])
            assert all(not verify(checkpoint) for checkpoint in layout.committed(killed.folder))

        for _ in range(KILLS):
            once()
        print(f"a save takes {killed.save_s * 1e3:.0f} ms; interrupted:\n{histogram(hit)}")
        for name in PHASES:
            for _ in range(AIMED):
                if name not in hit:
                    once(at=name)
        assert set(hit) == set(PHASES), histogram(hit)
        pids, verdict = killed.start()
        assert not verdict["silent"] and verdict["recovered"]
        kill(pids, rng)
        killed.gone()
        assert all(len(found) == 1 for found in killed.saved.values()), (
            "a step made twice was not made alike"
        )

        straight = Chain(forks, tmp_path / "straight", 1, "bf16", True)  # a run that nobody killed
        straight.run(steps=max(killed.saved))
        straight.gone()
        assert all(straight.saved[step] == found for step, found in killed.saved.items())


@pytest.mark.slow
def test_random_damage_is_never_loaded_and_a_newer_format_is_left_alone(tmp_path: Path):
    rng = random.Random(7)
    with Forks(tmp_path / "errors") as forks:
        chain = Chain(forks, tmp_path / "run", 3, "fp32", False)
        chain.run(steps=2)
        chain.gone()
        expected, folders = [], []
        for number in range(40):
            folders.append(tmp_path / str(number))
            shutil.copytree(chain.folder, folders[-1])
            expected.append(damaged(folders[-1], rng, spare=int(number > 4)))
        newer = tmp_path / "newer" / "step-00000002"
        shutil.copytree(chain.folder, newer.parent)
        body = json.loads((newer / layout.MANIFEST).read_text()) | {"version": 99}
        del body["sha256"]
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        (newer / layout.MANIFEST).write_text(json.dumps({**body, "sha256": digest}))
        forks.start(load_each, 2, [str(folder) for folder in (*folders, newer.parent)], 3, "fp32")
        forks.gone()
        *cases, (step, found) = [said[1:] for said in forks.said if said[0] == "case"]
        assert (
            step is None and "a newer version of hfscale wrote this" in found and newer.is_dir()
        ), "it may well be good"
        for (good, done), (step, found), folder in zip(expected, cases, folders, strict=True):
            if good:
                assert step == good and chain.saved[step] == {found}, done
                assert len(files(folder / layout.REJECTED)) > 0, done
            else:
                assert step is None and "no checkpoint of this run is intact" in found, (
                    done,
                    found,
                )
