"""A thousand attacks on checkpoints: kills from outside during saves, full disks, read-only
folders, failing writes, damaged files.

    python -m benchmarks.chaos_checkpoints  # 1,000 cases; about 15 minutes on 4 idle cores
    python -m benchmarks.chaos_checkpoints --cases 40 --procs 1

Saves are those of the real engine: two CPU ranks, every ZeRO stage, fp32 and bf16, with the writer
behind and without. The attacker is another process; its moments are uniform over the duration of a
save, which is measured first. After each attack the run is started again as it lies there. A load
is silently wrong if what the engine then holds is not, bit for bit, what the ranks had said they
were saving; a recovery is automatic if the start loaded the newest intact checkpoint without
anybody's help.

Every case is written to a ledger when it is judged: the same command after an interruption goes on,
and --minutes bounds a session. The small disks are mounted in a namespace of their own, which needs
root; without it full and read-only disks become writes that fail.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.common import machine, record, table, verdict
from hfscale.checkpoint import layout
from tests.checkpoint.chaos import DAMAGE, FOLDERS, PHASES, RANKS, Chain, damaged, kill, load_each
from tests.helpers.forks import Forks

ENGINES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
KINDS = {
    "kill": 0.60,
    "full disk": 0.08,
    "read-only folder": 0.07,
    "a write fails": 0.05,
    "damage": 0.20,
}
DISK_MB = 96  # a save wants 64 MiB of room beside its tensors
INSIDE = "HFSCALE_CHAOS_INSIDE"  # environment variable: we are in the namespace already


def plan(cases: int, seed: int) -> list[tuple[str, int, str, bool]]:
    """Return (kind, stage, precision, async) of each case: the same for the same arguments, so that
    a session can go on.
    """
    kinds = [kind for kind, part in KINDS.items() for _ in range(round(part * cases))]
    kinds = (kinds + ["kill"] * cases)[:cases]
    random.Random(seed).shuffle(kinds)
    return [
        (kind, *ENGINES[number % len(ENGINES)], number // len(ENGINES) % 2 == 0)
        for number, kind in enumerate(kinds)
    ]


# -------------------------------------------------------------------------------- attacks on a save
@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A small file system of its own, where this process may mount one."""
    folder.mkdir()
    if os.environ.get(INSIDE):
        assert_done("mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder)
    yield folder
    if os.environ.get(INSIDE):
        assert_done("umount", "-l", folder)


def fill(place: Path) -> Callable[[], None]:
    """Take all the room there is on the disk ``place``, at once; return how to give it back."""
    filler = place / "filler"
    with open(filler, "wb") as file:
        while (
            room := os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        ):  # what a deletion frees meanwhile, too
            with suppress(OSError):  # the ranks were quicker
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), room)
    return filler.unlink


def read_only(place: Path) -> Callable[[], None]:
    """Make the disk ``place`` read-only, as soon as no file is open for writing; return how to undo
    it.
    """
    for attempt in range(1000):
        if (
            subprocess.run(["mount", "-o", "remount,ro", place], capture_output=True).returncode
            == 0
        ):
            break
        time.sleep(0.0005)
        assert attempt < 999, "it stays writable"
    return lambda: assert_done("mount", "-o", f"remount,rw,size={DISK_MB}m", place)


def assert_done(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True)


def limit(pids: list[int], rng: random.Random) -> None:
    """Let one rank's files not grow beyond a random size from now on."""
    resource.prlimit(
        rng.choice(pids), resource.RLIMIT_FSIZE, (rng.randrange(1, 60_000), resource.RLIM_INFINITY)
    )


