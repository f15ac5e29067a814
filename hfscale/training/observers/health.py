"""Says of a step whether it is healthy, and what is done about one that is not.

    before the optimizer   the gradient's norm, which all ranks know alike: ``allows``
    one step later         the loss, which rides in the next step's agreement: ``hear``
    after a logged step    zero gradients, layers that stand still, validation: ``look``

So no check takes a collective of its own. A spike of the loss alone is known when its update is
made: it can be rewound, but no longer skipped. All ranks judge the same numbers and decide alike;
rank 0 writes the incident.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hfscale.checkpoint.state import CheckpointState
from hfscale.config import schema
from hfscale.errors import UnhealthyError
from hfscale.log import logger
from hfscale.monitor import incidents
from hfscale.monitor.heartbeat import slow_lately
from hfscale.monitor.incidents import ACTS, Decision, Incident
from hfscale.monitor.scores import Window
from hfscale.stream.left_out import Span
from hfscale.training.observers.base import Observer, Step

LOSS_NOISE = 0.02  # of the loss, and
NORM_NOISE = 0.30  # of the norm's logarithm: deviations that are ordinary in any run
WARMUP = 2.0  # how much higher the threshold is while the learning rate rises
WORSE = 0.05  # of the best validation: a contradiction, where training gets better
LOST = 0.5  # of what the loss had fallen by: it diverges
# what neither skipping nor going back mends
NO_CURE = (incidents.ZERO, incidents.VALIDATION, incidents.DIVERGENCE)
CALM = 0.5  # of the threshold: what a step may have after those to blame are left out
QUIET_STEPS = 100  # after a warning, before the next one of its kind


@dataclass(frozen=True)
class Offence:
    """What was wrong with a step."""

    step: int
    kind: str
    text: str
    scores: Mapping[str, float]
    first: int = 0  # the step since when it may have been so; 0: this one
    late: bool = True  # its update is made


class Health(Observer):
    """Judges each step. ``acted`` are the steps of skips and rewinds of earlier attempts, ``saved``
    is what a checkpoint keeps.
    """

    def __init__(
        self,
        config: schema.Health,
        *,
        warmup_steps: int = 0,
        acted: Sequence[int] = (),
        saved: Mapping[str, Sequence[Sequence[float]]] | None = None,
    ) -> None:
        self.config, self._warmup_steps = config, warmup_steps
        self.write: Callable[[Incident], None] | None = None  # on rank 0 alone
        self._losses = Window(config.window, floor=LOSS_NOISE)
        self._norms = Window(config.window, floor=NORM_NOISE, logarithmic=True)
        for name, window in self._windows().items():
            window.load((saved or {}).get(name, ()))
        self._acted = [*acted]
        self._said: dict[str, int] = {}
        self._course: tuple[float, float] | None = None  # of the loss: first and lowest level
        self._best: tuple[float, float] | None = None  # validation, and the training loss of then
        self.offence: Offence | None = None  # for which the run should go back

    # --------------------------------------------------------------------------------------judging
    def allows(self, step: int, grad_norm: float) -> bool:
        """Return whether the update of ``step`` may be made.

        Raises:
            UnhealthyError: if the run must stop.
        """
        if grad_norm == 0:
            text = "the gradient is zero: nothing learns"
            return self._decide(Offence(step, incidents.ZERO, text, {}, late=False))
        if not math.isfinite(grad_norm):
            return self._decide(
                Offence(
                    step,
                    incidents.NOT_FINITE,
                    "the gradient is not finite; weights were not changed",
                    {"grad_norm": grad_norm},
                    late=False,
                )
            )
        score, usual = self._norms.score(grad_norm), self._norms.level()
        self._norms.add(step, grad_norm, most=self.config.threshold)
        if score <= self._threshold(step) or usual is None:
            return True
        return self._decide(
            Offence(
                step,
                incidents.GRADIENT,
                f"grad_norm {grad_norm:.4g} is {grad_norm / usual:.3g} times the usual one, "
                f"{score:.0f} deviations above it",
                {"grad_norm": grad_norm, "usual_grad_norm": usual, "score": score},
                late=False,
            )
        )

    def hear(self, step: int, loss: float) -> None:
        """Judge the loss of ``step``, whose update is made; NaN: nothing was asked in it.

        Raises:
            UnhealthyError: if the run must stop.
        """
        if math.isnan(loss):
            return
        if math.isinf(loss):
            text = "the loss is not finite, though its gradient was"
            self._decide(Offence(step, incidents.LOSS_NOT_FINITE, text, {}))
            return
        score, usual = self._losses.score(loss), self._losses.level()
        self._losses.add(step, loss, most=self.config.threshold)
        self._check_divergence(step)
        if score <= self._threshold(step) or usual is None:
            return
        text = f"loss {loss:.4f}, {score:.0f} deviations above the usual {usual:.4f}"
        scores = {"loss": loss, "usual_loss": usual, "score": score}
        self._decide(Offence(step, incidents.LOSS, text, scores))

    def _check_divergence(self, step: int) -> None:
        """Compare the level of the loss with where it began and with its lowest."""
        level = self._losses.level()
        if level is None or not self._losses.known:
            return
        first, lowest = self._course or (level, level)
        self._course = first, min(lowest, level)
        fallen = first - lowest
        if fallen > WORSE * abs(first) and level > lowest + LOST * fallen:
            text = f"the loss was {first:.4f}, came down to {lowest:.4f} and is {level:.4f} again"
            scores = {"loss": level, "lowest_loss": lowest}
            self._decide(Offence(step, incidents.DIVERGENCE, text, scores))

    def judge(self, offence: Offence) -> None:
        """Decide on what another observer has seen of a step that is done, on all ranks.

        Raises:
            UnhealthyError: if the run must stop.
        """
        self._decide(offence)

    def floor(self, step: int) -> None:
        """Write down that fp16 has no lower loss scale; the run ends."""
        text = "the gradient overflows fp16 at the lowest loss scale"
        self.tell(Offence(step, incidents.FLOOR, text, {}), "stop")

    def look(self, step: Step) -> None:
        """Look at the figures of ``step``, if it has any: layers that stand still while others
        move, and a validation that gets worse while training gets better.
        """
        prefix = "optim/update_ratio/"
        ratios = {
            tag.removeprefix(prefix): ratio
            for tag, ratio in step.details.items()
            if tag.startswith(prefix)
        }
        still = [name for name, ratio in ratios.items() if ratio == 0]
        if still and len(still) < len(ratios) and step.stats.updated and step.stats.lr:
            text = f"{', '.join(still)}: not moved by this update, while other layers were"
            # on rank 0 alone, where details are whole
            self.tell(Offence(step.number, incidents.STILL, text, {"layers": len(still)}), "warn")
        if step.watched:
            self._look_for_slow(step.number)
        validation = step.figures.get("validation_loss")
        if validation is not None and math.isfinite(validation):
            self._validated(step.number, validation)

    def _look_for_slow(self, step: int) -> None:
        """Tell of the ranks that were seen to be slow: on rank 0, whose heartbeat looks at all."""
        slow = slow_lately()
        if slow:
            scores = {f"rank {one.rank}": one.step_s / max(one.usual_s, 1e-9) for one in slow}
            text = "; ".join(map(str, slow))
            self.tell(Offence(step, incidents.STRAGGLER, text, scores), "warn")

    def _validated(self, step: int, loss: float) -> None:
        """Compare a validation with the best one, and with what training has come to since."""
        level = self._losses.level()
        if level is None:
            return
        best = self._best
        if best is None or loss < best[0]:
            self._best = loss, level
        elif loss > best[0] * (1 + WORSE) and level < best[1]:
            text = (
                f"validation_loss {loss:.4f}, {best[0]:.4f} at its best, while the training loss "
                f"fell from {best[1]:.4f} to {level:.4f}"
            )
            scores = {"validation_loss": loss, "best_validation_loss": best[0]}
            self._decide(Offence(step, incidents.VALIDATION, text, scores))

    def _threshold(self, step: int) -> float:
        return self.config.threshold * (WARMUP if step <= self._warmup_steps else 1.0)

    # -------------------------------------------------------------------------------------deciding
    def _decide(self, offence: Offence) -> bool:
        """Return whether the update may be made, after writing down what is done instead."""
        decision = self._decision(offence)
        if decision == "rewind":
            self.offence = offence  # written down when it is known where to
            return False
        if decision == "skip":
            self._acted.append(offence.step)
        self.tell(offence, decision)
        if decision == "stop":
            raise UnhealthyError(f"step {offence.step}: {offence.text}")
        return decision == "warn"

    def _decision(self, offence: Offence) -> Decision:
        policy = self.config.policy
        if policy == "warn":
            return "stop" if offence.kind == incidents.NOT_FINITE else "warn"
        if policy != "stop" and offence.kind in NO_CURE:
            return "warn"
        if policy == "skip" and offence.late:
            return "stop" if offence.kind == incidents.REPLICAS else "warn"
        since = offence.step - self.config.budget_steps
        if policy in ACTS and sum(step > since for step in self._acted) >= self.config.budget:
            return "stop"
        return policy

    def tell(
        self,
        offence: Offence,
        decision: Decision,
        *,
        back_to: int | None = None,
        left_out: Sequence[Span] = (),
        rows: Span | None = None,
    ) -> None:
        """Write the incident down, on rank 0; warnings of a kind once in a while."""
        said = self._said.get(offence.kind, -QUIET_STEPS)
        if decision == "warn" and 0 <= offence.step - said < QUIET_STEPS:
            return
        self._said[offence.kind] = offence.step
        if self.write is None:
            return
        self.write(
            Incident(
                step=offence.step,
                kind=offence.kind,
                decision=decision,
                text=offence.text,
                scores={name: _number(value) for name, value in offence.scores.items()},
                back_to=back_to,
                left_out=tuple(left_out),
                rows=rows or (),
            )
        )
        done = f", back to step {back_to}" if back_to is not None else ""
        logger.warning(f"step {offence.step}: {offence.text} ({offence.kind}: {decision}{done})")

    # -----------------------------------------------------------------------------------going back
    def take_offence(self) -> Offence:
        """Return the offence for which the run goes back now."""
        offence, self.offence = self.offence, None
        assert offence is not None, "nobody asked to go back"
        return offence

    def stay(self, offence: Offence) -> None:
        """Go on without the update of an offence before which there is no checkpoint.

        Raises:
            UnhealthyError: if the update is made.
        """
        self._acted.append(offence.step)
        self.tell(offence, "stop")
        raise UnhealthyError(
            f"step {offence.step}: {offence.text}; there is no checkpoint before to go back to "
            "(checkpoint.every_steps)"
        )

    def went_back(
        self, offence: Offence, *, back_to: int, left_out: Sequence[Span], rows: Span
    ) -> None:
        """Note what was done about ``offence``, in a step of these ``rows``."""
        self._acted.append(offence.step)
        self.tell(offence, "rewind", back_to=back_to, left_out=left_out, rows=rows)

    def ordinary(self, *, of_gradient: bool) -> Callable[[float, float], bool]:
        """Return what tells whether a norm, or a loss, is not far above that of another step, by
        the noise until now.
        """
        window = self._norms if of_gradient else self._losses
        above, most = window.above(), self.config.threshold * CALM
        return lambda value, other: math.isfinite(value) and above(value, other) <= most

    def rewind(self, saved: CheckpointState) -> None:
        """Forget the figures of later steps."""
        for window in self._windows().values():
            window.forget(saved.step + 1)

    # ----------------------------------------------------------------------------------------state
    def state(self) -> dict[str, object]:
        """Return the values that say what is ordinary."""
        return {"health": {name: window.state() for name, window in self._windows().items()}}

    def _windows(self) -> dict[str, Window]:
        return {"losses": self._losses, "norms": self._norms}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
