"""What a person asks of a run that is under way, through a file of its directory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hfscale import run_files
from hfscale.records import Count, Damaged, Record, parse, read_file


class ProfileRequest(Record):
    """Profile some steps, on rank 0 or on every rank: ``hfscale profile`` writes it."""

    number: int  # which request: the time at which it was made, in ns
    steps: Count
    every_rank: bool = False


def request_file(run_dir: Path) -> Path:
    """Return where a profile is asked for."""
    return run_dir / run_files.PROFILES / run_files.REQUEST


def read_request(run_dir: Path) -> ProfileRequest | None:
    """Return what was asked last; None if nothing was, or it cannot be read."""
    with suppress(OSError, Damaged):
        return parse(ProfileRequest, read_file(request_file(run_dir), most=1 << 16))
    return None