class Slot:
    """One worker's ranks and runs: a chain for each engine, on the real disk and on a small one."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        home.mkdir()
        self.forks = stack.enter_context(Forks(home / "errors"))
        self.disk, self.home = stack.enter_context(disk(home / "disk")), home
        self.chains: dict[tuple[Any, ...], Chain] = {}

    def chain(self, kind: str, stage: int, precision: str, async_: bool) -> Chain:
        small = kind in ("full disk", "read-only folder")
        key = (small, stage, precision, async_)
        if key not in self.chains:
            folder = (
                (self.disk if small else self.home)
                / f"{stage}-{precision}-{async_}"
                / "checkpoints"
            )
            folder.parent.mkdir()
            self.chains[key] = Chain(self.forks, folder, stage, precision, async_)
            self.chains[key].measure()
        return self.chains[key]

    def attack(self, chain: Chain, kind: str, rng: random.Random) -> dict[str, Any]:
        """Return what one attack did and, of the start after it, what came of it."""
        undo: list[Callable[[], None]] = []

        def act(pids: list[int]) -> str:
            if kind == "kill":
                return f"kill, {kill(pids, rng)}"
            if kind == "a write fails" or not os.environ.get(INSIDE):
                limit(pids, rng)
                return "a write fails"
            undo.append((fill if kind == "full disk" else read_only)(self.disk))
            return kind

        case = chain.attacked(rng, act)
        loud = chain.gone()
        for back in undo:
            back()
        pids, came = chain.start()  # as it lies there
        kill(pids, rng)
        chain.gone()
        assert all(len(found) == 1 for found in chain.saved.values()), (
            "a step made twice was not made alike"
        )
        loud_enough = case["attack"].startswith("kill") or bool(loud)
        return {
            "kind": case["attack"],
            "phase": case["phase"],
            "said": loud[:300],
            "loud": loud_enough,
            **came,
            "silent": came["silent"] or case["before"]["silent"],
        }


# ------------------------------------------------------------------------------------------- damage
def damage(
    slot: Slot, chain: Chain, cases: list[int], seed: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield what became of ``cases`` damaged copies of a run of three checkpoints, loaded by the
    same ranks one after the other.
    """
    source = slot.home / f"source-{chain.stage}-{chain.precision}"
    origin = Chain(slot.forks, source, chain.stage, chain.precision, False)
    origin.run(steps=3)
    origin.gone()
    shutil.rmtree(slot.home / "copies", ignore_errors=True)
    copies, expected = [], []
    for case in cases:
        rng = random.Random(f"{seed}/{case}")
        copies.append(slot.home / "copies" / str(case))
        shutil.copytree(source, copies[-1])
        expected.append(damaged(copies[-1], rng, spare=int(rng.random() > 0.1)))
    slot.forks.start(load_each, RANKS, [str(copy) for copy in copies], chain.stage, chain.precision)
    slot.forks.gone()
    said = [words[1:] for words in slot.forks.said if words[0] == "case"]
    for case, copy, (good, done), (step, found) in zip(cases, copies, expected, said, strict=True):
        refused = step is None
        yield (
            case,
            {
                "kind": "damage",
                "done": done,
                "silent": not refused and origin.saved.get(step) != {found},
                "recovered": step == good if good else refused,
                "loud": bool(good) or "no checkpoint of this run is intact" in found,
                "none left": not good,
                "rejected": (copy / layout.REJECTED).exists(),
            },
        )
    shutil.rmtree(source)


# ----------------------------------------------------------------------------------------- sessions
def work(
    number: int,
    procs: int,
    todo: list[int],
    cases: list[tuple[str, int, str, bool]],
    ledger: Path,
    seed: int,
    until: float,
) -> None:
    """Judge every ``procs``-th case and write each to the ledger."""

    def judged(case: int, found: dict[str, Any]) -> None:
        line = json.dumps({"case": case, "engine": cases[case][1:], **found}) + "\n"
        with open(ledger, "ab", buffering=0) as file:
            file.write(line.encode())
        count = len(ledger.read_bytes().splitlines())
        print(f"\r{count} of {len(cases)} cases", end="", file=sys.stderr, flush=True)

    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        slot = Slot(home / "slot", stack)
        mine = todo[number::procs]
        for case in mine:
            kind, *engine = cases[case]
            if kind != "damage" and time.monotonic() < until:
                judged(
                    case,
                    slot.attack(slot.chain(kind, *engine), kind, random.Random(f"{seed}/{case}")),
                )
        for stage, precision in ENGINES:
            batch = [
                case
                for case in mine
                if cases[case][0] == "damage" and cases[case][1:3] == (stage, precision)
            ]
            if batch and time.monotonic() < until:
                for found in damage(
                    slot, Chain(slot.forks, home / "none", stage, precision, False), batch, seed
                ):
                    judged(*found)


