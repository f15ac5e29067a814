"""A run goes back to the checkpoint before a step that was not healthy, in its process, and leaves
the rows out that were to blame.

All ranks go back together: they have judged the same numbers. The ledger of rows left out is part
of the stream's state, and in the run's incidents until the next checkpoint has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hfscale.checkpoint.state import CheckpointState
from hfscale.dist.agree import sum_over_ranks
from hfscale.log import logger
from hfscale.monitor import incidents
from hfscale.monitor.heartbeat import beat
from hfscale.stream.left_out import Span
from hfscale.training.accounting import agree_on_counts
from hfscale.training.surgeon import to_blame

if TYPE_CHECKING:
    from hfscale.training.loop import Trainer

NEIGHBOURS = 2  # steps that say what is ordinary
# whose figure is the gradient's norm; the others' is the loss
OF_GRADIENT = (incidents.GRADIENT, incidents.NOT_FINITE)


def go_back(trainer: Trainer) -> None:
    """Return with ``trainer`` at the newest checkpoint before the offence of its health.

    Raises:
        UnhealthyError: if there is none, and the update is made already.
        CheckpointError: if none of them is intact.
    """
    health, stream = trainer.health, trainer.stream
    offence = health.take_offence()
    beat("rewind")
    first = offence.first or offence.step
    if not trainer.checkpoints.before(first):
        health.stay(offence)
        return
    rows, ledger = trainer.rows_of(offence.step), stream.ledger.spans
    of_gradient = offence.kind in OF_GRADIENT
    ordinary = health.ordinary(of_gradient=of_gradient)
    saved = trainer.checkpoints.rewind(trainer.engine, step=first)
    health.rewind(saved)
    blamed = list[Span]()
    if offence.kind != incidents.REPLICAS:
        logger.info(f"looking for what is to blame in rows {rows[0]:,} to {rows[1] - 1:,}")
        trial = _trial(trainer, saved, of_gradient=of_gradient)
        scalars = trainer.engine.scalars()
        # with the weights of then, as the steps behind it have it
        size = rows[1] - rows[0]
        usual = min(trial([], rows[1] + turn * size) for turn in range(NEIGHBOURS))
        blamed = to_blame(
            rows,
            lambda spans: trial(spans, rows[0]),
            ordinary=lambda value: ordinary(value, usual),
        )
        trainer.engine.load_scalars(scalars)  # an overflow of fp16 lowers its scale
    stream.rewind(saved.stream, left_out=[*ledger, *blamed])
    trainer.restart(saved)
    health.went_back(offence, back_to=saved.step, left_out=blamed, rows=rows)


def _trial(
    trainer: Trainer, saved: CheckpointState, *, of_gradient: bool
) -> Callable[[Sequence[Span], int], float]:
    """Return what tries the step at a row without some of its rows; the engine stays as it is, bit
    for bit.
    """
    ledger = trainer.stream.ledger.spans

    def trial(spans: Sequence[Span], at: int) -> float:
        trainer.stream.rewind(saved.stream, left_out=[*ledger, *spans], at=at)
        beat("rewind")
        norm, loss = _tried(trainer)
        return norm if of_gradient else loss

    return trial


def _tried(trainer: Trainer) -> tuple[float, float]:
    """Return the norm of the gradient, and the loss, of the step that the stream is at."""
    accounting = trainer.accounting
    micros = trainer.stream.take()
    batches = [accounting.objective.collate(micro) for micro in micros]
    counts = agree_on_counts(accounting, micros, batches)
    stats = trainer.update(batches, counts, allow=lambda norm: False)
    loss = sum_over_ranks(accounting.loss_share(counts))
    accounting.take_sums()
    return stats.grad_norm, float(loss)
