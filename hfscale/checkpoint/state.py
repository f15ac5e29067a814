"""What a checkpoint says of itself: its ``state.json``, as one record. Needs no torch.

Who writes gives a ``CheckpointState``, who reads gets one. A file without a ``version`` is of
version 1, as of hfscale 0.1. A version that only adds a key keeps its number: older programs carry
the key along and do not look at it. One that changes what a key means gets a higher number, and
older programs refuse it.
"""

from __future__ import annotations

import json
from pathlib import Path

from hfscale.config.schema import Optim
from hfscale.errors import CheckpointError
from hfscale.records import Count, Record, load
from hfscale.stream.state import StreamState

VERSION = 1


class Best(Record):
    """The best validation yet of a metric."""

    metric: str
    step: Count
    value: float
    stale: Count = 0


class Match(Record):
    """Where the weights of adapters' base come from (``weights.Match``)."""

    sources: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    grown: tuple[str, ...]
    rows: tuple[Count, ...]


class Adapters(Record):
    """What adapters stand beside (``jobs/adapters.py``)."""

    folder: str
    scale: float
    match: Match
    targets: dict[str, bool]
    sizes: dict[str, Count] | None = None
    digests: dict[str, str]


class CheckpointState(Record):
    """What a checkpoint says of itself. What only some versions or some runs say has a default."""

    version: Count = VERSION
    # of the attempt that saved it
    device: str = ""
    world_size: Count = 0
    zero_stage: Count = 0
    precision: str = ""
    optimizer: str = "adamw"  # as of hfscale 0.1, which had no other
    versions: dict[str, str] = {}  # of the libraries
    # of the run
    pretrained: str | None = None
    adapters: Adapters | None = None
    tokenizer_digest: str = ""
    data_fingerprint: str = ""
    data: dict[str, str] = {}  # name of a source -> its fingerprint
    facts: dict[str, object] = {}  # what the examples said of the task
    schedule: dict[str, object] = {}
    warmed_rows: Count | None = None  # after which the warm-up had ended, or will
    rng: str = ""
    # of the moment
    step: Count
    tokens_seen: Count = 0
    skipped_rows: Count = 0
    stream: dict[str, object] = {}  # of ``StreamState``, or of ``ExampleState``
    metrics: dict[str, object] = {}
    engine: dict[str, object] = {}
    tied: dict[str, str] = {}
    best: Best | None = None
    health: dict[str, list[list[float]]] = {}  # the values that say what is ordinary

    @property
    def position(self) -> StreamState:
        """Where a stream of tokens stands.

        Raises:
            DataError: if it is damaged, or of an unknown version.
        """
        return StreamState.from_dict(self.stream)

    def check_optimizer(self, optim: Optim, *, where: Path) -> None:
        """Return if ``optim`` can go on from this checkpoint.

        Raises:
            CheckpointError: if another optimizer trained it, and ``optim.reset`` does not say that
                what this one kept beside the weights may be dropped.
        """
        if self.optimizer == optim.name or optim.reset:
            return
        raise CheckpointError(
            "the checkpoint was trained by another optimizer",
            where=where,
            value=f"{self.optimizer}; optim.name={optim.name}",
            remedy=f"optim.name={self.optimizer} goes on exactly; optim.reset=true takes the "
            f"weights alone, and {optim.name} begins anew beside them",
        )

    def to_json(self) -> bytes:
        """Return the file's content: what was given, and nothing that was not."""
        return json.dumps({"version": self.version, **self.as_dict()}, indent=1).encode()


class _Versioned(Record):
    version: Count = VERSION


def read_state(file: Path) -> CheckpointState:
    """Return what ``file`` says.

    Raises:
        CheckpointError: if it cannot be read, is of a later version, or is not of its shape.
    """
    what, remedy = "the state of a checkpoint", "name another checkpoint of the run"
    version = load(file, _Versioned, what=what, remedy=remedy, error=CheckpointError).version
    if version > VERSION:
        raise CheckpointError(
            "the state of a checkpoint is of a later version of hfscale",
            where=file,
            value=f"version {version}",
            remedy=f"this program reads up to version {VERSION}: use the hfscale that saved it",
        )
    return load(file, CheckpointState, what=what, remedy=remedy, error=CheckpointError)
