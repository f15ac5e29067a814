"""`hfscale prove`: what a run promises, tried on your own config, data and machine.

    resume  a short run is killed, resumed, and compared with a twin that nobody disturbed
    engine  the gradient of the live engine is held against plain autograd

By ordinary runs, in processes of their own and in a new folder beside the run that the config
names.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Optional

import typer

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.config.load import COMMAND_LINE, Loaded
from hfscale.config.schema import TrainConfig
from hfscale.errors import CheckpointError, ConfigError
from hfscale.log import logger
from hfscale.reports.status import last_record, records
from hfscale.shards.files import write_atomically
from launch import run_dir
from launch.interpreter import python
from launch.request import Request

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    help="Prove on your own config, data and machine what a run promises.",
)
TRIES = 5  # a short run may be done before it is killed


Config = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help="A YAML file, or a run directory, which is not touched."),
]
Overrides = Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...")]
Procs = Annotated[
    Optional[int], typer.Option(min=1, help="Ranks. Without it: one a GPU, or 2 on the CPU.")
]
Kills = Annotated[int, typer.Option(min=1, help="How often the run is killed.")]
Seed = Annotated[int, typer.Option(help="Decides when is killed, and whether one rank or all.")]
Out = Annotated[
    Optional[Path], typer.Option(help="Where the certificate goes. Without it: beside the run.")
]


@app.callback()
def _prove() -> None: ...


@app.command(
    epilog="Example: hfscale prove resume configs/pretrain/quickstart.yaml --procs 2 --kills 3"
)
def resume(
    config: Config,
    overrides: Overrides = None,
    procs: Procs = None,
    kills: Kills = 1,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Kill -9 a short run of CONFIG at random moments, start it again each time, and compare it
    with an undisturbed twin, bit for bit.

    Exit code 0: equal, the runs are removed and the certificate stays. 1: not equal, the
    certificate names the first difference.
    """
    from hfscale.reports.prove import first_difference, observe

    if out and out.exists():
        raise ConfigError(
            "this file exists already; nothing was run",
            where="--out",
            value=out,
            remedy="name another file, or move it",
        )
    rng = random.Random(seed)
    wanted = Request(config, tuple(overrides or ())).load()
    moments, ours = _plan(wanted, kills=kills, rng=rng)
    root = wanted.config.run.root
    root.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix=f"{wanted.config.run.name}-prove-", dir=root))
    out = out or home.with_name(f"{home.name}.json")
    asked = [*(overrides or ()), *ours, f"run.root={home}"]
    if procs:
        asked += ["--procs", str(procs)]
    command = python("launch.cli", "pretrain", config, *asked)
    twin, run = home / "twin", home / "killed"
    logger.info(f"1 of 2: a twin that nobody disturbs, with {' '.join(ours)}")
    _finish([*command, "run.name=twin"], twin)
    logger.info("2 of 2: the same command, killed and started again")
    killed = _killed([*command, "run.name=killed"], run, moments=moments, rng=rng)
    evidence = observe(twin)
    difference = first_difference(evidence, observe(run))
    _certify(
        out,
        verdict="different" if difference else "equal",
        first_difference=difference,
        seed=seed,
        command=command,
        kills=killed,
        steps=evidence,
        made=run_dir.attempts(twin)[0],
    )
    verdict = f"DIFFERENT: {difference}; both runs are kept in {home}"
    if not difference:
        shutil.rmtree(home)
        verdict = "equal, bit for bit"
    logger.info(f"{verdict}; certificate: {out}")
    raise typer.Exit(1 if difference else 0)


@app.command(epilog="Example: hfscale prove engine configs/pretrain/quickstart.yaml --procs 2")
def engine(config: Config, overrides: Overrides = None, procs: Procs = None) -> None:
    """Start CONFIG in a folder of its own, and hold the gradient of its live engine against plain
    autograd of the same rows through the same weights: ZeRO stage, precision, options, ranks and
    accumulation as they are.

    Every start does this by itself (engine.prove). Exit code 0: they agree. 1: they do not.
    """
    wanted = Request(config, tuple(overrides or ())).load()
    root = wanted.config.run.root
    root.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix=f"{wanted.config.run.name}-prove-", dir=root))
    ours = {
        "run.root": home,
        "run.name": "engine",
        "train.steps": 1,
        "train.epochs": "null",
        "train.tokens": "null",
        "engine.prove": "true",
        "metrics.tensorboard": "false",
    }
    asked = [*(overrides or ()), *(f"{key}={value}" for key, value in ours.items())]
    if procs:
        asked += ["--procs", str(procs)]
    try:
        code = subprocess.run(python("launch.cli", wanted.config.verb, config, *asked)).returncode
        from hfscale.run.gradient_proof import proof_of  # slow to import

        proof = proof_of(home / "engine")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if proof is None and code == 0:
        logger.warning("nothing was compared; the log above says why")
    if proof:
        typer.echo("\n".join(proof.lines()))
    raise typer.Exit(1 if proof and code else code)


