"""Checks of depth `read`: the folder that a run writes to, its permissions, room and quota."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from hfscale.checks.finding import Finding, measured
from hfscale.checks.start import Start

TIMEOUT_S = 5.0  # for a quota's server to answer
LUSTRE = "lustre"


def existing(folder: Path) -> Path:
    """Return ``folder``, or the nearest one above it that is there for all that this user may
    see.
    """
    return next(place for place in (folder, *folder.parents) if os.path.exists(place))


def folder(start: Start) -> Iterator[Finding]:
    """Yield whether the run directory can be written, or made."""
    place = existing(start.folder)
    if not place.is_dir():
        yield Finding("folder", "fail", f"{place} is no folder")
    elif os.statvfs(place).f_flag & os.ST_RDONLY:
        yield Finding("folder", "fail", f"{place} is on a file system that is read only")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Finding("folder", "fail", f"user {os.getuid()} may not write to {place}")
    else:
        made = "" if place == start.folder else f", where {start.folder.name} will be made"
        yield Finding("folder", "ok", f"{place} can be written{made}")


def free_space(start: Start) -> Iterator[Finding]:
    """Yield how much room there is in the folder of the run."""
    place = existing(start.folder)
    room = os.statvfs(place)
    yield measured("free space", room.f_bavail * room.f_frsize / 1e9, f"GB in {place}")


def inodes(start: Start) -> Iterator[Finding]:
    """Yield how many more files there may be."""
    room = os.statvfs(existing(start.folder))
    if room.f_files:  # some file systems count none
        yield measured("inodes", room.f_favail, "free")


def quota(start: Start) -> Iterator[Finding]:
    """Yield how much this user may still write, where somebody counts that."""
    place = existing(start.folder)
    mount, device, kind = mount_of(place)
    tool, command = (
        ("lfs", ["lfs", "quota", "-q", "-u", str(os.getuid()), mount])
        if kind == LUSTRE
        else ("quota", ["quota", "-w", "--show-mntpoint", "--hide-device"])
    )
    if shutil.which(tool) is None:
        yield Finding("quota", "ok", f"not readable: there is no `{tool}` here")
        return
    try:
        # whoever is over the quota makes it end with 1
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding("quota", "ok", f"not readable: `{tool}` got no answer in {TIMEOUT_S:.0f} s")
        return
    left = quota_left(done.stdout.splitlines(), names=(mount, device))
    if left is None:
        yield Finding("quota", "ok", f"none in {mount}")
    else:
        yield measured("quota", left / 1e9, f"GB of the quota in {mount}")


def mount_of(place: Path) -> tuple[str, str, str]:
    """Return where the file system of ``place`` is mounted, its device, and its kind."""
    real = Path(os.path.realpath(place))
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    over = [fields for fields in mounts if real.is_relative_to(fields[1])]
    device, mount, kind, *_ = max(over, key=lambda fields: len(fields[1]))
    return mount, device, kind


def quota_left(lines: Sequence[str], *, names: Sequence[str]) -> float | None:
    """Return how many bytes are left of the quota on one of ``names``; None where there is none.

    A line of `quota -w` and of `lfs quota -q` alike: name, KiB used (with a star where that is too
    much), soft limit, hard limit; 0 is no limit.
    """
    for line in lines:
        fields = line.split()
        if len(fields) < 4 or fields[0] not in names:
            continue
        numbers = [field.rstrip("*") for field in fields[1:4]]
        if all(number.isdigit() for number in numbers):
            used, soft, hard = map(int, numbers)
            limit = hard or soft
            return max(0.0, (limit - used) * 1024.0) if limit else None
    return None
