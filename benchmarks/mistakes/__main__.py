"""A hundred and more mistakes, made by chance from a seed in a scratch copy of config, data, script
and site: which of them are named before a job is submitted, and by what.

    python -m benchmarks.mistakes [--only PART_OF_A_NAME] [--seed N]      # root, as the Slurm tests

Asked in this order, until one names the right place: `--dry-run`, `hfscale doctor`, `hfscale
rehearse --launcher slurm`, on the cluster of tests/helpers/slurm.py. Then the same of the place
without a mistake: whatever fails there is a false alarm.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from benchmarks.common import machine, record, table, verdict
from benchmarks.mistakes import config, data, site
from benchmarks.mistakes.place import Mistake, Place, new_place
from hfscale.log import logger
from launch.cli import main as hfscale
from tests.helpers.corpus import make_corpus
from tests.helpers.labelled import make_encoder, reviews, write_jsonl
from tests.helpers.slurm import missing, running

MISTAKES = [*config.MISTAKES, *data.MISTAKES, *site.MISTAKES]
NOWHERE, ELSEWHERE = "not found", "another place named"
WANTED = 0.95
USUAL = ("no rehearsal has passed", " to start at ")  # notices that name nothing


@dataclass
class Answer:
    """What a mistake came to: who named it, after how many seconds, and what was said."""

    mistake: str
    by: str
    seconds: float
    said: str


def ask(words: Sequence[object]) -> tuple[int, str]:
    """Return the exit code of a command of hfscale, run in this process, and all it said."""
    said, before = StringIO(), sys.argv
    sys.argv = ["hfscale", *map(str, words)]
    try:
        with redirect_stdout(said), redirect_stderr(said):
            hfscale()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except Exception as error:  # a traceback names nothing
        code, _ = 1, said.write(f"DEFECT {type(error).__name__}: {error}")
    finally:
        sys.argv = before
        logger.handlers[:] = []
    return code, said.getvalue()


def asked(place: Place, *, examples: bool) -> dict[str, list[object]]:
    """Return what is asked, in its order."""
    file, verb = place.write(), "finetune" if examples else "pretrain"
    return {
        "--dry-run": [verb, file, "--launcher", "slurm", "--dry-run"],
        "doctor": ["doctor", file],
        "rehearse": ["rehearse", file, "--launcher", "slurm", "--skip", "time limit"],
    }


def against(said: str, code: int) -> Iterator[str]:
    """Yield the lines that speak against a run: of an error, of what is not ok, and notices."""
    told = False
    for line in said.splitlines():
        told = told or line.startswith(("error: ", "unhealthy: ", "DEFECT"))
        doubt = line.startswith(("fail", "warn")) or line.lstrip().startswith("->")
        notice = "notice: " in line and not any(words in line for words in USUAL)
        if (told and code) or doubt or notice or "warning: " in line:
            yield line


def look(mistake: Mistake, place: Place) -> Answer:
    """Return who names a mistake first."""
    began = time.monotonic()
    mistake.make(place)
    heard, elsewhere = list[str](), False
    for by, command in asked(place, examples=mistake.examples).items():
        if by == "doctor" and mistake in site.MISTAKES:
            continue  # on a login node it looks at data and disks, and starts nothing of the site
        code, said = ask(command)
        heard.append(f"[{by}: {code}] {said}")
        lines = [*against(said, code)]
        if any(word in line for line in lines for word in mistake.words):
            return Answer(mistake.name, by, time.monotonic() - began, heard[-1])
        elsewhere = elsewhere or code != 0
    by = ELSEWHERE if elsewhere else NOWHERE
    return Answer(mistake.name, by, time.monotonic() - began, "\n".join(heard))


def clean(folder: Path, source: Path) -> list[Answer]:
    """Return what is said against places without a mistake: false alarms."""
    alarms = []
    for examples in (False, True):
        place = new_place(folder, source, seed=0, examples=examples)
        for by, command in asked(place, examples=examples).items():
            code, said = ask(command)
            doubts = [line for line in said.splitlines() if line.startswith(("fail", "error"))]
            if by != "doctor" and (code or doubts):  # doctor says of this very machine what it has
                alarms.append(Answer("no mistake", by, 0.0, said))
    return alarms


def unmount(folder: Path) -> None:
    """Take the disks of a place away."""
    subprocess.run(["umount", "-l", folder / "runs"], check=False, stderr=subprocess.DEVNULL)


def report(answers: Sequence[Answer], alarms: Sequence[Answer], *, on: str) -> str:
    """Return the section of RESULTS.md."""
    count = Counter(answer.by for answer in answers)
    named = len(answers) - count[NOWHERE] - count[ELSEWHERE]
    left = [answer for answer in answers if answer.by in (NOWHERE, ELSEWHERE)]
    rows = [
        [by, count[by], f"{_median([a.seconds for a in answers if a.by == by]):.1f}"]
        for by in ("--dry-run", "doctor", "rehearse", ELSEWHERE, NOWHERE)
    ]
    lost = "; ".join(f"{one.mistake} ({one.by})" for one in left) or "none"
    wanted = round(WANTED * len(answers))
    return "\n\n".join(
        [
            f"{on} {len(answers)} mistakes in config, data, paths, "
            "request, script and site, each asked about in the order of the table (doctor not of "
            "script and site: on a login node it starts nothing of them).",
            table(["named by", "mistakes", "s (median)"], rows),
            f"Named before submission: {named}, {verdict(named, at_least=wanted)}. Without a "
            f"mistake {len(alarms)} false alarms, {verdict(len(alarms), at_most=0)}. "
            f"Not named: {lost}.",
        ]
    )


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def data_of(folder: Path) -> Path:
    """Return ``folder`` with data without a mistake."""
    if not (folder / "reviews.jsonl").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        make_corpus(folder)
        make_encoder(folder / "encoder")
        write_jsonl(folder / "reviews.jsonl", reviews(120))
    return folder


def main() -> None:
    """Make mistakes, ask, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="mistakes whose name has this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, help="a folder on no local disk, as Slurm wants it")
    options = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    home = options.home or Path(tempfile.mkdtemp(prefix="hfscale-mistakes-", dir="/srv"))
    chosen = [one for one in MISTAKES if options.only in one.name]
    on, answers = machine("torch", "deepspeed"), list[Answer]()
    with running() as cluster:
        os.environ.update(cluster.env)
        os.environ["XDG_STATE_HOME"] = str(home / "state")
        source = data_of(home / "data")
        for number, mistake in enumerate(chosen):
            folder = home / "place"
            place = new_place(folder, source, seed=options.seed + number, examples=mistake.examples)
            answers.append(look(mistake, place))
            unmount(folder)
            one = answers[-1]
            print(f"{one.seconds:6.1f} s  {one.by:<20}{one.mistake}", flush=True)
            if one.by in (NOWHERE, ELSEWHERE):
                print(f"    {one.said[-1500:]}", flush=True)
        alarms = [] if options.only else clean(home / "place", source)
    for alarm in alarms:
        print(f"FALSE ALARM {alarm.by}: {alarm.said}")
    if not options.home:
        with suppress(OSError):
            shutil.rmtree(home)
    text = report(answers, alarms, on=on)
    if options.only:
        print(text)
    else:
        record("mistakes", text)


if __name__ == "__main__":
    main()
