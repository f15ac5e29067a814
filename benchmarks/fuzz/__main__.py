"""Hostile and damaged input, from a seed: every file that hfscale reads, and what it makes of each.

A small run, its shards, its export and its scores are made once with the commands that a user
types. Each input is a copy with one thing changed, and one command on it, in a fork of this process
with a time limit. It may refuse (exit code 2) or accept; it must not end in a traceback, hang, be
killed, or read damaged tokens or weights otherwise than they were written.

    python -m benchmarks.fuzz                        # 2,000 inputs, into RESULTS.md
    python -m benchmarks.fuzz --inputs 200 --seed 7 --only idx
    python -m benchmarks.fuzz --replay idx:17        # one of them, with its output
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.common import machine, record, table
from benchmarks.fuzz.act import Random
from benchmarks.fuzz.attempt import attempt
from benchmarks.fuzz.base import make_base
from benchmarks.fuzz.many import BAD, Tally, run, spread, warm_up
from benchmarks.fuzz.surfaces import SURFACES


def options() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], choices=[*SURFACES])
    parser.add_argument("--replay", help="SURFACE:NUMBER")
    parser.add_argument("--home", type=Path, help="keep the base here, or use the one that is here")
    parser.add_argument("--jobs", type=int, default=2, help="surfaces at once")
    parser.add_argument("--tally", type=Path, help="of one surface: write what was counted here")
    parser.add_argument("--dry", action="store_true", help="print, do not write RESULTS.md")
    return parser.parse_args()


def replay(which: str, *, seed: int, home: Path, base: Path) -> None:
    """Print what becomes of one input, SURFACE:NUMBER, and its output."""
    name, _, number = which.rpartition(":")
    warm_up()
    rng = Random(f"{seed}/{name}/{number}")
    outcome = attempt(SURFACES[name], rng, base, home / "scratch", None)
    print(outcome.output, f"\n{outcome.kind} {outcome.code} {outcome.seconds:.1f} s")


def results(tallies: dict[str, Tally]) -> str:
    """Return the table of what became of the inputs of each surface, and of all."""
    kinds = ["refused", "accepted", "other", *BAD]
    rows = []
    for name, tally in tallies.items():
        counts = [tally.kinds[kind] for kind in kinds]
        rows.append([name, sum(tally.kinds.values()), *counts, f"{tally.slowest_s:.1f}"])
    sums = [sum(int(row[place]) for row in rows) for place in range(1, len(kinds) + 2)]
    rows.append(["**all**", *sums, ""])
    return table(["input", "tried", *kinds, "slowest, s"], rows)


def main() -> None:
    """Fuzz and record."""
    asked = options()
    with tempfile.TemporaryDirectory() as scratch:
        home = asked.home or Path(scratch)
        base = home / "base"
        if not (base / "export").is_dir():
            make_base(home)
        base = base.resolve()  # what its configs call it
        if asked.replay:
            replay(asked.replay, seed=asked.seed, home=home, base=base)
            return
        if asked.tally:
            tallies = run(asked.inputs, seed=asked.seed, home=home, only=asked.only, base=base)
            [tally] = tallies.values()
            asked.tally.write_text(json.dumps(vars(tally)))
            return
        tallies = spread(asked.inputs, seed=asked.seed, home=home, only=asked.only, jobs=asked.jobs)
    _, what, *_ = __doc__.split("\n\n")
    about = f"{machine('pydantic', 'tokenizers', 'transformers')} Seed {asked.seed}. {what}"
    shown = results(tallies)
    print(shown)
    if not asked.dry:
        record("fuzz", f"{about}\n\n{shown}")


if __name__ == "__main__":
    main()
