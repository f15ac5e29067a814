"""`hfscale plan`: what a config takes before anything runs, as one record that text, JSON and
explanations are printed from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hfscale.config.schema import TrainConfig
from hfscale.monitor.clock import duration
from hfscale.planning.advice import Choice, best_by_stage, choice, config_lines, recommended
from hfscale.planning.corrections import MEMORY, SAVE, STEP, corrections
from hfscale.planning.figures import GIB, Figure, count, size
from hfscale.planning.memory import shared_memory
from hfscale.planning.saving import SPARE, Save, save
from hfscale.planning.site import Asked, Site, site_of
from hfscale.planning.subject import Subject

CHINCHILLA = 20  # tokens a parameter (Hoffmann et al. 2022, table 3)
LOGGED_BYTES = 4000  # of a logged step, with its details and pictures: as seen in runs


@dataclass(frozen=True)
class Section:
    """Figures under one heading; the first may be the sum of the others."""

    title: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class StageRow:
    """The best way to train at one stage, as a line of a table."""

    stage: int
    offload: str
    checkpointing: bool
    micro_batch: int
    accumulation: int
    peak_bytes: float
    host_bytes: float  # of a node
    step_s: float
    tokens_per_s: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """All that a plan says."""

    name: str
    place: str
    fits: bool
    sections: tuple[Section, ...]
    stages: tuple[StageRow, ...]
    advice: tuple[str, ...]
    assumed: tuple[str, ...]
    setup: dict[str, str | int | float | bool]  # that memory and speed depend on

    @property
    def peak(self) -> float:
        """The most bytes of a rank."""
        return self.figure("memory a rank", "peak a rank").value

    @property
    def step_s(self) -> float:
        """How long a step takes."""
        return self.figure("a step", "step").value

    @property
    def save_s(self) -> float:
        """How long a save takes, from its begin to its commit."""
        return self.figure("a save", "save").value

    def figure(self, title: str, name: str) -> Figure:
        """Return one figure of the section whose title begins so."""
        section = next(one for one in self.sections if one.title.startswith(title))
        return next(one for one in section.figures if one.name == name)

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def text(self, *, explain: bool = False) -> str:
        """Return all of it for people; with ``explain`` each figure says how it comes about."""
        verdict = "fits" if self.fits else "does not fit"
        lines = [f"{self.name} on {self.place}: {verdict}"]
        for section in self.sections:
            lines += ["", section.title, *_lines(section.figures, explain)]
        lines += ["", "the best at each ZeRO stage", *_table(self.stages)]
        lines += ["", *self.advice]
        if self.assumed:
            lines += ["", "assumed", *(f"  {line}" for line in self.assumed)]
        return "\n".join(lines)


def _lines(figures: Sequence[Figure], explain: bool) -> Iterator[str]:
    width = max(len(one.name) for one in figures)
    for one in figures:
        yield f"  {one.name:<{width}}  {one}" + (f"  = {one.how}" if explain else "")


def _table(rows: Sequence[StageRow]) -> list[str]:
    lines = ["  stage  offload     checkpointing  micro-batch  peak a rank  host a node  tokens/s"]
    for one in rows:
        tokens = count(one.tokens_per_s) if one.fits else "does not fit"
        lines.append(
            f"  {one.stage:<7}{one.offload:<12}{'yes' if one.checkpointing else 'no':<15}"
            f"{one.micro_batch:<13}{size(one.peak_bytes):<13}{size(one.host_bytes):<13}{tokens}"
        )
    return lines


def make_plan(config: TrainConfig, asked: Asked) -> Plan:
    """Return the plan of ``config``.

    Raises:
        UserError: if its model cannot be built, or the place is not known well enough.
    """
    site = site_of(config, asked)
    subject = Subject(config, on_cpu=site.on_cpu)
    own = choice(subject, subject.setup(site.ranks, a_node=site.a_node), site)
    saving = save(own.setup, own.memory.saved, site)
    found = best_by_stage(subject, site)
    sections = [
        _model(subject),
        _memory(own, site),
        _host(own),
        _speed(own, on_cpu=subject.on_cpu),
        _save(saving, own, subject),
        _run(subject, own, saving, site),
    ]
    learnt = _learnt(config, own, saving, site) if asked.corrected else None
    if learnt:
        sections.append(learnt)
    assumed = [*subject.assumed, *site.assumed()]
    if site.on_cpu and not asked.gpu:
        assumed.append("no GPU here and none named: ranks on cores of this machine (--gpu h100)")
    whole = own.setup.micro_batch * own.setup.accumulation * site.ranks
    if whole != config.train.global_batch:
        assumed.append(
            f"train.global_batch={config.train.global_batch} cannot be cut so: {whole} was taken"
        )
    return Plan(
        config.run.name,
        _place(site),
        own.fits,
        tuple(sections),
        tuple(map(_row, found)),
        (
            *_advice(own, found, subject),
            *_warned(learnt, site),
            *_saves_in_time(saving, own, subject, learnt),
        ),
        tuple(assumed),
        {key: value for key, value in asdict(own.setup).items() if key != "zero"},
    )


def _place(site: Site) -> str:
    on = f" on {site.nodes} nodes" if site.nodes > 1 else ""
    return f"{site.ranks} x {site.device.name} ({site.memory_bytes / GIB:.1f} GiB each){on}"


def _row(one: Choice) -> StageRow:
    setup = one.setup
    return StageRow(
        setup.stage,
        setup.offload,
        setup.checkpointing,
        setup.micro_batch,
        setup.accumulation,
        one.memory.peak.value,
        one.memory.on_host.value,
        one.speed.step.value,
        one.speed.tokens_per_s.value,
        one.fits,
    )


def _model(subject: Subject) -> Section:
    weights = subject.weights
    parts = [
        Figure(name, number, "", "weights whose names say so")
        for name, number in weights.parts.items()
    ]
    everything = weights.trained + weights.frozen
    how = " + ".join(f"{one.name} {count(one.value)}" for one in parts)
    flops = "2 a weight forward, 4 backward where it is trained, and attention: models/flops.py"
    return Section(
        "model",
        (
            Figure("parameters", everything, "", how),
            Figure("trained", weights.trained, "", "those with a gradient"),
            *(replace(one, name=f"  {one.name}") for one in parts),
            Figure("flops a token", subject.flops_per_token, "", flops),
        ),
    )


def _memory(own: Choice, site: Site) -> Section:
    setup = own.setup
    how = f"{setup.precision}, stage {setup.stage}"
    room = Figure("memory of a device", site.memory_bytes, "bytes", site.device.name)
    moments = [replace(one, name=f"tensors at: {one.name}") for one in own.memory.moments]
    peak = own.memory.peak
    return Section(
        f"memory a rank ({how}, micro-batch {setup.micro_batch})",
        (peak, *(replace(one, name=f"  {one.name}") for one in own.memory.parts), *moments, room),
    )


def _host(own: Choice) -> Section:
    host = own.memory.on_host
    parts = (replace(one, name=f"  {one.name}") for one in own.memory.host)
    return Section("a node beside its devices", (host, *parts, shared_memory(own.setup)))


def _speed(own: Choice, *, on_cpu: bool) -> Section:
    fast = own.speed
    parts = (replace(one, name=f"  {one.name}") for one in fast.parts)
    of_peak = () if on_cpu else (fast.mfu,)  # of a CPU no peak is known
    return Section("a step", (fast.step, *parts, fast.tokens_per_s, *of_peak))


def _save(saving: Save, own: Choice, subject: Subject) -> Section:
    parts = (replace(one, name=f"  {one.name}") for one in (saving.copy, saving.writing))
    after = saving.after_warning(own.speed.step, saving.whole)
    signal_s = float(subject.config.cluster.signal_s)
    warned = Figure("warned before a limit", signal_s, "s", "cluster.signal_s, in a job of Slurm")
    return Section("a save", (saving.whole, *parts, saving.stall, after, warned))


def _run(subject: Subject, own: Choice, saving: Save, site: Site) -> Section:
    config, weights = subject.config, subject.weights
    saved = own.memory.saved.value * own.setup.ranks
    kept = config.checkpoint.keep_last + 1 + (1 if config.checkpoint.keep_best else 0)
    names = f"{config.checkpoint.keep_last} kept, one in the making"
    figures = [
        Figure("a checkpoint", saved, "bytes", own.memory.saved.how + " x ranks"),
    ]
    length = subject.length
    forever = 0
    if length is not None and config.checkpoint.keep_every_steps:
        forever = length.steps // config.checkpoint.keep_every_steps
        names += f", {forever} for good"
    how = f"{size(saved)} x ({names}{', the best' if config.checkpoint.keep_best else ''})"
    figures.append(Figure("disk for checkpoints", saved * (kept + forever), "bytes", how))
    if length is None:
        return Section("the run", tuple(figures))
    steps = length.steps
    computing = steps * own.speed.step.value
    saves = _saves(subject, computing, steps)
    seconds = computing + saves * saving.stall.value
    tokens = steps * own.speed.tokens
    logged = steps / config.metrics.every_steps * LOGGED_BYTES
    a_weight = tokens / (weights.trained + weights.frozen)
    figures += [
        Figure(
            "disk for logs",
            logged,
            "bytes",
            f"{steps:,} steps / {config.metrics.every_steps} x {LOGGED_BYTES} bytes",
        ),
        Figure("steps", steps, "", "as train says"),
        Figure("tokens", tokens, "", f"{steps:,} steps x {count(own.speed.tokens)}"),
        Figure(
            "tokens a parameter",
            a_weight,
            "",
            f"{count(tokens)} / {count(weights.trained + weights.frozen)}; {CHINCHILLA} is "
            "Chinchilla's rule",
        ),
        Figure(
            "time",
            seconds,
            "s",
            f"{steps:,} steps x {own.speed.step.value:.4g} s + {saves:,} saves x "
            f"{saving.stall.value:.3g} s that training waits",
        ),
        Figure(
            "device hours",
            seconds / 3600 * site.ranks,
            "h",
            f"{duration(seconds)} x {site.ranks}",
        ),
    ]
    return Section("the run", tuple(figures))


def _saves(subject: Subject, computing_s: float, steps: int) -> int:
    """Return how many saves a run makes, with its last."""
    config = subject.config.checkpoint
    every = [steps // one for one in (config.every_steps, config.keep_every_steps) if one]
    if config.every_minutes:
        every.append(int(computing_s / 60 / config.every_minutes))
    return 1 + max(every, default=0)


def _learnt(config: TrainConfig, own: Choice, saving: Save, site: Site) -> Section | None:
    """Return what the checked runs of the same root say that this one will take."""
    root = Path(config.run.root)
    known = corrections(root, device=site.device.key, measured=site.measured is not None)
    planned = {MEMORY: own.memory.peak, STEP: own.speed.step, SAVE: saving.whole}
    figures = [known[name].apply(figure) for name, figure in planned.items() if name in known]
    return Section(f"as checked runs of {root} went", tuple(figures)) if figures else None


def _warned(learnt: Section | None, site: Site) -> Iterator[str]:
    for figure in learnt.figures if learnt else ():
        if figure.unit == "bytes" and figure.value > site.memory_bytes:
            yield f"as checked runs here went, it takes {figure}: more than there is"


def _saves_in_time(
    saving: Save, own: Choice, subject: Subject, learnt: Section | None
) -> Iterator[str]:
    """Yield what is wrong with when it saves: too late for a warning, or too often."""
    known = {one.name: one for one in learnt.figures} if learnt else {}
    step, whole = known.get("step", own.speed.step), known.get("save", saving.whole)
    after, signal_s = saving.after_warning(step, whole), subject.config.cluster.signal_s
    if after.value > signal_s:
        yield (
            f"cluster.signal_s={math.ceil(SPARE * after.value)}: a job of Slurm is warned "
            f"{signal_s} s before its limit, and takes up to {after} to save ({after.how})"
        )
    config = subject.config.checkpoint
    between = (config.every_steps or math.inf) * step.value
    between = min(between, 60 * (config.every_minutes or math.inf))
    if saving.asynchronous and between < whole.value:
        yield (
            f"a save takes {whole}, and the next comes after {Figure('', between, 's', '')}: "
            "training waits for the one before. Save less often (checkpoint.every_steps, "
            "every_minutes)"
        )


def _advice(own: Choice, found: Sequence[Choice], subject: Subject) -> Iterator[str]:
    best = recommended(found)
    if best is None:
        least = min(found, key=lambda one: one.memory.peak.value)
        yield (
            f"nothing fits: one row at stage {least.setup.stage} with checkpointing takes "
            f"{least.memory.peak} a rank. More GPUs, larger ones, a shorter data.seq_len or a "
            "smaller model"
        )
        return
    gain = best.speed.tokens_per_s.value / own.speed.tokens_per_s.value
    if own.fits and gain < 1.05:
        yield "the config is as good as any that was tried"
        return
    times = f", {gain:.2f} x as fast as the config" if own.fits else ", where the config does not"
    yield (
        f"recommended (fits in {best.memory.peak}, {count(best.speed.tokens_per_s.value)} "
        f"tokens/s{times}):"
    )
    yield from (f"  {line}" for line in config_lines(best, subject))
