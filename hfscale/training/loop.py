"""The training loop: everything that happens in a step, in order, and nothing about any model or
objective.

A step takes its micro-batches, agrees with the other ranks on counts and flags, runs one backward
pass a micro-batch, updates the weights once, and only then advances. Observers (metrics,
validation, the best) look at a step after it and change none of its numbers; what they ask for, a
save or the end, all ranks agree on before the next step begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import torch

from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.state import CheckpointState
from hfscale.dist.agree import agree
from hfscale.dist.stop import StopRequest
from hfscale.engine.engine import Allow, Engine, StepStats
from hfscale.errors import CheckpointError, LossScaleError, UnhealthyError
from hfscale.log import logger
from hfscale.monitor.heartbeat import beat
from hfscale.monitor.throughput import Throughput
from hfscale.objectives.base import Batch
from hfscale.stream.digest import step_digest
from hfscale.stream.examples import ExampleStream
from hfscale.stream.left_out import Span
from hfscale.stream.loader import Stream
from hfscale.training.accounting import (
    SKIPPED,
    TOKENS,
    Accounting,
    check_skipped,
    counts_of,
    heard_of_loss,
    told_of_loss,
)
from hfscale.training.observers.base import Observer, Step
from hfscale.training.observers.health import Health
from hfscale.training.rewind import go_back


@dataclass
class TrainState:
    """How far a run has come. ``rows`` and the data's position are the stream's."""

    step: int = 0
    tokens_seen: int = 0
    skipped_rows: int = 0  # that touched damaged data

    @classmethod
    def after(cls, saved: CheckpointState | None) -> TrainState:
        """Return how far a run had come when it was ``saved``; None: it begins."""
        return cls(saved.step, saved.tokens_seen, saved.skipped_rows) if saved else cls()


@dataclass
class Trainer:
    """The parts of a run, and the loop over them. ``learning_rate`` gives the rate of an update,
    counted from 1. ``observers`` look at each step in their order.
    """

    engine: Engine
    stream: Stream | ExampleStream
    accounting: Accounting  # of the objective
    checkpoints: CheckpointManager
    throughput: Throughput
    stop: StopRequest
    learning_rate: Callable[[int], float]
    describe: dict[str, object]  # what every checkpoint says about the run
    total_steps: int
    seed: int
    health: Health
    max_skipped: float = 0.0  # of the rows read
    observers: Sequence[Observer] = ()
    state: TrainState = field(default_factory=TrainState)

    def __post_init__(self) -> None:
        self.objective = self.accounting.objective
        self._loss_share: torch.Tensor | None = None  # of the step before, on the host
        self._pinned: torch.Tensor | None = None
        self._saved_step = self.state.step  # a resumed run begins where its checkpoint is

    def run(self) -> bool:
        """Return True when all steps are done, or an observer has ended the run, False when it was
        stopped on request; whichever it is, the last step is saved.

        Raises:
            UnhealthyError: on every rank, before a non-finite gradient reaches the weights.
            CheckpointError: if a background write failed on any rank.
            DataError: on every rank, when more rows were skipped than ``max_skipped`` allows.
        """
        while self.state.step < self.total_steps:
            step = self._next()
            if step is None:
                break
            beat("observe")
            for observer in self.observers:
                observer.look(step)
            agreed, last = step.agreed, step.number == self.total_steps
            if agreed.failed:
                raise CheckpointError(
                    "a checkpoint could not be written",
                    where=f"before step {step.number}",
                    value=str(self.checkpoints.failed() or "failed on another rank; see its log"),
                    remedy="free the disk or mend the folder, then run the same command again",
                )
            if agreed.stop or agreed.due or last:
                self._save()
            if agreed.stop and not last:
                self.checkpoints.wait()
                return False
        for reason in filter(None, (observer.stop for observer in self.observers)):
            logger.info(f"{reason} ends the run at step {self.state.step}")
        beat("save")
        self.checkpoints.wait()
        return True

    def _next(self) -> Step | None:
        """Return the next step, which is done; None where the ranks agreed to end before it."""
        with self.throughput.step():
            try:
                return self._step()
            except UnhealthyError as error:
                if isinstance(error, LossScaleError):
                    self.health.floor(self.state.step + 1)
                raise UnhealthyError(f"{error}; after step {self.state.step}") from error

    def _step(self) -> Step | None:
        number = self.state.step + 1
        watched = number == self.total_steps or self._watched(number)
        beat("data", number)
        with self.throughput.waiting():
            rows = self.stream.take()
        batches = [self.objective.collate(micro) for micro in rows]
        counts = counts_of(self.accounting, rows, batches) | told_of_loss(self._loss_share)
        digest = step_digest(rows) if watched else 0
        beat("collective")
        agreed = agree(
            counts=counts,
            stop=self.stop.requested,
            due=self.checkpoints.due(number),
            failed=self.checkpoints.failed() is not None,
            save=any(observer.save for observer in self.observers),
            end=any(observer.stop for observer in self.observers),
            digest=digest,
        )
        if self._loss_share is not None:
            self.health.hear(self.state.step, heard_of_loss(agreed.counts))
        if self.health.offence and not agreed.end:
            return self._again()
        if agreed.save or agreed.end:  # what was asked for is the step before, as it stands
            with self.throughput.aside():
                self._save()
        if agreed.end:
            return None
        self._count_skipped(agreed.counts[SKIPPED])
        allow = partial(self.health.allows, number)
        stats = self.update(batches, agreed.counts, allow=allow, measure=watched)
        if self.health.offence:
            return self._again()
        self.stream.advance()
        self.state.step += 1
        self.state.tokens_seen += agreed.counts[TOKENS]
        self.throughput.count(agreed.counts[TOKENS])
        seen, skipped = self.state.tokens_seen, self.state.skipped_rows
        return Step(number, watched, agreed, stats, tokens_seen=seen, skipped_rows=skipped)

    def _again(self) -> Step | None:
        """Return the next step after the run went back to before the one that was not healthy."""
        with self.throughput.aside():
            go_back(self)
        return self._step()

    def restart(self, saved: CheckpointState) -> None:
        """Count on from ``saved``, to which engine and stream went back."""
        self.state = TrainState.after(saved)
        self._saved_step, self._loss_share = saved.step, None
        for observer in self.observers:
            observer.rewind(saved)

    def rows_of(self, step: int) -> Span:
        """Return the positions of the rows of ``step``: the one that is next, or was the last."""
        first, stop = self.stream.step_rows
        size = (self.state.step + 1 - step) * (stop - first)
        return first - size, stop - size

    def _watched(self, number: int) -> bool:
        """Return whether an observer wants all figures of a step."""
        return any(observer.wants(number) for observer in self.observers)

    def update(
        self,
        batches: Sequence[Batch],
        counts: Mapping[str, int],
        *,
        allow: Allow,
        measure: bool = False,
    ) -> StepStats:
        """Return what one update of the weights with the gradient of ``batches`` did; ``counts``
        are those of all ranks, ``allow`` and ``measure`` as in ``Engine.step``.
        """
        step = self.state.step
        on_device = [batch.to(self.engine.device) for batch in batches]
        losses = self.accounting.losses(self.engine, on_device, counts)
        rank = self.objective.setting.data.rank
        beat("forward")
        for loss in seeded(losses, seed=self.seed, step=step, rank=rank):
            beat("backward")
            self.engine.backward(loss)
            beat("forward")
        self._loss_share = None
        if any(counts[term] for term, weight in self.objective.weights().items() if weight):
            self._loss_share = self._on_host(self.accounting.loss_share(counts))
        else:
            allow = _never  # nothing was asked: AdamW's momentum alone is no answer
        beat("step")
        return self.engine.step(self.learning_rate(step + 1), allow=allow, measure=measure)

    def forget_loss(self) -> None:
        """Forget the loss of a step that was only tried: the next step does not tell of it."""
        self._loss_share = None

    def _on_host(self, share: torch.Tensor) -> torch.Tensor:
        """Return ``share`` where it can be read after the step, without waiting for a GPU now: the
        optimizer waits for the gradient's norm, which comes later.
        """
        if share.device.type != "cuda":
            return share.detach()
        if self._pinned is None:
            self._pinned = torch.empty((), dtype=share.dtype, pin_memory=True)
        return self._pinned.copy_(share.detach(), non_blocking=True)

    def _count_skipped(self, rows: int) -> None:
        """Add the step's skipped rows, which all ranks know, or stop all of them together. Those
        that the run leaves out are no damage.
        """
        rows -= self.stream.ledger.count(*self.stream.step_rows)
        if not rows:
            return
        self.state.skipped_rows += rows
        stream = self.stream.state()
        check_skipped(
            self.state.skipped_rows,
            share=self.max_skipped,
            consumed_rows=stream.consumed_rows,
            epoch_rows=stream.epoch_rows,
            step=self.state.step + 1,
        )

    def close(self) -> None:
        """Leave in order, all ranks together: the reader thread, the record, then the engine."""
        self.stream.close()
        for observer in self.observers:
            observer.close()
        self.engine.close()

    def snapshot(self) -> CheckpointState:
        """Return what a checkpoint of this moment says of the run, beside the engine's state."""
        observed: dict[str, object] = {"metrics": {}, "best": None}
        for observer in self.observers:
            observed |= observer.state()
        moment = {
            "step": self.state.step,
            "tokens_seen": self.state.tokens_seen,
            "skipped_rows": self.state.skipped_rows,
            "stream": self.stream.state().to_dict(),
        }
        return CheckpointState.model_validate({**self.describe, **moment, **observed})

    def _save(self) -> None:
        """Save the step that is done, if it was not yet."""
        if self.state.step == self._saved_step:
            return
        beat("save")
        self.checkpoints.save(
            self.engine,
            self.snapshot(),
            probe_inputs=self.objective.probe_inputs(self.engine.module.config),
        )
        self._saved_step = self.state.step


def _never(grad_norm: float) -> bool:
    """Allow no update."""
    return False


def seeded(
    losses: Iterator[torch.Tensor], *, seed: int, step: int, rank: int
) -> Iterator[torch.Tensor]:
    """Yield ``losses``, each computed after torch was seeded from (seed, step, rank, micro-batch).

    So dropout never depends on how many draws came before, and a resumed step repeats itself.
    """
    for micro_batch in count():
        name = f"{seed}/{step}/{rank}/{micro_batch}".encode()
        number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1
        # torch.manual_seed formats a stack trace each time without a GPU (0.3 ms)
        torch.default_generator.manual_seed(number)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(number)
        try:
            yield next(losses)
        except StopIteration:
            return
