"""Before step 1 of a new run: one save, one load and one export of the live engine, so that no run
trains what it cannot keep.

A model that can be trained is not yet one that can be saved (bamba and xlstm fail in a forward that
is not the training's), nor one that transformers loads as it was trained (a buffer of another
precision, a row that loading sets to zero). That would be found at the first save, after hours.
Models whose checkpoint is too large to write in seconds are asked for their probe alone.
"""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.checkpoint.export import untied, write_weights
from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.probe import make_probe
from hfscale.checkpoint.weights import WeightsReader, open_weights, verify_together
from hfscale.config.schema import Checkpoint, TrainConfig
from hfscale.dist.agree import from_rank_0, sum_over_ranks
from hfscale.dist.group import barrier
from hfscale.errors import CheckpointError, UserError
from hfscale.models.build import accepted
from hfscale.run.origin import skeleton
from hfscale.run.proof import prove
from hfscale.training.loop import Trainer

WRITTEN_BYTES = 2**30  # a larger checkpoint is not written for a trial


def try_out(trainer: Trainer, config: TrainConfig) -> None:
    """Return if this run can be saved, resumed and exported; the engine is as it was. Collective.

    Raises:
        UserError: on every rank, with what cannot be done.
    """
    engine, folder = trainer.engine, config.run_dir / run_files.TRIAL
    inputs = trainer.objective.probe_inputs(engine.module.config)
    before = accepted(partial(make_probe, engine, inputs), config.model)
    own = sum(t.nbytes for part in engine.fragments() for t in part.tensors.values())
    if before is None or int(sum_over_ranks(torch.tensor(own))) > WRITTEN_BYTES:
        return
    if engine.all.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    barrier()
    try:
        checkpoints = CheckpointManager(
            folder,
            config=Checkpoint(async_=False),
            place=engine.all,
            quiet=True,
        )
        checkpoints.save(engine, trainer.snapshot(), probe_inputs=inputs)
        checkpoints.load_latest(engine)
        after = make_probe(engine, inputs)
        if after is None or not torch.equal(after.logits, before.logits):
            raise CheckpointError(
                "the model answers otherwise once it was saved and loaded",
                where="trial before step 1",
                remedy="this is a defect of hfscale, of DeepSpeed or of the architecture: "
                "report it",
            )
        saved = folder / layout.step_name(0)
        # all ranks: of adapters it asks for the base
        reader = open_weights(saved, check=verify_together)
        problem = _export(trainer, config, saved, reader) if engine.all.rank == 0 else ""
        if problem := from_rank_0(problem):
            raise CheckpointError(
                "this model cannot be exported as it would be trained; nothing was trained",
                where="trial before step 1",
                value=problem,
                remedy="choose another architecture or other values in model.config",
            )
    finally:
        if engine.all.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _export(trainer: Trainer, config: TrainConfig, checkpoint: Path, reader: WeightsReader) -> str:
    """Return why transformers does not give the engine's logits for an export of ``checkpoint``, or
    nothing. On rank 0 only.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    objective, live = trainer.objective, trainer.engine.module.config
    shapes = skeleton(config, deepcopy(live), objective.auto_model)
    try:
        with TemporaryDirectory(dir=checkpoint.parent) as name:
            write_weights(reader, shapes, Path(name))
            shapes.config.save_pretrained(name)
            prove(Path(name), objective, skeleton=shapes, checkpoint=checkpoint, config=config)
            return _changed_by_loading(shapes, reader, Path(name) / "raised")
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever transformers does with what it has written itself
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclass(frozen=True)
class _Raised(WeightsReader):
    """Every number of ``reader`` and 1 more: where loading sets a row to zero, first weights may
    not show it.
    """

    reader: WeightsReader

    def names(self) -> list[str]:
        return self.reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.reader.shape(name)

    def read_slice(self, name: str, *, start: int, numel: int) -> Tensor:
        return self.reader.read_slice(name, start=start, numel=numel) + 1

    def home(self, name: str) -> str:
        return self.reader.home(name)


def _changed_by_loading(shapes: PreTrainedModel, reader: WeightsReader, folder: Path) -> str:
    """Return which tensors transformers loads otherwise than they were written, or nothing."""
    raised = _Raised(reader)
    folder.mkdir()
    write_weights(raised, shapes, folder)
    shapes.config.save_pretrained(folder)
    kind = type(shapes)
    loaded = untied(kind.from_pretrained(folder, dtype=shapes.dtype, use_safetensors=True))
    changed = [
        name
        for name, tensor in loaded.items()
        if not torch.equal(tensor, raised.read(name).to(tensor.dtype))
    ]
    return f"transformers loads {', '.join(changed[:3])} otherwise than saved" if changed else ""
