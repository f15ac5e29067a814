"""What a rehearsal is to do, and what has happened so far: two files in its run directory, which
travel with the job.

    RUN_DIR/rehearsal.json     the plan, written by `hfscale rehearse` before anything starts
    RUN_DIR/rehearsal.jsonl    one line for each thing that was done, written by rank 0

A run without a plan knows nothing of all this: the worker looks once whether the file is there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from hfscale import run_files
from hfscale.monitor.lines import Lines, read_lines
from hfscale.records import Count, Record, load

SAVE_EVERY, STEPS = 2, 12
# what is done to the run, in this order. Each is looked for after its step
TIME_LIMIT, SIGNAL = "time limit", "signal"
KILL, STOP = "all ranks killed", "one rank stopped"
FAULTS = {TIME_LIMIT: 1, SIGNAL: 3, KILL: 5, STOP: 7}
# what rank 0 of the last attempt does with the run, once it is done
OTHER_WORLD, EVALUATION, EXPORT = "another world size", "evaluation", "export"
RUN, TWIN, OTHER, EXPORTED = "rehearsal", "twin", "other", "export"  # the folders of a rehearsal


class Fault(Record):
    """What happens to the ranks after ``step``, or the first step behind it."""

    name: str
    step: Count


class Command(Record):
    """A command of a user: the words that follow python's own name."""

    name: str
    words: list[str]


class Size(Record):
    """Of a model: all parameters, and those that are trained and saved."""

    parameters: Count
    trained: Count
    words: str = ""  # its layers and widths


class Asked(Record):
    """What the config says that is rehearsed, as far as the verdict looks at it."""

    signal_s: Count = 300
    time: str | None = None
    every_minutes: float | None = None
    every_steps: Count | None = None
    keep_last: Count = 2
    nodes: Count = 1
    root: str = "."  # where its checkpoints will lie


class Looked(Record):
    """How many shards there are, and were read whole before the rehearsal began."""

    shards: Count
    read: Count


class Plan(Record):
    """A rehearsal."""

    launcher: Literal["local", "slurm"]
    ranks: Count  # that are to start
    gpus_per_node: Count  # that were asked for
    limit_s: Count = 0  # of the rehearsal's own job
    signal_s: Count = 0  # so long before it Slurm warns
    whole: Size
    small: Size
    asked: Asked
    data: Looked | None = None  # of shards
    faults: list[Fault]
    commands: list[Command]
    left_out: dict[str, str] = {}  # what is not done -> why
    cluster: dict[str, str] = {}  # what `scontrol show config` and the partition say
    began: float  # in seconds of the epoch


class Place(Record):
    """Where a rank is."""

    node: str
    device: str  # cpu, or the GPU's name
    gpu: str  # which one: no two ranks have the same
    gpus: Count  # that this process sees


class Event(Record):
    """Something that was done."""

    what: Literal["fault", "ranks", "packages", "writing", "twin", "command", "warned"]
    name: str = ""
    attempt: Count
    step: Count = 0
    time: float  # when it was over; of a fault: when it was done
    seconds: float = 0.0
    code: int = 0
    words: str = ""
    places: list[Place] = []
    bytes: Count = 0


def is_rehearsal(run_dir: Path) -> bool:
    """Return whether a run directory is one of a rehearsal."""
    return (run_dir / run_files.REHEARSAL).is_file()


def read_plan(run_dir: Path) -> Plan:
    """Return the plan of a rehearsal.

    Raises:
        DataError: if it is damaged.
    """
    return load(run_dir / run_files.REHEARSAL, Plan, what="the plan of the rehearsal")


def events(run_dir: Path) -> Iterator[Event]:
    """Yield what has been done, in its order."""
    return read_lines(run_dir / run_files.REHEARSED, Event)


class Journal:
    """Writes down what is done, at once: the process may end with the next line."""

    def __init__(self, run_dir: Path, *, attempt: int) -> None:
        self._lines = Lines(run_dir / run_files.REHEARSED)
        self._attempt = attempt

    def note(self, what: str, **more: object) -> None:
        """Add an event of this attempt."""
        known = {"what": what, "attempt": self._attempt, "time": time.time()}
        self._lines.append(Event.model_validate({**known, **more}).as_dict())
