"""The training loop: everything that happens in a step, in order, and nothing about any model or
objective.

A step takes its micro-batches, agrees with the other ranks on counts and flags, runs one backward
pass a micro-batch, updates the weights once, and only then advances. What observes a step (metrics,
validation) comes after it and changes nothing.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.state import CheckpointState
from hfscale.dist.agree import Agreed, agree
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import Place
from hfscale.engine.engine import Engine, StepStats
from hfscale.errors import CheckpointError, DataError, UnhealthyError
from hfscale.log import logger
from hfscale.monitor.heartbeat import beat
from hfscale.monitor.spikes import Spikes
from hfscale.monitor.throughput import Throughput, peak_memory_gib
from hfscale.monitor.writers import MetricsLog
from hfscale.objectives.base import Objective
from hfscale.stream.digest import VERSION as DIGEST_VERSION
from hfscale.stream.digest import step_digest
from hfscale.stream.examples import ExampleStream
from hfscale.stream.loader import Stream
from hfscale.training.evaluator import Evaluator, TaskEvaluator, global_losses

SKIPPED, TOKENS = (
    "skipped_rows",
    "tokens",
)  # among what the ranks agree on; the first also in the metrics and in a checkpoint's state
# data.max_skipped counts these many rows as read from the start (at most an epoch): damage comes in
# lumps
SKIP_FLOOR_ROWS = 2**20


@dataclass
class TrainState:
    """How far a run has come. ``rows`` and the data's position are the stream's."""

    step: int = 0
    tokens_seen: int = 0
    skipped_rows: int = 0  # that touched damaged data


@dataclass
class Trainer:
    """The parts of a run, and the loop over them. ``learning_rate`` gives the rate of an update,
    counted from 1.
    """

    engine: Engine
    stream: Stream | ExampleStream
    objective: Objective
    checkpoints: CheckpointManager
    throughput: Throughput
    stop: StopRequest
    learning_rate: Callable[[int], float]
    describe: dict[str, Any]  # what every checkpoint says about the run
    total_steps: int
    seed: int
    data: Place  # among the ranks that read different rows
    metrics_every: int
    sources: tuple[str, ...] = ("text",)  # names, as the rows number them
    max_skipped: float = 0.0  # of the rows read
    validate_every: int | None = None
    patience: int | None = None  # validations without a new best, after which the run is done
    evaluator: Evaluator | TaskEvaluator | None = None
    warned_s: float | None = (
        None  # in a Slurm job: how long before its end the ranks are told to save
    )
    log: MetricsLog | None = None  # rank 0 only
    state: TrainState = field(default_factory=TrainState)
    spikes: Spikes = field(default_factory=Spikes)
    record: dict[str, Any] = field(
        default_factory=dict
    )  # of the last step that was logged; the same on all ranks but for times

    def run(self) -> bool:
        """Return True when all steps are done, False when stopped on request; either way the last
        step is saved.

        Raises:
            UnhealthyError: on every rank, before a non-finite gradient reaches the weights.
            CheckpointError: if a background write failed on any rank.
            DataError: on every rank, when more rows were skipped than ``max_skipped`` allows.
        """
        while self.state.step < self.total_steps and not self._stopped_early():
            with self.throughput.step():
                try:
                    agreed, stats = self._step()
                except UnhealthyError as error:
                    raise UnhealthyError(
                        f"step {self.state.step + 1}: {error}; the newest checkpoint is older"
                    ) from error
            last = self.state.step == self.total_steps
            self._look_for_spike(stats)
            self._observe(agreed, stats)
            best = self.record.get("step") == self.state.step and self.checkpoints.improves(
                self.record
            )
            last = last or self._stopped_early()
            if agreed.failed:
                raise CheckpointError(
                    "a checkpoint could not be written",
                    where=f"before step {self.state.step}",
                    value=str(self.checkpoints.failed() or "failed on another rank; see its log"),
                    remedy="free the disk or mend the folder, then run the same command again",
                )
            if agreed.stop or agreed.due or last or best:
                self._save()
            if agreed.stop and not last:
                self.checkpoints.wait()
                return False
        if self._stopped_early():
            logger.info(
                f"no new best in {self.checkpoints.stale} validations: train.patience ends the "
                f"run at step {self.state.step}"
            )
        self.checkpoints.wait()
        return True

    def _stopped_early(self) -> bool:
        """Return whether the metric of ``checkpoint.keep_best`` has been no better for as many
        validations as patience allows.
        """
        return self.patience is not None and self.checkpoints.stale >= self.patience

    def _step(self) -> tuple[Agreed, StepStats]:
        step = self.state.step
        beat("data", step + 1)
        with self.throughput.waiting():
            rows = self.stream.take()
        batches = [self.objective.collate(micro) for micro in rows]
        ids = [row for batch in batches for row in batch.rows()]
        counts = self.objective.counts(batches) | {
            SKIPPED: sum(int((~micro.valid_B).sum()) for micro in rows),
            TOKENS: sum(row.numel() for row in ids),
        }
        beat("collective")
        agreed = agree(
            counts=counts,
            stop=self.stop.requested,
            due=self.checkpoints.due(step + 1),
            failed=self.checkpoints.failed() is not None,
            digest=step_digest(rows) if self._logged(step + 1) else 0,
        )
        self._count_skipped(agreed.counts[SKIPPED])
        on_device = [batch.to(self.engine.device) for batch in batches]
        losses = self.objective.losses(self.engine, on_device, agreed.counts)
        beat("forward")
        for loss in seeded(losses, seed=self.seed, step=step, rank=self.data.rank):
            beat("backward")
            self.engine.backward(loss)
            beat("forward")
        beat("step")
        stats = self.engine.step(self.learning_rate(step + 1))
        self.stream.advance()
        self.state.step += 1
        self.state.tokens_seen += agreed.counts[TOKENS]
        self.throughput.count(agreed.counts[TOKENS])
        return agreed, stats

    def _count_skipped(self, rows: int) -> None:
        """Add the step's skipped rows, which all ranks know, or stop all of them together."""
        if not rows:
            return
        self.state.skipped_rows += rows
        stream = self.stream.state()
        allowed = self.max_skipped * max(
            stream.consumed_rows, min(stream.epoch_rows, SKIP_FLOOR_ROWS)
        )
        if self.state.skipped_rows > allowed:
            raise DataError(
                "more data is damaged than data.max_skipped allows",
                where=f"step {self.state.step + 1}",
                value=f"{self.state.skipped_rows:,} rows skipped of {stream.consumed_rows:,} "
                f"read, {int(allowed):,} allowed",
                remedy="restore the shards that the log names (`hfscale shards verify` lists "
                "all damage), or raise it",
            )

    def _logged(self, step: int) -> bool:
        return step % self.metrics_every == 0 or step == self.total_steps or self._validated(step)

    def _validated(self, step: int) -> bool:
        return self.validate_every is not None and (
            step % self.validate_every == 0 or step == self.total_steps
        )

    def _look_for_spike(self, stats: StepStats) -> None:
        """Say so if this step's gradient is far above the usual; rank 0 alone."""
        if self.log is None:
            return
        notice = self.spikes.look(self.state.step, stats.grad_norm)
        if notice:
            texts = f"hfscale batch {shlex.quote(str(self.log.run_dir))} --step {self.state.step}"
            logger.info(f"notice: {notice}; its texts: {texts}")

    def _observe(self, agreed: Agreed, stats: StepStats) -> None:
        """Log this step. Every rank takes part in the sums; only rank 0 writes."""
        step = self.state.step
        if not self._logged(step):
            return
        beat("collective")
        losses = global_losses(self.objective, agreed.counts, sources=self.sources)
        record = self.record = {
            "step": step,
            **losses,
            "lr": stats.lr,
            "grad_norm": stats.grad_norm,
            "tokens_seen": self.state.tokens_seen,
            **self.throughput.report(),
            **self.stream.epochs(),
            "batch_digest": agreed.digest % 2**64,
            "digest_version": DIGEST_VERSION,
            "memory_gib": peak_memory_gib(self.engine.device),
        }
        if self.state.skipped_rows:
            record[SKIPPED] = self.state.skipped_rows
        if self.checkpoints.write_s:
            record["save_s"] = (
                self.checkpoints.stall_s + self.checkpoints.write_s
            )  # at most: a synchronous save counts its writing twice
            self._check_warning_time(record["save_s"] + record["step_s"])
        if self.evaluator is not None and self._validated(step):
            record |= {
                f"validation_{name}": value
                for name, value in self.evaluator.run(self.engine).items()
            }
        if self.log is not None:
            self.log.write(record)

    def _check_warning_time(self, needed_s: float) -> None:
        """Say once if Slurm's signal leaves less time than a step and a save take."""
        if self.warned_s is not None and needed_s > self.warned_s:
            logger.warning(
                f"step and save take {needed_s:.0f} s, but Slurm warns {self.warned_s:.0f} s "
                "before the end: the next job of "
                f"this run wants cluster.signal_s={2 * needed_s:.0f} (sbatch "
                f"--signal=USR1@{2 * needed_s:.0f})"
            )
            self.warned_s = None

    def close(self) -> None:
        """Leave in order, all ranks together: the reader thread, the record, then the engine."""
        self.stream.close()
        if self.log is not None:
            self.log.close()
        self.engine.close()

    def snapshot(self) -> CheckpointState:
        """Return what a checkpoint of this moment says of the run, beside the engine's state."""
        figures = {
            key: value
            for key, value in self.record.items()
            if key == "step" or "loss" in key or key.startswith("validation_")
        }
        return CheckpointState(
            **self.describe,
            step=self.state.step,
            tokens_seen=self.state.tokens_seen,
            skipped_rows=self.state.skipped_rows,
            stream=self.stream.state().to_dict(),
            metrics=figures,
        )

    def _save(self) -> None:
        beat("save")
        self.checkpoints.save(
            self.engine,
            self.snapshot(),
            probe_inputs=self.objective.probe_inputs(self.engine.module.config),
        )


def seeded(
    losses: Iterator[torch.Tensor], *, seed: int, step: int, rank: int
) -> Iterator[torch.Tensor]:
    """Yield ``losses``, each computed after torch was seeded from (seed, step, rank, micro-batch).

    So dropout never depends on how many draws came before, and a resumed step repeats itself.
    """
    for micro_batch in count():
        name = f"{seed}/{step}/{rank}/{micro_batch}".encode()
        number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1
        torch.default_generator.manual_seed(
            number
        )  # torch.manual_seed formats a stack trace each time without a GPU (0.3 ms)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(number)
        try:
            yield next(losses)
        except StopIteration:
            return
