"""Labelled examples as a stream of micro-batches: any step of any epoch on any number of ranks, batched by length.

Shape legend: B features of a micro-batch.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that checks on the login node need no torch
    from torch import Tensor


class BadExample(ValueError):
    """An example that nothing can be learnt or predicted from; the message says why, for people."""


@dataclass
class Examples:
    """One micro-batch as it leaves the stream, on the CPU; the loop treats it like ``Rows``."""

    features: list[dict[str, Any]]  # B, as the task made them, and "example": the number of the example in its split
    valid_B: Tensor  # bool: False marks a filler row, which is not scored
    source_B: Tensor  # int16: 0
    position: Tensor  # int64 (B,): the row's place in the order of the run, or in the split
