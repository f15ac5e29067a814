"""What a rehearsal has shown: a line for each thing that was done, from what the ranks have
written, and whether all is well.

It is a function of the folder: the ranks of the last attempt judge, and so can whoever submitted
the job, if they never came so far.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from hfscale import run_files
from hfscale.checks.table import BY_NAME, Check, of_depth
from hfscale.errors import EXIT_HUNG, EXIT_STOPPED
from hfscale.monitor.fence import Fence, attempts
from hfscale.monitor.metrics_log import Logged
from hfscale.records import Record, load
from hfscale.rehearsal import plan as planned
from hfscale.rehearsal.advice import advise, space
from hfscale.rehearsal.plan import Event, Place, Plan
from hfscale.reports.prove import TENSORS, Evidence, first_difference, observe
from hfscale.reports.status import records

State = Literal["ok", "warn", "fail", "missed", "left out"]
NEAR = 0.25  # of a loss: other ranks draw other dropout. That the rows are the same is exact
WIDTH = 20
WRONG = ("fail", "missed")
FAR = "the run did not come so far"
MEANT = {  # the code with which an attempt leaves
    planned.TIME_LIMIT: EXIT_STOPPED,
    planned.SIGNAL: EXIT_STOPPED,
    planned.STOP: EXIT_HUNG,
}


class Stage(Record):
    """What one thing has shown; ``remedy`` says what to do where it is not ok."""

    name: str
    state: State
    words: str
    remedy: str = ""


class Verdict(Record):
    """On a rehearsal."""

    passed: bool
    seconds: float
    stages: list[Stage]
    advice: list[str] = []

    def lines(self) -> Iterator[str]:
        """Yield it for people: what the run did not come to in one line."""
        far = [stage.name for stage in self.stages if stage.state == "missed"]
        for stage in self.stages:
            if stage.state == "missed":
                continue
            yield f"{stage.state:<9}{stage.name:<{WIDTH}}{stage.words}"
            if stage.remedy:
                yield f"{'':{9 + WIDTH}}-> {stage.remedy}"
        if far:
            yield f"{'missed':<9}{', '.join(far)}: {FAR}"
        yield from (f"{'advice':<9}{line}" for line in self.advice)
        wrong = [stage.state for stage in self.stages if stage.state in WRONG]
        end = "passed"
        if not self.passed:
            end = f"{wrong.count('fail')} went wrong"
            end += f", {wrong.count('missed')} were not reached" if "missed" in wrong else ""
        yield f"verdict: {end}, in {self.seconds:.0f} s"


@dataclass(frozen=True)
class Shown:
    """What lies in the folder of a rehearsal."""

    run_dir: Path
    plan: Plan
    events: Sequence[Event]
    records: Sequence[Logged]  # of the run
    attempts: Sequence[Fence]
    twin: Evidence
    ended: str  # how the job did, where its last attempt did not come to judge

    def events_of(self, what: str) -> list[Event]:
        return [one for one in self.events if one.what == what]

    def first(self, attempt: int) -> Logged | None:
        """Return the first step that an attempt logged."""
        return next((one for one in self.records if one["attempt"] == attempt), None)


def judge(run_dir: Path, *, ended: str = "") -> Verdict:
    """Return what the rehearsal in ``run_dir`` has shown so far; ``ended`` says how its job did, as
    far as whoever asks knows, where the ranks did not come to its end.
    """
    plan = planned.read_plan(run_dir)
    events = [*planned.events(run_dir)]
    twin = observe(run_dir.with_name(planned.TWIN))
    shown = Shown(run_dir, plan, events, [*records(run_dir)], attempts(run_dir), twin, ended)
    stages = [*_packages(shown)]
    for check in of_depth("run"):
        stages += _looked(check, shown)
    stages += [Stage(name=name, state="left out", words=why) for name, why in plan.left_out.items()]
    return Verdict(
        passed=all(stage.state not in WRONG for stage in stages),
        seconds=round(time.time() - plan.began, 1),
        stages=stages,
        advice=advise(run_dir, plan, events, shown.records),
    )


def _looked(check: Check, shown: Shown) -> Iterator[Stage]:
    """Yield what a check of depth `run` has shown, with its usual remedy where it has no other."""
    module, _, function = check.look.partition(":")
    stages: Iterator[Stage] = getattr(import_module(module), function)(shown, check.name)
    for stage in stages:
        needs_remedy = stage.state in ("fail", "warn") and not stage.remedy
        yield stage.model_copy(update={"remedy": check.remedy}) if needs_remedy else stage


def data(shown: Shown, name: str) -> Iterator[Stage]:
    """Yield what the shards are, which were looked at before anything started."""
    if looked := shown.plan.data:
        some = f"{looked.read:,} of {looked.shards:,} shards are"
        words = f"{some} what their manifests say, to the byte; all are as long"
        yield Stage(name=name, state="ok", words=words)


def _packages(shown: Shown) -> Iterator[Stage]:
    """Whether the Python of the ranks has the packages that hfscale was tested with."""
    for event in shown.events_of("packages")[-1:]:
        name = "packages"
        if event.code:
            remedy = BY_NAME[name].remedy
            yield Stage(name=name, state="fail", words=event.words, remedy=remedy)
        else:
            yield Stage(name=name, state="ok", words=event.words)


def end(shown: Shown, name: str) -> Iterator[Stage]:
    """Yield how the job ended, where its last attempt did not come to judge."""
    if shown.ended:
        remedy = f"see {_logs(shown)}"
        yield Stage(name=name, state="fail", words=shown.ended, remedy=remedy)


def start(shown: Shown, name: str) -> Iterator[Stage]:
    """Yield where the ranks are, and whether each has a GPU of its own."""
    plan = shown.plan
    seen = shown.events_of("ranks")
    if not seen:
        yield Stage(name=name, state="missed", words=FAR)
        return
    places = seen[-1].places
    nodes = list(dict.fromkeys(place.node for place in places))
    words = f"{len(places)} ranks on {', '.join(nodes)}, on {_devices(places)}"
    if len(places) != plan.ranks:
        words += f", not the {plan.ranks} that were asked for"
        yield Stage(name=name, state="fail", words=words)
    elif plan.gpus_per_node and any(place.device == "cpu" for place in places):
        words += f", though {plan.gpus_per_node} GPUs a node were asked for"
        remedy = "torch sees none: is it a build for CUDA? is the container started with --nv?"
        yield Stage(name=name, state="warn", words=words, remedy=remedy)
    else:
        doubts = list(_sharing(plan, places))
        yield from doubts or [Stage(name=name, state="ok", words=words)]


def _sharing(plan: Plan, places: Sequence[Place]) -> Iterator[Stage]:
    """Yield which nodes have ranks that share a GPU, or GPUs without a rank."""
    for node in dict.fromkeys(place.node for place in places):
        here = [place for place in places if place.node == node]
        own = {place.gpu for place in here if place.gpu}
        if own and len(own) < len(here):
            words = f"{len(here)} ranks share {len(own)} GPUs on {node}"
            remedy = "take --gpu-bind and --gpus-per-task out of cluster.sbatch and the script"
            yield Stage(name="start", state="fail", words=words, remedy=remedy)
        elif own and len(here) < plan.gpus_per_node:
            words = f"{plan.gpus_per_node - len(here)} GPUs of {node} stay idle"
            remedy = "leave --ntasks-per-node out, or say as many as there are GPUs"
            yield Stage(name="start", state="warn", words=words, remedy=remedy)


def _devices(places: Sequence[Place]) -> str:
    kinds = dict.fromkeys(place.device for place in places)
    return ", ".join("the CPU" if kind == "cpu" else kind for kind in kinds)


def _logs(shown: Shown) -> str:
    return str(shown.run_dir / run_files.LOGS)


# ------------------------------------------------------------------------------------------- faults
def fault(shown: Shown, name: str) -> Iterator[Stage]:
    """Yield what became of a run to which the fault ``name`` was done."""
    if name not in (one.name for one in shown.plan.faults):
        return
    done = {one.name: one for one in shown.events_of("fault")}
    late = [one for one in shown.events_of("warned") if one.name == name]
    if name in done:
        yield _fault(shown, done[name])
    elif late:
        words = f"no warning came {shown.plan.signal_s} s before it"
        yield Stage(name=name, state="fail", words=words)
    else:
        yield Stage(name=name, state="missed", words=FAR)


def _fault(shown: Shown, event: Event) -> Stage:
    """Return the stage of something that was done."""
    name = event.name
    one = Fence(shown.run_dir, event.attempt)
    end, after = one.ending(), shown.first(event.attempt + 1)
    if after is None:
        how = f"the attempt {end}" if end else "nobody knows how the attempt ended"
        words = f"after step {event.step} the run did not go on: {how}"
        remedy = f"does the script end with `scontrol requeue`? see {_logs(shown)}"
        return Stage(name=name, state="fail", words=words, remedy=remedy)
    last = max(one["step"] for one in shown.records if one["attempt"] == event.attempt)
    lost = last - int(after["step"]) + 1
    began = Fence(shown.run_dir, event.attempt + 1).owner()
    back_s = _first_step_at(shown, event.attempt + 1, began.at if began else 0.0) - event.time
    words = f"{_how(shown, event)}; back at step {after['step']} after {back_s:.0f} s"
    words += f", {lost} of {last} steps lost" if lost else ", nothing lost"
    code = end.code if end else None
    meant = MEANT.get(name)
    if (meant is not None and code != meant) or (meant is None and (code or 0) < 128):
        remedy = "the script must hand on the code of the ranks: compare it with slurm/train.sbatch"
        words += f"; left with code {code}"
        return Stage(name=name, state="fail", words=words, remedy=remedy)
    most = 0 if meant == EXIT_STOPPED else 2 * planned.SAVE_EVERY
    if lost > most:
        remedy = f"a save was not done in time: see {_logs(shown)}"
        return Stage(name=name, state="fail", words=words, remedy=remedy)
    return Stage(name=name, state="ok", words=words)


def _how(shown: Shown, event: Event) -> str:
    """What was done, and what the run did then."""
    if event.name == planned.TIME_LIMIT:
        return f"warned {event.seconds:.0f} s before the limit, saved"
    if event.name == planned.SIGNAL:
        return f"saved at step {event.step + 1}"
    if event.name == planned.KILL:
        return f"SIGKILL after step {event.step}"
    report = shown.run_dir / run_files.HANGS / str(event.attempt) / run_files.REPORT
    verdict = load(report, _Hang, what="the report of a hang").verdict if report.is_file() else ""
    return verdict or "no report says which rank"


class _Hang(Record):
    verdict: str


def _first_step_at(shown: Shown, attempt: int, began: float) -> float:
    """Return when an attempt had done its first step, as near as its figures tell."""
    noted = [one.time for one in shown.events_of("ranks") if one.attempt == attempt]
    first = shown.first(attempt)
    step_s = float(first["step_s"] or 0.0) if first else 0.0
    return (noted[-1] if noted else began) + step_s


# ------------------------------------------------------------------------------------------ numbers
def exact(shown: Shown, name: str) -> Iterator[Stage]:
    """Yield whether the run is its twin, bit for bit."""
    twin = shown.twin
    if not twin or not shown.events_of("twin"):
        yield Stage(name=name, state="missed", words=FAR)
        return
    ours = observe(shown.run_dir)
    for step, seen in ours.items():  # a save on request is of a step that the twin did not save
        if not set(TENSORS) & twin.get(step, {}).keys():
            ours[step] = {key: value for key, value in seen.items() if key in twin.get(step, {})}
    difference = first_difference(twin, ours)
    if difference:
        where = f"{difference['component']} of step {difference['step']}"
        words = f"not what an undisturbed run is: {where}"
        yield Stage(name=name, state="fail", words=words)
        return
    saved = sum(bool(set(TENSORS) & seen.keys()) for seen in twin.values())
    words = f"{len(twin)} steps and {saved} checkpoints as of an undisturbed run, bit for bit"
    yield Stage(name=name, state="ok", words=words)


def one_writer(shown: Shown, name: str) -> Iterator[Stage]:
    """Yield whether one attempt at a time wrote."""
    before = (0, 0)
    if not shown.records:
        yield Stage(name=name, state="missed", words=FAR)
    for one in shown.records:
        number, step = int(one["attempt"]), int(one["step"])
        if number < before[0] or (number == before[0] and step != before[1] + 1):
            words = f"step {step} of attempt {number} was logged after step {before[1]} of "
            words += f"attempt {before[0]}"
            yield Stage(name=name, state="fail", words=words)
            return
        before = number, step
    if shown.records:
        words = f"{len(shown.attempts)} attempts, one after the other"
        yield Stage(name=name, state="ok", words=words)


# ----------------------------------------------------------------------------------------- commands
def command(shown: Shown, name: str) -> Iterator[Stage]:
    """Yield how the command ``name`` ended, and what came of it."""
    if name not in (one.name for one in shown.plan.commands):
        return
    done = [one for one in shown.events_of("command") if one.name == name]
    if not done:
        yield Stage(name=name, state="missed", words=FAR)
        return
    event = done[-1]
    if event.code:
        words = f"exit code {event.code}: {_error_of(event.words)}"
        yield Stage(name=name, state="fail", words=words, remedy=f"see {_logs(shown)}")
    elif name == planned.OTHER_WORLD:
        yield _other_world(shown, seconds=event.seconds)
    else:
        yield Stage(name=name, state="ok", words=f"{_result(event)}, in {event.seconds:.0f} s")


def full_disk(shown: Shown, name: str) -> Iterator[Stage]:
    """Yield whether there is room for the checkpoints of the whole model."""
    yield Stage.model_validate({"name": name, **space(shown.run_dir, shown.plan)})


def _error_of(words: str) -> str:
    """Return what a command said was wrong, on one line."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    told = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return "; ".join(lines[told[-1] :] if told else lines[-1:])


