"""What benchmarks/stream.py found, in words: its section of RESULTS.md and the picture of a
resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import ratio, spread, table, verdict
from benchmarks.peers.streams import BATCH, SEQ, TOKENS
from benchmarks.stream_ours import IN_ORDER, OURS, SHUFFLED

PLOT = Path(__file__).parents[1] / "docs" / "resume.png"
PLACES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.99)  # of a resume, in epochs
HALFWAY = PLACES.index(0.5)
FLAT, MOSAICML = "np.memmap", "MosaicML Streaming"
HEADER = [
    "reader",
    "first",
    "ratio",
    "later",
    "ratio",
    "target (later)",
    "resume, ms",
    "anonymous MiB through an epoch",
]


@dataclass(frozen=True)
class Found:
    """What was measured."""

    answers: dict[str, list[dict[str, Any]]]  # of each reader, a turn each; the first is to warm up
    resumes: dict[str, list[dict[str, float]]]  # of those that resume, at each of PLACES
    far_s: float  # a resume of ours at 1000.5 epochs
    parts_s: dict[str, float]  # an epoch of ours, taken to pieces
    cold_s: dict[bool, tuple[float, float, float]]  # with the reader thread and without

    def first(self, name: str) -> list[float]:
        """Return the speed of each turn's first epoch."""
        return [answer["speeds"][0] for answer in self.answers[name][1:]]

    def later(self, name: str) -> list[float]:
        """Return the speed of each turn's next epoch."""
        return [answer["speeds"][1] for answer in self.answers[name][1:]]


def report(found: Found, *, where: str, tokens: float, turns: int, order: str) -> str:
    """Return the section of RESULTS.md."""
    paragraphs = [
        f"{where} {tokens:.3g} tokens (peers that need seconds for it: a "
        f"tenth), batches of {BATCH} x {SEQ} int64, one process "
        f"each. M tokens/s, median (quartiles) of {turns} turns; ratios "
        "to np.memmap in the same turn. First: with files "
        "opened anew, and our checksums. Later: the next epoch of the same reader. "
        "Resume: from a state at 50 % to the first batch.",
        table(HEADER, [line_of(name, found) for name in found.answers]),
        against_mosaicml(found),
        resumes_of_ours(found),
        memory_of_ours(found),
        a_batch_in_pieces(found, epoch_batches=tokens / TOKENS),
        out_of_the_page_cache(found),
        order,
    ]
    return "\n\n".join(filter(None, paragraphs))


def line_of(name: str, found: Found) -> list[str]:
    """Return a reader's line of the table."""
    first, later = found.first(name), found.later(name)
    memory = found.answers[name][-1]["memory"]
    reached = ratio(later, found.later(FLAT))
    form = "{:.0f}" if later[0] > 50 else "{:.1f}"
    resume = ""
    if name in found.resumes:
        resume = f"{found.resumes[name][HALFWAY]['seconds'] * 1e3:.1f}"
    return [
        name,
        spread(first, form=form),
        f"{ratio(first, found.first(FLAT)):.3f}",
        spread(later, form=form),
        f"{reached:.3f}",
        verdict(reached, at_least=0.7) if name == IN_ORDER else "",
        resume,
        f"{memory[0]:.1f} - {memory[-1]:.1f}",
    ]


def against_mosaicml(found: Found) -> str:
    """Return how many times faster ours is, or nothing where it was left out."""
    if MOSAICML not in found.answers:
        return ""
    theirs = found.later(MOSAICML)
    in_order, shuffled = (ratio(found.later(name), theirs) for name in (IN_ORDER, SHUFFLED))
    return (
        f"Against {MOSAICML}'s iterator: {in_order:.0f} x in order, "
        f"{shuffled:.0f} x shuffled, "
        f"{verdict(shuffled, at_least=20)}."
    )


def resumes_of_ours(found: Found) -> str:
    """Return how long it takes at each place, and far from the beginning."""
    taken_ms = [point["seconds"] * 1e3 for point in found.resumes[SHUFFLED]]
    each = [f"{ms:.1f} ms at {place:g}" for place, ms in zip(PLACES, taken_ms, strict=True)]
    return (
        f"Resume of ours, checksums of what the first batch touches included: {', '.join(each)} "
        f"and {found.far_s * 1e3:.1f} ms at 1000.5 epochs; longest over shortest "
        f"{max(taken_ms) / min(taken_ms):.2f}. All: docs/resume.png."
    )


def memory_of_ours(found: Found) -> str:
    """Return how much the anonymous memory of our readers grows."""
    answers = [answer for name in OURS for answer in found.answers[name][1:]]
    grown = max(max(answer["memory"]) - min(answer["memory"]) for answer in answers)
    return (
        "Anonymous memory of our reader (RssAnon; mapped pages of the shards are "
        f"not in it) grows by at most {grown:.2f} MiB "
        "through an epoch."
    )


def a_batch_in_pieces(found: Found, *, epoch_batches: float) -> str:
    """Return where the time of a batch in order goes."""
    each_us = {name: seconds / epoch_batches * 1e6 for name, seconds in found.parts_s.items()}
    whole_us = TOKENS / median(found.later(IN_ORDER))
    return (
        f"A batch in order with boundaries takes {whole_us:.1f} us: "
        f"{each_us['write']:.1f} us to read uint16 and write int64 (a bare loop "
        f"of slices; {each_us['write'] / whole_us:.0%}), "
        f"{each_us['copy'] - each_us['write']:.1f} us more to copy prepared "
        "rows out "
        f"of tars, {whole_us - each_us['copy']:.1f} us for take(), advance(), views "
        "and what the reader thread, which prepares beside it "
        f"({each_us['prepare']:.1f} us a batch), takes of the interpreter and of "
        "the memory."
    )


def out_of_the_page_cache(found: Found) -> str:
    """Return how long training waits for data that only the disk holds."""
    first_s, all_s, longest_s = found.cold_s[True]
    _, all_alone_s, longest_alone_s = found.cold_s[False]
    return (
        "Out of the page cache, in 8 lanes, steps of 3 ms: the first batch after "
        f"{first_s * 1e3:.0f} ms; in the 999 steps after it "
        f"training waits {all_s * 1e3:.0f} ms in all and "
        f"{longest_s * 1e3:.0f} ms at most, without the reader thread "
        f"{all_alone_s * 1e3:.0f} ms and {longest_alone_s * 1e3:.0f} ms."
    )


def plot(resumes: dict[str, list[dict[str, float]]]) -> None:
    """Write the picture of the seconds of a resume over its position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name, points in resumes.items():
        style: dict[str, Any] = {"linewidth": 1}
        if name == SHUFFLED:
            style = {"color": "black", "linewidth": 2.5}
        axes.plot(
            [point["tokens"] / 1e6 for point in points],
            [point["seconds"] * 1e3 for point in points],
            marker="o",
            markersize=3,
            label=name,
            **style,
        )
    axes.set(
        yscale="log",
        xlabel="position, M tokens",
        ylabel="from a state to the first batch, ms",
        title="Resume",
    )
    figure.legend(loc="outside right center", fontsize=7, frameon=False)
    figure.savefig(PLOT, dpi=130)
