"""A checkpoint's tensors in the engine of a run, which may have another optimizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hfscale.checkpoint.state import CheckpointState
from hfscale.checkpoint.store import FragmentReader, load_fragments
from hfscale.engine.engine import Engine
from hfscale.engine.fragments import Fragment
from hfscale.log import logger


def fill(engine: Engine, checkpoint: Path, state: CheckpointState) -> None:
    """Load ``checkpoint``, which is intact, into the engine; of another optimizer the weights
    alone, where ``optim.reset`` allows that. Collective.

    Raises:
        CheckpointError: before anything is changed, if it is of another model, or of another
            optimizer.
    """
    fragments, scalars = engine.fragments(owned=False, frozen=not engine.adapted), state.engine
    if state.optimizer != engine.optim.name:
        state.check_optimizer(engine.optim, where=checkpoint)
        logger.info(f"what {state.optimizer} kept beside the weights is dropped: optim.reset")
        fragments = [_begun_anew(fragment) for fragment in fragments]
        scalars = {**scalars, "adam_step": 0}
    reader = FragmentReader(checkpoint)
    load_fragments(reader, fragments)
    reader.close()
    engine.load_scalars(scalars)
    engine.after_load()


def _begun_anew(fragment: Fragment) -> Fragment:
    """Return the weight of ``fragment``; what is kept beside it is zero now."""
    for kind, tensor in fragment.tensors.items():
        if kind != "weight":
            tensor.zero_()
    return replace(fragment, tensors={"weight": fragment.tensors["weight"]})