def _result(event: Event) -> str:
    lines = event.words.splitlines()
    if event.name == planned.EXPORT:
        equal = [line.partition("; ")[2] for line in lines if "logits equal" in line]
        return equal[-1] if equal else "exported"
    scores = [" ".join(line.split()[:2]) for line in lines if line.startswith("  ")]
    return ", ".join(scores[:3])


def _other_world(shown: Shown, *, seconds: float) -> Stage:
    """Return whether other ranks took the same rows, and came to about the same losses."""
    name = planned.OTHER_WORLD
    other = [*records(shown.run_dir.with_name(planned.OTHER))]
    if not other:
        return Stage(name=name, state="fail", words="no step was done", remedy=_logs(shown))
    apart = 0.0
    for one in other:
        twins = shown.twin.get(one["step"], {})
        if twins.get("batch_digest") != [one["batch_digest"]]:
            words = f"step {one['step']} took other rows than it should"
            return Stage(name=name, state="fail", words=words)
        [loss] = twins["loss"]
        assert isinstance(loss, float)
        apart = max(apart, abs(one["loss"] - loss) / max(abs(loss), 1e-9))
    words = f"{len(other)} more steps from a checkpoint of {shown.plan.ranks} ranks: the same "
    words += f"rows, losses within {apart:.1e}, in {seconds:.0f} s"
    if apart <= NEAR:
        return Stage(name=name, state="ok", words=words)
    remedy = "dropout draws by rank: without it losses must agree"
    return Stage(name=name, state="warn", words=words, remedy=remedy)
