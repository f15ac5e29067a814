"""What the ranks of a rehearsal do: they train, what the plan says happens to them, and those of
the last attempt go on with what a user does with a run.

    the run        12 steps, in as many attempts as there are faults, and one more
    its twin       the same steps, by the same ranks, undisturbed
    commands       by rank 0: on with another number of ranks, evaluate, export
    the verdict    by rank 0, from what all these have written
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.checks.machine import look_at_packages
from hfscale.config.load import to_yaml
from hfscale.config.schema import TrainConfig
from hfscale.dist import group
from hfscale.dist.agree import from_all_ranks
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import World, node_name, without_place
from hfscale.jobs.train import train
from hfscale.log import logger
from hfscale.monitor.heartbeat import beat, watching
from hfscale.monitor.phases import PHASES, START
from hfscale.rehearsal import plan as planned
from hfscale.rehearsal.faults import Faults, done_faults
from hfscale.rehearsal.plan import Command, Journal, Place
from hfscale.rehearsal.verdict import judge
from hfscale.shards.files import write_atomically

WRITTEN_BYTES = 64 * 2**20  # by each rank at once, to see how fast a disk is
COMMAND_S, POLL_S = 600.0, 0.2
AGAIN = ".again-{}"  # of an attempt: its ranks leave together, to be started again
TAIL_LINES = 12
LONG = "save"  # a phase in which half an hour is no hang


def run(config: TrainConfig, world: World, stop: StopRequest) -> bool:
    """Return True when all is done, False when stopped on request and saved."""
    PHASES.enter(START + "group")
    device = group.start(world)
    run_dir, lead = config.run_dir, world.all.rank == 0
    plan = planned.read_plan(run_dir)
    done = done_faults(run_dir)
    journal = Journal(run_dir, attempt=world.attempt) if lead else None
    places = from_all_ranks(_place(device).as_dict())
    if journal:
        journal.note("ranks", places=places)
        found = look_at_packages()
        journal.note("packages", words=found.said, code=int(found.state == "fail"))
    if len(places) != plan.ranks:  # this is not the job that was to be rehearsed
        group.shutdown()
        if journal:
            _judge(run_dir)
        return True
    faults = Faults(plan, done, run_dir=run_dir, world=world, stop=stop, journal=journal)
    if not train(config, world, stop, device=device, watched_by=[faults]):
        group.shutdown()
        return False
    beat(LONG)
    whole = _twin(config, world, stop, device=device, journal=journal)
    if whole:
        _write(run_dir, world, journal)
    group.shutdown()
    if not whole:
        return False
    again = run_dir / AGAIN.format(world.attempt)
    if journal is None:
        return _wait_for_verdict(run_dir, again)
    for command in plan.commands:
        if _command(command, run_dir, journal, stop) and stop.requested:
            again.touch()  # the time limit is near: the next attempt goes on behind this command
            return False
    _judge(run_dir)
    return True


def _place(device: torch.device) -> Place:
    on_gpu = device.type == "cuda"
    facts = torch.cuda.get_device_properties(device) if on_gpu else None
    return Place(
        node=node_name(),
        device=facts.name if facts else "cpu",
        gpu=str(getattr(facts, "uuid", device.index)) if facts else "",
        gpus=torch.cuda.device_count(),
    )


def _twin(
    config: TrainConfig,
    world: World,
    stop: StopRequest,
    *,
    device: torch.device,
    journal: Journal | None,
) -> bool:
    """Return whether the undisturbed twin is done: by the same ranks, in a folder beside."""
    began = time.monotonic()
    named = config.run.model_copy(update={"name": planned.TWIN})
    twin = config.model_copy(update={"run": named})
    if journal:
        twin.run_dir.mkdir(exist_ok=True)
        write_atomically(twin.run_dir / run_files.CONFIG, to_yaml(twin).encode())
    group.barrier()
    with watching(
        twin.run_dir,
        rank=world.all.rank,
        ranks=world.all.size,
        node=node_name(),
        timeout_s=config.train.hang_timeout_s,
        on_hang=lambda rank: None,
    ):
        done = train(twin, world, stop, device=device)
    if done and journal:
        journal.note("twin", seconds=time.monotonic() - began)
    return done


def _write(run_dir: Path, world: World, journal: Journal | None) -> None:
    """Note how fast all ranks write at once, as they do when they save. Collective."""
    file = run_dir / f".written-{world.all.rank}"
    block = os.urandom(2**20)
    group.barrier()
    began = time.monotonic()
    try:
        with open(file, "wb") as out:
            for _ in range(WRITTEN_BYTES // len(block)):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
    finally:
        file.unlink(missing_ok=True)
    group.barrier()
    if journal:
        seconds = time.monotonic() - began
        journal.note("writing", seconds=seconds, bytes=WRITTEN_BYTES * world.all.size)


def _command(command: Command, run_dir: Path, journal: Journal, stop: StopRequest) -> bool:
    """Return whether a command had not been run: what a user would, in a process of its own. How it
    ended is noted. One that Slurm's warning has ended, which reaches every process of a job, is run
    again: there is time for it.
    """
    if any((one.what, one.name) == ("command", command.name) for one in planned.events(run_dir)):
        return False
    beat(LONG)
    began, warned = time.monotonic(), stop.requested
    code, words = _run(command, run_dir)
    if code and stop.requested and not warned:
        code, words = _run(command, run_dir)
    seconds = time.monotonic() - began
    journal.note("command", name=command.name, code=code, words=words, seconds=seconds)
    return True


def _run(command: Command, run_dir: Path) -> tuple[int, str]:
    """Return the code of a command, and its last lines."""
    if command.name == planned.OTHER_WORLD:
        fork(run_dir, run_dir.parent / planned.OTHER)
    if command.name == planned.EXPORT:  # of a first try
        shutil.rmtree(run_dir.parent / planned.EXPORTED, ignore_errors=True)
    log = run_dir / run_files.LOGS / f"{command.name.replace(' ', '-')}.log"
    with open(log, "wb") as out:
        try:
            code = subprocess.run(
                [sys.executable, *command.words],
                env=without_place(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=COMMAND_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    return code, "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def fork(run_dir: Path, other: Path) -> None:
    """Make ``other`` a run that stands where ``run_dir`` did some steps before its end."""
    shutil.rmtree(other, ignore_errors=True)
    saved = layout.committed(run_dir / run_files.CHECKPOINTS)
    [before, *_] = [one for one in reversed(saved) if layout.step_of(one) < planned.STEPS]
    shutil.copytree(before, other / run_files.CHECKPOINTS / before.name)
    shutil.copy(run_dir / run_files.CONFIG, other / run_files.CONFIG)
    for name in (run_files.DATA, run_files.TOKENIZER):  # what a run was begun with
        if (run_dir / name).is_dir():
            shutil.copytree(run_dir / name, other / name)


def _judge(run_dir: Path) -> None:
    """Write the verdict, and say it."""
    verdict = judge(run_dir)
    for line in verdict.lines():
        logger.info(line)
    content = json.dumps(verdict.as_dict(), indent=1, ensure_ascii=False)
    write_atomically(run_dir / run_files.VERDICT, content.encode())


def _wait_for_verdict(run_dir: Path, again: Path) -> bool:
    """Return whether rank 0 has judged, or False where it leaves to be started again: a site may
    end ranks soon after the first one has left.
    """
    while not (run_dir / run_files.VERDICT).exists():
        if again.exists():
            return False
        beat(LONG)
        with suppress(OSError):
            os.stat(run_dir)  # NFS looks anew
        time.sleep(POLL_S)
    return True
