"""How soon the command line answers: `hfscale --help`, and a config with mistakes, against an empty
Python program.

python -m benchmarks.startup [--turns 15]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.common import interleaved, machine, ratio, record, spread, table, verdict

BAD_CONFIG = """\
run: {name: bad}
tokenizer: {path: tokenizer}
data: {seq_len: 128, sources: [{shards: shards}]}
model: {architecture: gpt2}
objective: {name: clm}
train: {steps: 10, global_batch: seven, micro_batsh: 8}
"""
NOTHING, HELP, REFUSED = "python -c pass", "hfscale --help", "a config with two mistakes, refused"


def timed(command: list[str], *, code: int, says: str = "") -> Callable[[], float]:
    """Return a function that runs ``command`` and returns its seconds, after checking what it
    answered.
    """

    def run() -> float:
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        elapsed = time.perf_counter() - start
        said = done.stdout + done.stderr
        if done.returncode != code or says not in said or "Traceback" in said:
            raise SystemExit(f"{command} ended with {done.returncode} and said:\n{said}")
        return elapsed

    return run


def hfscale() -> list[str]:
    """Return the installed command of this environment, or the same started as a module."""
    installed = Path(sys.executable).with_name("hfscale")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "launch.cli"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--no-record", action="store_true", help="print only")
    asked = parser.parse_args()
    where = machine("pydantic", "typer")
    with tempfile.TemporaryDirectory(prefix="hfscale-startup-") as folder:
        config = Path(folder) / "bad.yaml"
        config.write_text(BAD_CONFIG)
        refuse = [*hfscale(), "pretrain", str(config)]
        taken = interleaved(
            {
                NOTHING: timed([sys.executable, "-c", "pass"], code=0),
                HELP: timed([*hfscale(), "--help"], code=0, says="pretrain"),
                REFUSED: timed(refuse, code=2, says="micro_batch"),
            },
            repeats=asked.turns,
            warm=2,
        )
    targets = {HELP: 0.3, REFUSED: 1.0}
    rows = [
        [
            f"`{name}`" if name != REFUSED else name,
            spread(seconds, form="{:.3f}"),
            f"{ratio(seconds, taken[NOTHING]):.1f}",
            verdict(median(seconds), at_most=targets[name]) if name in targets else "",
        ]
        for name, seconds in taken.items()
    ]
    figures = table(["", "s (quartiles)", "x empty Python", "target, s"], rows)
    body = f"{where}\n\n{figures}\n\n{asked.turns} turns, files in the cache."
    if asked.no_record:
        print(body)
    else:
        record("startup", body)


if __name__ == "__main__":
    main()
