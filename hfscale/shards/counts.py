"""What a build of shards read and what it left out, by reason and by name; it stands in the ledger
and in the manifests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hfscale.records import Count, Record

NAMED = 20  # of what was left out for one reason, in the record
SHOWN = 3  # of those in a line for people
REASONS = {
    "duplicates": "duplicates",
    "empty": "empty",
    "invalid": "invalid (half of a character)",
    "undecodable": "not UTF-8",
    "packed": "packed otherwise than .gz",
    "missing": "links that lead nowhere, or no files",
}
ALWAYS = ("duplicates", "empty", "invalid", "undecodable")  # told also where there are none


class Seen(Record):
    """What was read and left out, as it is kept."""

    documents: Count
    duplicates: Count = 0
    empty: Count = 0
    invalid: Count = 0
    undecodable: Count = 0
    packed: Count = 0
    missing: Count = 0
    names: dict[str, list[str]] | None = None  # None: a build from before, which named nothing


@dataclass
class Counts:
    """``documents`` is all that was met: what is kept, and what is left out for each of the
    REASONS.
    """

    documents: int = 0
    duplicates: int = 0  # texts seen before, byte for byte
    empty: int = 0  # nothing but white space
    invalid: int = 0  # lone surrogates: no UTF-8 for them exists
    undecodable: int = 0  # files, or pieces of long files, that are not UTF-8
    packed: int = 0  # files that would have to be unpacked: .zst, .xz, .zip
    missing: int = 0  # links that lead nowhere, pipes
    names: dict[str, list[str]] = field(default_factory=dict)  # of each reason, the first NAMED

    def leave_out(self, why: str, name: str) -> None:
        """Count one more for this reason (one of REASONS)."""
        setattr(self, why, getattr(self, why) + 1)
        names = self.names.setdefault(why, [])
        if name and len(names) < NAMED:
            names.append(name)

    def add(self, part: Seen) -> None:
        """Count what a part of the build has seen too."""
        for name in ("documents", *REASONS):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        for why, names in (part.names or {}).items():
            self.names[why] = [*self.names.get(why, []), *names][:NAMED]

    def record(self) -> Seen:
        """Return all of it, to be kept."""
        numbers: dict[str, int] = {name: getattr(self, name) for name in ("documents", *REASONS)}
        named = {why: names for why, names in self.names.items() if names}
        return Seen(**numbers, names=named)


def seen_line(seen: Seen) -> str:
    """Return one line for people of what a build has seen."""
    parts, left = list[str](), 0
    for why, meaning in REASONS.items():
        count: int = getattr(seen, why)
        names = (seen.names or {}).get(why, [])
        left += count
        if count or why in ALWAYS:
            more = ", ..." if count > SHOWN and names else ""
            such_as = f" ({', '.join(names[:SHOWN])}{more})" if names else ""
            parts.append(f"{count:,} {meaning}{such_as}")
    read = seen.documents + (seen.undecodable if seen.names is None else 0)
    return f"{read:,} documents read; left out: {', '.join(parts)}; kept: {read - left:,}"
