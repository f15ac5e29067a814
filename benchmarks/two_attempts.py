"""Two attempts forced into one run directory, as a node that Slurm has lost leaves them: what the
older one still writes.

    python -m benchmarks.two_attempts [--rounds 50] [--locks]

Each round a real attempt (the worker's own `run`, one gloo rank, a record a step, a save every
second step, no trial) trains; after a random time a younger one takes its number and trains on
beside it, without any guard. Counted are the records and the checkpoints that the older one wrote
after the younger one had begun, by the process that wrote them and the clock they share, and how
long the older one stayed. Every process is forked from one that has imported torch.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import yaml

from benchmarks.common import machine, record, spread, table, verdict
from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.monitor import fence
from tests.helpers.corpus import run_values

LAST_S = 120.0  # until an older attempt that stays is killed


def attempt(config: Path, number: int, log: Path) -> None:
    """Train as attempt ``number``, noting each append and each commit of this process as it is
    done: (clock, what).
    """
    from hfscale import worker
    from hfscale.checkpoint.manager import CheckpointManager
    from hfscale.monitor.metrics_log import MetricsLog
    from hfscale.run import live

    for name in (1, 2):
        os.dup2(os.open(log.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), name)
    os.environ |= {"HFSCALE_ATTEMPT": str(number), "OMP_NUM_THREADS": "1"}
    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(what: str, do):  # type: ignore[no-untyped-def]
        def run(*arguments, **named):  # type: ignore[no-untyped-def]
            result = do(*arguments, **named)
            os.write(notes, f"{time.monotonic()} {what}\n".encode())
            return result

        return run

    MetricsLog.write = noted("record", MetricsLog.write)  # type: ignore[method-assign]
    committed = noted("commit", CheckpointManager._commit)
    CheckpointManager._commit = committed  # type: ignore[method-assign]
    sys.argv = ["hfscale.worker", str(config)]
    live.try_out = lambda trainer, config: None  # not what is measured
    commit = CheckpointManager._commit

    def tell_modules(*arguments, **named):  # type: ignore[no-untyped-def]
        commit(*arguments, **named)
        log.with_suffix(".modules").write_text("\n".join(sys.modules))

    if log.name == "younger":
        CheckpointManager._commit = tell_modules  # type: ignore[method-assign]
    worker.main()


def fork(*arguments: object) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            attempt(*arguments)  # type: ignore[arg-type]
        finally:
            os._exit(1)
    return pid


def written(log: Path) -> list[tuple[float, str]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [(float(line.split()[0]), line.split()[1]) for line in lines]


def under_way(log: Path) -> bool:
    """Return whether an attempt has trained and saved."""
    done = [what for _, what in written(log)]
    return done.count("record") >= 3 and done[done.index("record") :].count("commit") >= 1


def wait_until(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + LAST_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


def one_round(corpus: Path, home: Path, random_s: float) -> tuple[int, int, float, int, int]:
    """Return records and commits of the older attempt after the younger began, how long it stayed,
    its exit code, steps of the younger.
    """
    values = run_values(
        corpus,
        home,
        "run",
        train={"steps": 100_000, "global_batch": 2, "micro_batch": 2, "hang_timeout_s": None},
        checkpoint={"every_steps": 2, "every_minutes": None, "keep_last": 2},
        metrics={"every_steps": 1, "tensorboard": False},
    )
    run = home / "run"
    run.mkdir(parents=True)
    config = run / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    older, logs = fence.take(run), [home / "older", home / "younger"]
    pids = [fork(config, older.number, logs[0])]
    wait_until(lambda: under_way(logs[0]))
    time.sleep(random_s)
    younger = fence.take(run)
    began = time.monotonic()
    pids.append(fork(config, younger.number, logs[1]))
    code = None
    while code is None and time.monotonic() < began + LAST_S:
        pid, status = os.waitpid(pids[0], os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if pid else None
        time.sleep(0.002)
    stayed_s = time.monotonic() - began
    wait_until(lambda: under_way(logs[1]))
    for pid in pids[1:] if code is not None else pids:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    late = [what for at, what in written(logs[0]) if at > began]
    of_younger = [what for _, what in written(logs[1])]
    assert not (run / run_files.CHECKPOINTS / layout.REJECTED).exists(), "the two met"
    return (
        late.count("record"),
        late.count("commit"),
        stayed_s,
        -1 if code is None else code,
        of_younger.count("record"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    home = Path(tempfile.mkdtemp(prefix="two-attempts-"))
    corpus, dice = home / "corpus", random.Random(0)
    make = (
        "from pathlib import Path; from tests.helpers.corpus import make_corpus; "
        f"make_corpus(Path({str(corpus)!r}))"
    )
    subprocess.run(
        [sys.executable, "-c", make], check=True
    )  # its threads must not be there at a fork
    results = []
    for number in range(rounds):
        place = home / str(number)
        results.append(one_round(corpus, place, dice.uniform(0, 0.5)))
        if results[-1][4] == 0:
            print((place / "younger.out").read_text()[-3000:], file=sys.stderr)
        names = place / "younger.modules"
        for name in names.read_text().splitlines() if names.exists() and not number else ():
            if name.startswith(("hfscale.", "torch.", "transformers.", "deepspeed.", "pydantic.")):
                with suppress(Exception):  # what forks imported, all later ones have from here
                    import_module(name)
        shutil.rmtree(place)
        print(number + 1, results[-1], file=sys.stderr, flush=True)
    records, commits, stayed, codes, steps = zip(*results, strict=True)
    rows = [
        ["rounds", rounds, ""],
        [
            "records of the older one after the younger began",
            sum(records),
            verdict(sum(records), at_most=0),
        ],
        ["checkpoints of the older one after that", sum(commits), verdict(sum(commits), at_most=0)],
        ["exit code of the older one", ", ".join(map(str, sorted(set(codes)))), "77 wanted"],
        ["s that the older one stayed", spread(stayed), ""],
        ["records of the younger one, until it has saved", sum(steps), ""],
    ]
    body = table(["", "", ""], rows)
    print(body)
    if rounds >= 50:
        record("two_attempts", f"{machine('torch', 'deepspeed')}\n\n{body}")


if __name__ == "__main__":
    main()
