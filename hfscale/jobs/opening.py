"""A model by name, whatever kind of place that is: a run, one of its checkpoints, an export, a transformers folder, a hub name."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from hfscale.checkpoint import layout
from hfscale.checkpoint.weights import CheckpointWeights, WeightsReader
from hfscale.config.load import load_config
from hfscale.config.schema import RunConfig
from hfscale.dist.group import default_device
from hfscale.errors import CheckpointError
from hfscale.hub import local_folder
from hfscale.jobs.check import model_needs, skeleton
from hfscale.models.build import check_model_config
from hfscale.objectives.base import Setting, load_objective
from hfscale.tokenizer import load_tokenizer


@dataclass(frozen=True)
class RunModel:
    """A checkpoint of a run: ``skeleton`` has shapes and precision (meta device), ``reader`` the weights, verified."""

    config: RunConfig
    checkpoint: Path
    skeleton: PreTrainedModel
    reader: WeightsReader
    tokenizer: PreTrainedTokenizerFast

    def model(self) -> PreTrainedModel:
        """Return the model with its weights, on the CPU, in evaluation mode."""
        dtype = self.skeleton.dtype
        state = {name: self.reader.read(name).to(dtype) for name in self.reader.names()}
        return type(self.skeleton).from_pretrained(None, config=self.skeleton.config, state_dict=state, dtype=dtype).eval()


def open_run(name: str) -> RunModel | None:
    """Return the checkpoint that ``name`` stands for (of a run: its newest), or None if it is nothing of ours.

    Raises:
        CheckpointError: if it is a run without a checkpoint, or one whose files do not match its manifest.
    """
    disable_progress_bar()
    if (checkpoint := layout.checkpoint_of(name)) is None:
        return None
    reader = CheckpointWeights(checkpoint)  # damaged ones are refused: silently taking an older one would be a lie
    config = load_config(checkpoint.parent.parent / "config.yaml").config
    tokenizer = load_tokenizer(config.tokenizer.path)
    objective = load_objective(config.objective, Setting(seq_len=config.data.seq_len, tokenizer=tokenizer))
    model_config = check_model_config(**model_needs(config, tokenizer, checkpoint))
    return RunModel(config, checkpoint, skeleton(config, model_config, objective.auto_model), reader, tokenizer)


def open_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the causal model that ``name`` stands for, on the GPU if there is one, and its tokenizer.

    Raises:
        UserError: if there is no such model.
    """
    run = open_run(name)
    if run is not None:
        model, tokenizer = run.model(), run.tokenizer
    else:
        folder = local_folder(name, where="MODEL", weights=True, remedy="name a run, a checkpoint, an export, a transformers folder")
        tokenizer = load_tokenizer(folder)
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError("no causal language model here", where=name, value=str(error).splitlines()[0],
                                  remedy="name a run, a checkpoint, an export, or a transformers folder") from error
    return model.to(default_device()), tokenizer  # type: ignore[arg-type]