def report(done: list[dict[str, Any]], cases: int) -> str:
    """Return the section of RESULTS.md."""
    rows: list[list[Any]] = []
    for kind in sorted({case["kind"] for case in done}):
        of = [case for case in done if case["kind"] == kind]
        rows.append(
            [
                kind,
                len(of),
                *(sum(case[what] for case in of) for what in ("silent", "recovered", "loud")),
            ]
        )
    rows.append(["**all**", *(sum(row[column] for row in rows) for column in range(1, 5))])
    silent, recovered, loud = rows[-1][2:]
    attacked = [case for case in done if "phase" in case]
    kinds = sorted({case["kind"] for case in attacked})
    hit = Counter((case["kind"], case["phase"]) for case in attacked)
    phases = [
        [name, *(hit[kind, name] for kind in kinds), sum(hit[kind, name] for kind in kinds)]
        for name in PHASES
    ]
    missed = [name for name, *_, count in phases if not count]
    by_file = Counter(what.split(":")[0] for case in done for what in case.get("done", []))
    to_files = ", ".join(
        f"{name} {count}" for name, count in sorted(by_file.items()) if name != "folder"
    )
    nothing_left = sum(case.get("none left", False) for case in done)
    return "\n\n".join(
        [
            f"{machine('torch', 'deepspeed')} {len(done):,} of {cases:,} cases: two CPU ranks, "
            "ZeRO 0 to 3, fp32 and bf16, async and not.",
            table(
                ["attack", "cases", "silent loads", "automatic recoveries", "said what happened"],
                rows,
            ),
            f"Silent loads: {silent}, {verdict(silent, at_most=0)}. Automatic recoveries: "
            f"{recovered:,}, "
            f"{verdict(recovered, at_least=len(done))}. Failures that were said (of a kill "
            f"there is nothing to say): {loud:,}, "
            f"{verdict(loud, at_least=len(done))}. "
            f"In {nothing_left} cases of damage no checkpoint was left whole: there a recovery "
            "is to refuse.",
            "How far the save had come when it was attacked, at moments uniform over its duration:",
            table(["phase", *kinds, "all"], phases),
            f"Phases not hit: {', '.join(missed) or 'none'}. Checkpoints damaged: "
            f"{by_file.total()}, in one of {len(DAMAGE)} ways a file "
            f"({to_files}), in one of {len(FOLDERS)} the folder ({by_file['folder']}).",
        ]
    )


def main() -> None:
    """Attack, judge, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument(
        "--procs",
        type=int,
        default=max(1, len(os.sched_getaffinity(0)) // 2),
        help="workers; each has two ranks",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=25.0,
        help="no case begins after that; the same command goes on",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ledger", type=Path, default=None)
    options = parser.parse_args()
    if os.geteuid() == 0 and not os.environ.get(INSIDE):
        os.environ[INSIDE] = "1"
        again = [sys.executable, "-m", "benchmarks.chaos_checkpoints", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", *again])
    ledger = (
        options.ledger
        or Path(tempfile.gettempdir()) / f"hfscale-chaos-{options.cases}-{options.seed}.jsonl"
    )
    known = (
        [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    )
    cases, until = plan(options.cases, options.seed), time.monotonic() + options.minutes * 60
    todo = sorted(set(range(len(cases))) - {case["case"] for case in known})
    workers = [
        multiprocessing.Process(
            target=work, args=(number, options.procs, todo, cases, ledger, options.seed, until)
        )
        for number in range(options.procs)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    done = [json.loads(line) for line in ledger.read_text().splitlines()]
    print(file=sys.stderr)
    for case in done:
        if case["silent"] or not case["recovered"] or not case["loud"]:
            print(f"NOT AS IT SHOULD BE: {case}", file=sys.stderr)
    record("chaos_checkpoints", report(done, len(cases)))
    if len(done) == len(cases):
        ledger.unlink()
    sys.exit(any(worker.exitcode for worker in workers))


if __name__ == "__main__":
    main()
