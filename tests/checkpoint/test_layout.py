"""Names, pruning and pins, also by several processes at once."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.config.schema import Checkpoint
from hfscale.errors import CheckpointError
from tests.helpers.cli import ROOT


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name / "engine").mkdir(parents=True)
        (folder / name / layout.MANIFEST).write_text(name)


def test_only_committed_names_are_listed_and_in_the_order_of_steps(tmp_path):
    make(tmp_path, "step-00000010", "step-00000009", "step-123456789")
    make(tmp_path, "step-00000011.partial", "step-00000008.old", "rejected/step-00000012")
    (tmp_path / "step-00000020").mkdir()
    assert [path.name for path in layout.committed(tmp_path)] == [
        "step-00000009",
        "step-00000010",
        "step-123456789",
    ]
    assert (
        layout.step_name(123456789) == "step-123456789"
        and layout.step_of(layout.committed(tmp_path)[0]) == 9
    )
    assert (tmp_path / "step-00000020") in layout.candidates(tmp_path)
    assert layout.committed(tmp_path / "nowhere") == []


def test_leftovers_are_cleared_and_nothing_else(tmp_path):
    make(
        tmp_path,
        "step-00000001",
        "step-00000002.partial",
        "step-00000000.old",
        "mine.old",
        "rejected/step-00000003",
    )
    layout.clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine.old",
        "rejected",
        "step-00000001",
    ]


def test_pruning_keeps_the_newest_the_permanent_the_best_and_the_pinned(tmp_path):
    make(tmp_path, *(layout.step_name(step) for step in (2, 3, 4, 5, 6, 7)))
    best = {"metric": "validation_loss", "step": 3, "value": 2.5}
    (tmp_path / "step-00000007" / layout.STATE).write_text(
        json.dumps({"step": 7, "tokens_seen": 7, "best": best})
    )
    layout.pin(tmp_path, 5, pinned=True)
    policy = Checkpoint(keep_last=1, keep_every_steps=4)
    reasons = {layout.step_of(path): why for path, why in layout.kept(tmp_path, policy).items()}
    assert reasons == {
        2: [],
        3: ["best validation_loss 2.5"],
        4: ["permanent"],
        5: ["pinned"],
        6: [],
        7: ["last"],
    }
    assert [
        layout.step_of(path)
        for path in layout.prune(tmp_path, policy, spare=tmp_path / "step-00000006")
    ] == [2]
    assert [layout.step_of(path) for path in layout.prune(tmp_path, policy)] == [6]
    layout.pin(tmp_path, 5, pinned=False)
    assert (
        [layout.step_of(path) for path in layout.prune(tmp_path, Checkpoint(keep_last=3))]
        == []
        == list(tmp_path.glob("*.old"))
    )
    assert [layout.step_of(path) for path in layout.prune(tmp_path, Checkpoint(keep_last=1))] == [
        4,
        5,
    ]
    with pytest.raises(CheckpointError, match=r"no checkpoint of this step(.|\n)*there are: 3, 7"):
        layout.pin(tmp_path, 5, pinned=True)


def test_what_was_pinned_while_it_was_being_removed_comes_back(tmp_path):
    make(tmp_path, "step-00000001", "step-00000002.old")
    (
        tmp_path / "step-00000002.old" / layout.PINNED
    ).touch()  # a kill between the new name and the look at the marker
    layout.clear_leftovers(tmp_path)
    assert [path.name for path in layout.committed(tmp_path)] == ["step-00000001", "step-00000002"]


PRUNE = """
import sys
from pathlib import Path
from hfscale.checkpoint import layout
from hfscale.config.schema import Checkpoint
print("ready", flush=True)
while not (Path(sys.argv[1]) / "enough").exists():
    layout.prune(Path(sys.argv[1]), Checkpoint(keep_last=1))
"""


def test_what_a_pin_said_holds_while_other_processes_prune(tmp_path):
    make(tmp_path, "step-99999999")
    pruners = [
        subprocess.Popen(
            [sys.executable, "-c", PRUNE, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
        )
        for _ in range(2)
    ]
    for pruner in pruners:
        assert pruner.stdout is not None and pruner.stdout.readline()
    rng, pinned, lost, pause, began = random.Random(1), set(), 0, 0.001, time.monotonic()
    for first in itertools.count(step=8):
        if time.monotonic() - began > (1.5 if min(len(pinned), lost) > 20 else 20):
            break
        for step in range(first, first + 8):
            make(tmp_path / "made", layout.step_name(step))
            (tmp_path / "made" / layout.step_name(step)).rename(tmp_path / layout.step_name(step))
        time.sleep(rng.uniform(0.0, 2 * pause))
        for step in range(first, first + 8):
            try:
                layout.pin(tmp_path, step, pinned=True)
                pinned.add(step)
            except CheckpointError:
                lost += 1
        # so that both win at times, on any machine
        pause = min(0.1, pause * 1.2) if lost < len(pinned) else pause / 1.2
    (tmp_path / "enough").touch()
    assert [pruner.wait(20) for pruner in pruners] == [0, 0]
    layout.clear_leftovers(tmp_path)
    assert len(pinned) > 20 and lost > 20, "both must have won at times"
    assert pinned <= {layout.step_of(path) for path in layout.committed(tmp_path)}


def test_rejecting_never_overwrites(tmp_path):
    for number in ("", "-2", "-3"):
        make(tmp_path, "step-00000005")
        (tmp_path / "step-00000005" / "mark").write_text(number)
        assert layout.reject(tmp_path / "step-00000005").name == f"step-00000005{number}"
    assert [
        (tmp_path / "rejected" / f"step-00000005{n}" / "mark").read_text() for n in ("", "-2", "-3")
    ] == ["", "-2", "-3"]


def test_a_checkpoint_behind_a_link_is_read_kept_and_never_pruned(tmp_path):
    """One that was moved to another disk: its run is where the link lies, and pruning says nothing
    that it does not do.
    """
    folder, disk = tmp_path / "run" / run_files.CHECKPOINTS, tmp_path / "disk"
    make(folder, *(layout.step_name(step) for step in (1, 2, 3)))
    disk.mkdir()
    (folder / "step-00000001").rename(disk / "step-00000001")
    (folder / "step-00000001").symlink_to(disk / "step-00000001")
    for left in ("step-00000008.partial", "step-00000009.old"):
        (folder / left).symlink_to(disk)
    assert run_files.run_of(folder / "step-00000001") == tmp_path / "run"
    with pytest.raises(CheckpointError, match="outside of a run directory"):
        run_files.run_of(disk / "step-00000001")
    gone = layout.prune(folder, Checkpoint(keep_last=1))
    assert [path.name for path in gone] == ["step-00000002"]
    layout.clear_leftovers(folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-00000001", "step-00000003"]
    assert (disk / "step-00000001" / layout.MANIFEST).is_file()
