"""How long a save takes: what training waits for it, what is written behind, and whether both fit
into the warning before a time limit.

    training waits   a rank's share is copied into its host's memory
    writing          each rank hashes its share and writes it, all of a node to one disk; the last
                     commits

With ``checkpoint.async`` training goes on while it is written; without, it waits for both. A
warning comes at any moment: the step under way is finished first, then what is being written, then
the state of that step is saved.
"""

from __future__ import annotations

from dataclasses import dataclass

from hfscale.planning.figures import Figure, size, total
from hfscale.planning.memory import Setup
from hfscale.planning.site import BUS_SPEED, Site

HASHED = 1.2e9  # bytes a second of SHA-256 on one core with its instructions (assumed)
COMMIT_S = 0.05  # to agree, to sync and to rename, whatever the size (seen on CPU ranks)
SPARE = 1.5  # of what is planned, that a warning should leave


@dataclass(frozen=True)
class Save:
    """A save of all ranks. Seconds."""

    copy: Figure
    writing: Figure
    asynchronous: bool

    @property
    def whole(self) -> Figure:
        """From its begin to its commit, as ``save_s`` of metrics.jsonl."""
        return total("save", (self.copy, self.writing))

    @property
    def stall(self) -> Figure:
        """What training waits for it."""
        parts = (self.copy,) if self.asynchronous else (self.copy, self.writing)
        return total("training waits", parts)

    def after_warning(self, step: Figure, whole: Figure) -> Figure:
        """Return how long ranks take to leave after a warning, at most; ``step`` and ``whole`` are
        those of this plan, or what checked runs say of them.
        """
        under_way = whole.value - self.copy.value if self.asynchronous else 0.0
        how = f"step {step} + save {whole}"
        if self.asynchronous:
            how += f" + the write under way {Figure('', under_way, 's', '')}"
        return Figure("after a warning", step.value + whole.value + under_way, "s", how)


def save(setup: Setup, saved: Figure, site: Site) -> Save:
    """Return how long a save of ``saved`` bytes a rank takes."""
    share = saved.value
    if site.on_cpu:
        at = site.traffic.speed / 2  # each byte is read and written, into fresh pages at first
        how = f"{size(share)} a rank, read and written at {site.traffic.how}"
    else:
        at, how = BUS_SPEED, f"{size(share)} a rank / {BUS_SPEED / 1e9:g} GB/s of its bus (assumed)"
    copy = Figure("copy", share / at, "s", how)
    disk = site.disk
    on_disk = share * setup.a_node
    how = (
        f"{size(share)} hashed at {HASHED / 1e9:g} GB/s (assumed) + {size(on_disk)} a node / "
        f"{disk.how} + {COMMIT_S} s to commit"
    )
    seconds = share / HASHED + on_disk / disk.speed + COMMIT_S
    return Save(copy, Figure("writing", seconds, "s", how), setup.async_save)
