"""A model by name, whatever kind of place that is: a run, one of its checkpoints, an export, a transformers folder, a hub name."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from hfscale.checkpoint import layout
from hfscale.checkpoint.weights import CheckpointWeights, WeightsReader
from hfscale.config.load import load_config
from hfscale.config.schema import RunConfig
from hfscale.dist.group import default_device
from hfscale.errors import CheckpointError
from hfscale.hub import local_folder
from hfscale.jobs.check import model_needs
from hfscale.models.build import check_model_config
from hfscale.objectives.base import Setting, load_objective
from hfscale.tokenizer import load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RunModel:
    """A checkpoint of a run: ``skeleton`` has the shapes (meta device), ``reader`` the weights, verified."""

    config: RunConfig
    checkpoint: Path
    skeleton: PreTrainedModel
    reader: WeightsReader
    tokenizer: PreTrainedTokenizerFast

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the run computed."""
        return DTYPES[self.config.engine.precision]

    def model(self) -> PreTrainedModel:
        """Return the model with its weights, on the CPU, in evaluation mode."""
        state = {name: self.reader.read(name).to(self.dtype) for name in self.reader.names()}
        return type(self.skeleton).from_pretrained(None, config=self.skeleton.config, state_dict=state, dtype=self.dtype).eval()


def open_run(name: str) -> RunModel | None:
    """Return the checkpoint that ``name`` stands for (of a run: its newest), or None if it is nothing of ours.

    Raises:
        CheckpointError: if it is a run without a checkpoint, or one whose files do not match its manifest.
    """
    disable_progress_bar()
    path = Path(name)
    if path.parent.name == layout.FOLDER and (path / layout.MANIFEST).is_file():
        run_dir, checkpoint = path.parent.parent, path
    elif (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        run_dir, found = path, layout.candidates(path / layout.FOLDER)
        if not found:
            raise CheckpointError("this run has no checkpoint yet", where=name, remedy=f"go on with it: hfscale pretrain {name}")
        checkpoint = found[-1]  # damaged ones too: silently taking an older one would be a lie
    else:
        return None
    config = load_config(run_dir / "config.yaml").config
    tokenizer = load_tokenizer(config.tokenizer.path)
    return RunModel(config, checkpoint, _skeleton(config, tokenizer), CheckpointWeights(checkpoint), tokenizer)


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


def attention(config: RunConfig) -> str:
    """Return the run's attention, or its equal on a machine that lacks the run's kernels."""
    wanted = config.model.attention
    return "sdpa" if wanted == "flash_attention_2" and not is_flash_attn_2_available() else wanted


def _skeleton(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    setting = Setting(seq_len=config.data.seq_len, tokenizer=tokenizer)
    auto_model = getattr(transformers, load_objective(config.objective, setting).auto_model)
    model_config = check_model_config(config.model, **model_needs(config, tokenizer))
    with torch.device("meta"), no_init_weights():
        skeleton = auto_model.from_config(model_config, dtype=DTYPES[config.engine.precision], attn_implementation=attention(config),
                                          trust_remote_code=config.model.trust_remote_code)
    skeleton.tie_weights()  # a plain construction leaves that for later; untied, an embedding would be counted and exported twice
    return skeleton
