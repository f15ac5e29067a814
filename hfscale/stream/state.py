"""What a checkpoint holds of a stream. Needs no torch: the login node looks at it before a run goes
on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol

from hfscale.errors import DataError
from hfscale.records import STRICT, Count, Damaged, parse

STATE_VERSION = 1
# of raw text: (source, lane) -> [sample, ids of it consumed] (text.py)
Cursors = list[list[list[int]]]


class Saved(Protocol):
    """What a checkpoint says of a run of tokens that its data ask for (``checkpoint/state.py``)."""

    @property
    def step(self) -> int: ...

    @property
    def position(self) -> StreamState: ...


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands, and what must be the same for that to mean anything. The same on all
    ranks; JSON under 1 kB, and of raw text two numbers a lane.
    """

    __pydantic_config__ = STRICT

    fingerprint: str  # of the data
    seed: int
    seq_len: Count
    lanes: Count
    block: Count
    epoch_rows: Count
    consumed_rows: Count = 0
    # of a mixture: name -> [start of the fingerprint, rows consumed]
    sources: dict[str, tuple[str, int]] = field(default_factory=dict)
    phases: list[tuple[int, list[int]]] = field(
        default_factory=list
    )  # of a mixture: those begun (mixture.py)
    cursors: Cursors = field(default_factory=list)
    # of raw text: 1, from before, made control tokens of text that spells them; so it goes on
    text: int = 2
    # rows that the run leaves out: [first position, the one after the last] (left_out.py)
    left_out: list[list[Count]] = field(default_factory=list)
    version: int = STATE_VERSION

    def to_dict(self) -> dict[str, object]:
        """Return the state as JSON types."""
        content = {**asdict(self), "consumed_tokens": self.consumed_rows * self.seq_len}
        return {
            name: value
            for name, value in content.items()
            if value or name not in ("sources", "phases", "cursors", "left_out")
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, object]) -> StreamState:
        """Return the state that ``to_dict`` gave.

        Raises:
            DataError: if it is not of this version.
        """
        if content.get("version") != STATE_VERSION:
            raise DataError(
                "a stream state of an unknown version",
                where="the checkpoint's state.json",
                value=content.get("version"),
                remedy=f"this program reads version {STATE_VERSION}: resume with the version "
                "of hfscale that saved it",
            )
        begun: dict[str, object] = {
            "text": 1 if content.get("cursors") else 2
        }  # of a state that does not say it
        begun |= {name: value for name, value in content.items() if name != "consumed_tokens"}
        try:
            return parse(cls, json.dumps(begun))
        except Damaged as error:
            raise DataError(
                f"the position in the data is damaged: {error}",
                where="the checkpoint's state.json, stream",
                remedy="go on from another checkpoint of the run",
            ) from None
