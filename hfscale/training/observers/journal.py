"""Rank 0's pen for incidents: who, when, and where the rows of the step lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hfscale.monitor.fence import Fence
from hfscale.monitor.incidents import Incident, Place
from hfscale.monitor.lines import Lines
from hfscale.run_files import INCIDENTS
from hfscale.stream.left_out import Span


class Journal:
    """Appends incidents of an attempt; the file appears with the first."""

    def __init__(
        self,
        run_dir: Path,
        *,
        attempt: int,
        fence: Fence | None,
        rows_of: Callable[[int], Span],
        places: Callable[[Span], list[Place]],
    ) -> None:
        """``rows_of`` a step gives its positions, ``places`` says where these lie."""
        self._file, self._attempt, self._fence = run_dir / INCIDENTS, attempt, fence
        self._rows_of, self._places = rows_of, places

    def write(self, incident: Incident) -> None:
        """Append ``incident``, on the disk before this returns.

        Raises:
            SupersededError: if a younger attempt has begun.
        """
        rows = incident.rows or self._rows_of(incident.step)
        where = {"rows": rows, "places": tuple(self._places((rows[0], rows[1])))}
        lines = Lines(self._file, fence=self._fence)
        record = incident.model_copy(update=where).stamped(self._attempt)
        lines.append(record.model_dump(mode="json"))
        lines.close()
