"""What `hfscale tune` looks for, one thing after another: each starts from what those before it
have chosen, and is decided by trials.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hfscale.config.schema import RunConfig
from hfscale.errors import CheckpointError, ConfigError
from hfscale.log import logger
from hfscale.run.run import Run
from hfscale.shards.manifest import TEXT
from hfscale.tuning import search
from hfscale.tuning.rates import Found, find, smoothed
from hfscale.tuning.search import WARM_STEPS, divisors, faster, in_turns, steady
from hfscale.tuning.seen import Seen
from launch.trials import Trials

MEMORY_STEPS = 3  # AdamW takes its moments in the first
COMPILERS = ("c++", "g++", "gcc", "clang")
WAITED = 0.02  # of a step, from which on data is worth a trial
RATE_STEPS = 10  # times the steps of a trial
AROUND = 1000.0  # the rates of a test: optim.lr divided by it, to optim.lr times it
POINTS = 12  # of a curve that are printed
Values = dict[str, object]


@dataclass
class Part:
    """What was found of one thing: lines for people, figures for scripts."""

    name: str
    lines: list[str] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """The loss at each rate of a test, and what that says."""

    rates: list[float]
    losses: list[float]
    found: Found


class Tuning:
    """The search for a config. ``chosen`` are the keys that it changes."""

    def __init__(self, trials: Trials, *, steps: int) -> None:
        self.trials, self.steps = trials, steps
        self.config = trials.loaded.config
        self.chosen: Values = {}
        self.curve: Curve | None = None
        self.peaks: dict[tuple[object, ...], float | None] = {}  # GiB; None: it does not fit

    # ------------------------------------------------------------------------------------- memory
    def micro_batch(self) -> Part:
        """Choose the micro-batch: the largest that fits, or a smaller one that is faster."""
        part = Part("micro-batch")
        size = self.largest({})
        if size is None:
            limit = self._limit()
            raise ConfigError(
                "not even a micro-batch of one row fits",
                where="train.micro_batch",
                value=f"1, in {limit}",
                remedy="engine.activation_checkpointing=true, a higher engine.zero_stage, "
                "engine.offload, a shorter data.seq_len, or more memory (--memory)",
            )
        part.lines.append(self._room(size, {}))
        smaller = [one for one in self._sizes() if one < size][-1:]
        now = self.config.train.micro_batch
        sizes = [size, *smaller, *([now] if now < size and now in self._sizes() else [])]
        names: dict[str, Values] = {
            f"micro_batch={one}": {"train.micro_batch": one} for one in dict.fromkeys(sizes)
        }
        best = self._compare(part, names, now=f"micro_batch={size}")
        self._choose(names[best])
        micro = self.value("train.micro_batch")
        accumulation = self._rows() // int(str(micro))
        part.lines.append(f"accumulation is then {accumulation}: {self._rows()} rows a rank a step")
        part.figures |= {"largest": size, "chosen": micro, "accumulation": accumulation}
        return part

    def checkpointing(self) -> Part:
        """Choose whether activations are computed again, with as large a micro-batch as that
        allows.
        """
        part, key = Part("checkpointing"), "engine.activation_checkpointing"
        now = bool(self.value(key))
        other: Values = {key: not now}
        size = self.largest(other)
        if size is None:
            how = "without it" if now else "with it"
            part.lines.append(f"{how} not even a micro-batch of one row fits")
            return part
        part.lines.append(self._room(size, other))
        other |= {"train.micro_batch": size}
        words = {True: "on", False: "off"}
        names: dict[str, Values] = {words[now]: {}, words[not now]: other}
        best = self._compare(part, names, now=words[now])
        self._choose(names[best])
        part.figures["chosen"] = bool(self.value(key))
        return part

    # -------------------------------------------------------------------------------------- speed
    def compile(self) -> Part:
        """Choose whether the model is compiled."""
        part, key = Part("compile"), "engine.compile"
        now = bool(self.value(key))
        compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
        if compiler is None:
            part.lines.append(f"not tried: there is no compiler here ({', '.join(COMPILERS)})")
            part.figures["chosen"] = now
            return part
        words = {True: "on", False: "off"}
        names: dict[str, Values] = {words[now]: {}, words[not now]: {key: not now}}
        best = self._compare(part, names, now=words[now])
        self._choose(names[best])
        part.figures["chosen"] = bool(self.value(key))
        return part

    def workers(self) -> Part:
        """Choose how far ahead data is prepared, and by how many processes."""
        part = Part("workers")
        if not isinstance(self.config, RunConfig):
            part.lines.append("not tried: examples are prepared before the first step")
            return part
        waited = self._waited()
        part.figures["waited"] = waited
        part.lines.append(f"a step waits for data for {waited:.1%} of its time")
        if waited < WAITED:
            return part
        ahead = 4 * self.config.data.prefetch_steps
        names: dict[str, Values] = {"as now": {}}
        names[f"prefetch_steps={ahead}"] = {"data.prefetch_steps": ahead}
        if self._raw_text():
            procs = max(2, (os.cpu_count() or 2) // self.trials.procs)
            names[f"tokenize_procs={procs}"] = {"data.tokenize_procs": procs}
        best = self._compare(part, names, now="as now")
        self._choose(names[best])
        part.figures["chosen"] = names[best]
        return part

    # -------------------------------------------------------------------------------------- rates
    def lr(self) -> Part:
        """Look for a learning rate: it rises until the loss diverges."""
        part, peak = Part("lr"), self.config.optim.lr
        steps = RATE_STEPS * self.steps
        seen = self._trial({}, steps=steps, rates=[peak / AROUND, peak * AROUND])
        diverged = seen.outcome == "diverged"
        rates, losses = seen.rate, seen.loss
        if diverged and len(rates) < steps and seen.why:  # the step that broke is not noted
            rates = [*rates, rates[-1] if rates else peak / AROUND]
            losses = [*losses, float("nan")]
        found = find(rates, losses, diverged=diverged)
        self.curve = Curve(rates, losses, found)
        part.lines += told(self.curve)
        if found.suggested:
            self._choose({"optim.lr": float(f"{found.suggested:.2g}")})
        part.figures |= {**vars(found), "rates": rates, "losses": losses}
        return part

    # ------------------------------------------------------------------------------------- trials
    def value(self, key: str) -> object:
        """Return the value of ``key`` as it is chosen now."""
        value: object = self.config
        for name in key.split("."):
            value = getattr(value, name)
        return self.chosen.get(key, value)

    def _choose(self, values: Values) -> None:
        self.chosen |= values

    def _trial(self, changes: Values, *, steps: int, rates: Sequence[float] = ()) -> Seen:
        """Return what the rank that held most saw."""
        settings = {key: _word(value) for key, value in (self.chosen | changes).items()}
        words = " ".join(f"{key}={value}" for key, value in settings.items())
        logger.info(f"trial of {steps} steps: {words or 'as the config says'}")
        seen = self.trials.run(settings, steps=steps, rates=rates)
        return max(seen, key=lambda one: one.peak_gib)

    def largest(self, changes: Values) -> int | None:
        """Return the largest micro-batch that fits with ``changes``."""
        return search.largest(self._sizes(), lambda size: self.fits(size, changes))

    def fits(self, size: int, changes: Values) -> bool:
        """Return whether a micro-batch fits, by a trial unless there was one already."""
        asked = changes | {"train.micro_batch": size}
        if _key(asked) not in self.peaks:
            seen = self._trial(asked, steps=MEMORY_STEPS)
            self.peaks[_key(asked)] = seen.peak_gib if seen.outcome != "memory" else None
        return self.peaks[_key(asked)] is not None

    def _room(self, size: int, changes: Values) -> str:
        """Return what is known of the largest micro-batch that fits, and of the next one."""
        peak = self.peaks[_key(changes | {"train.micro_batch": size})]
        words = " ".join(f"{key}={_word(value)}" for key, value in changes.items())
        line = f"micro_batch={size} fits{' with ' * bool(words)}{words}: {peak:.3g} GiB a rank"
        larger = [one for one in self._sizes() if one > size]
        if larger:
            return f"{line}; {larger[0]} does not, in {self._limit()}"
        return f"{line}; it is all of a rank's rows"

    def _limit(self) -> str:
        limit = self.trials.memory_gib
        return f"{limit:.3g} GiB a rank" if limit else "the memory of its GPU"

    def _rows(self) -> int:
        """Return the rows of a rank in a step."""
        return self.config.train.global_batch // self.trials.procs

    def _sizes(self) -> list[int]:
        return divisors(self._rows())

    def _compare(self, part: Part, candidates: Mapping[str, Values], *, now: str) -> str:
        """Return the fastest of the candidates; ``part`` is told of all."""

        def measure(name: str) -> float | str:
            try:
                seen = self._trial(candidates[name], steps=self.steps)
            except CheckpointError as error:
                if name == now:  # nothing to compare with
                    raise
                return error.what.splitlines()[-1]
            return seen.why if seen.outcome == "memory" else steady(seen.tokens_per_s)

        speeds = in_turns([*candidates], measure)
        best = faster(speeds, now=now)
        part.lines += [f"{name}: {speed}" for name, speed in speeds.items()]
        part.figures["tokens_per_s"] = {name: speed.turns for name, speed in speeds.items()}
        if len(speeds) > 1 and best == now:
            part.lines.append(f"{now} stays: nothing else is faster beyond the spread")
        return best

    def _waited(self) -> float:
        waited = self._trial({}, steps=self.steps).waited
        return statistics.median(waited[WARM_STEPS:] or waited)

    def _raw_text(self) -> bool:
        sources = Run(self.config).sources
        return sources is not None and any(one.dtype == TEXT for one in sources.manifests)


def _key(values: Values) -> tuple[tuple[str, object], ...]:
    return tuple(sorted(values.items()))


def _word(value: object) -> str:
    """Return a value as an override has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def told(curve: Curve) -> list[str]:
    """Return what a test of rates says, with some of its points."""
    every = max(1, len(curve.rates) // POINTS)
    pairs = list(zip(curve.rates, smoothed(curve.losses), strict=True))
    lines = [f"{rate:.1e}  loss {loss:.4f}" for rate, loss in pairs[::every]]
    found = curve.found
    if found.diverged:
        lines.append(f"the loss diverges at {found.diverged:.2g}")
    else:
        lines.append(f"no rate up to {curve.rates[-1]:.2g} diverges")
    if found.suggested is None:
        return [*lines, "no rate teaches anything in so few steps: give it more (--steps)"]
    return [
        *lines,
        f"it falls fastest at {found.steepest:.2g} and is lowest at {found.lowest:.2g}: a peak of "
        f"{found.suggested:.2g} is a good start",
    ]


def config_lines(chosen: Mapping[str, object]) -> list[str]:
    """Return ``chosen`` as lines of YAML, a section each."""
    sections: dict[str, dict[str, object]] = {}
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return [
        f"{section}: {{{', '.join(f'{name}: {_word(value)}' for name, value in values.items())}}}"
        for section, values in sections.items()
    ]