def _certify(out: Path, **certificate: object) -> None:
    """Write what was seen."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(certificate, indent=1, ensure_ascii=False).encode())


def _killed(
    command: Sequence[str], run: Path, *, moments: Sequence[int], rng: random.Random
) -> list[dict[str, object]]:
    """Return what was killed and from where the run went on then, once ``command`` was killed after
    each of the steps ``moments``, and has finished.

    Raises:
        ConfigError: if, each time, the run was done before it could be killed.
    """
    for _ in range(TRIES):
        kills = [
            _kill(command, run, attempt=attempt, step=step, rng=rng)
            for attempt, step in enumerate(moments, 1)
        ]
        _finish(command, run)
        # attempt -> the step that it began from
        resumed = {record["attempt"]: record["step"] - 1 for record in reversed([*records(run)])}
        if len(resumed) == len(moments) + 1:
            return [
                {**kill, "resumed_at_step": resumed.get(attempt)}
                for attempt, kill in enumerate(kills, 2)
            ]
        # it was done before it could be killed, so a start after that had nothing left to do
        shutil.rmtree(run)
    raise ConfigError(
        "each time, the run was done before it could be killed",
        where="train.steps",
        remedy="give it more steps",
    )


def _plan(
    wanted: Loaded[TrainConfig], *, kills: int, rng: random.Random
) -> tuple[list[int], list[str]]:
    """Return the steps after which to kill, and the overrides that make the run short, save often,
    keep all and log all.

    Raises:
        ConfigError: if what the command line says leaves no room for the kills.
    """
    steps, every = wanted.config.train.steps, wanted.config.checkpoint.every_steps
    if wanted.source("train.steps") != COMMAND_LINE or steps is None:
        steps = min(steps or 10**9, 6 * (kills + 1))
    if wanted.source("checkpoint.every_steps") != COMMAND_LINE:
        every = max(1, steps // (kills + 2))
    choice = range(every or steps, steps - 1)  # after the first save, and with something left to do
    if len(choice) < kills:
        raise ConfigError(
            f"too few steps to kill a run {kills} times between its first save and its end",
            where="train.steps",
            value=f"{steps} steps, saved every {every}",
            remedy="more steps, or checkpoint.every_steps=N for earlier saves",
        )
    ours = {
        "train.steps": steps,
        "train.epochs": "null",
        "train.tokens": "null",
        "checkpoint.every_steps": every,
        "checkpoint.keep_every_steps": every,
        "metrics.every_steps": 1,
        "metrics.tensorboard": "false",
    }
    return sorted(rng.sample(choice, kills)), [f"{key}={value}" for key, value in ours.items()]


def _finish(command: Sequence[str], run: Path) -> None:
    """Return when the run is done."""
    if code := subprocess.run(command).returncode:
        raise _failed(run, code)


def _kill(
    command: Sequence[str], run: Path, *, attempt: int, step: int, rng: random.Random
) -> dict[str, object]:
    """Return which process was killed at a random moment of the step after ``step``; nothing if the
    run was done before.
    """
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while (
                not layout.committed(run / run_files.CHECKPOINTS)
                or (now := last_record(run))["attempt"] < attempt
                or now["step"] < step
            ):
                if (code := process.poll()) is not None:
                    if code:
                        raise _failed(run, code)
                    return {}
                time.sleep(0.002)
            time.sleep(rng.uniform(0, now["step_s"]))
            victim = rng.choice([process.pid, *ranks_of(process.pid)])
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(victim, signal.SIGKILL)
            process.wait()  # a launcher that lives ends the other ranks
        finally:
            process.kill()  # and its ranks do not outlive it
    kill = {
        "process": "launcher and all ranks" if victim == process.pid else "one rank",
        "after_step": last_record(run)["step"],
    }
    logger.info(f"killed: {kill}")
    return kill


def ranks_of(launcher: int) -> list[int]:
    """Return the process ids of a local launcher's ranks, not of the other processes that it
    started (``tee``).
    """
    found = []
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        with suppress(OSError):  # it has just ended
            found += (
                [int(child)]
                if Request.worker.encode()
                in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                else []
            )
    return found


def _failed(run: Path, code: int) -> CheckpointError:
    return CheckpointError(
        "the run ended by itself, so nothing is proven",
        where=run,
        value=f"exit code {code}",
        remedy="its logs/ say why",
    )
