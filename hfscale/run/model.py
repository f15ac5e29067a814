"""What MODEL stands for, by name: a run (its newest checkpoint), RUN@best, RUN@STEP, a checkpoint,
an export, a transformers folder, a hub name.

    find(name) -> Model          a folder of transformers, or of the hub
                  RunModel       a checkpoint of a run

What is asked of a model is read then, and once. Config, tokenizer and purpose need no weights; an
engine holds these, and ``objective`` is the one way to ask a live model something: what training
refuses is refused there, whoever asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar, cast

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.checkpoint.base import changed
from hfscale.checkpoint.state import CheckpointState
from hfscale.checkpoint.weights import (
    WeightsReader,
    open_weights,
    refuse_adapter,
    verify_together,
)
from hfscale.config import schema
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.inference import Inference
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.dist.group import default_device
from hfscale.engine.inference import InferenceEngine
from hfscale.errors import CheckpointError, ConfigError, UserError, lost_peer
from hfscale.hub import checked_files, foreign_code, local_folder
from hfscale.models.build import (
    accepted,
    check_head,
    first_line,
    longest_row,
    read_config,
)
from hfscale.models.kinds import BY_CLASS, ENCODER, Purpose, architecture, purpose_of
from hfscale.objectives.base import Objective, Setting, load_objective
from hfscale.records import read_file
from hfscale.run.filled import filled, no_head
from hfscale.run.look import REMEDY
from hfscale.run.origin import (
    DTYPES,
    check_padding,
    generate_as,
    run_config,
    skeleton,
    tokenizer_folder,
)
from hfscale.stream.examples import Facts
from hfscale.tasks.base import Task
from hfscale.tasks.table import load_task
from hfscale.tokenizer import framed, load_tokenizer, quiet

Asked = TypeVar("Asked", bound=Objective)


def find(name: str | Path) -> Model:
    """Return what ``name`` stands for now; a run goes on meanwhile.

    Raises:
        CheckpointError: if it is a run without a checkpoint, or without the one that is named.
    """
    checkpoint = layout.checkpoint_of(name)
    return RunModel(str(name), checkpoint) if checkpoint else Model(str(name))


class Model:
    """A folder that transformers loads, here or of the hub; an export of ours is one."""

    def __init__(self, name: str) -> None:
        self.name = name
        # what a config names it by, wherever that is read
        self.address = str(Path(name).absolute()) if Path(name).exists() else name

    @property
    def home(self) -> Path:
        """Where its evaluations belong."""
        return Path().absolute()

    @cached_property
    def folder(self) -> Path:
        """The folder of its small files.

        Raises:
            ConfigError: if there is none.
        """
        return local_folder(self.name, where="MODEL", remedy=REMEDY)

    @cached_property
    def weights_folder(self) -> Path:
        """The folder with its weights, which are fetched now if they must be."""
        return local_folder(self.name, where="MODEL", weights=True, remedy=REMEDY)

    @cached_property
    def config(self) -> PretrainedConfig:
        """Its config, as it was saved."""
        return read_config(self.folder, where="MODEL")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer."""
        return load_tokenizer(self.folder)

    @cached_property
    def framed(self) -> PreTrainedTokenizerFast:
        """Its tokenizer, as an export has it."""
        return self.tokenizer

    @cached_property
    def purpose(self) -> Purpose | None:
        """What it is for; None: for no text, or nobody knows."""
        return purpose_of(self.config)

    @property
    def kind(self) -> str:
        """The class that it says it is of."""
        return architecture(self.config)

    def facts(self, task: type[Task]) -> Facts:
        """Return what the model knows of ``task``: its labels, say."""
        return task.known(self.config)

    def read(self) -> None:
        """Read config and tokenizer: what is wrong with them is said now."""
        _ = self.config, self.tokenizer

    @cached_property
    def digest(self) -> str:
        """What names its content, and the base of its adapters: another model in the same place is
        another one.
        """
        content = hashlib.blake2b(digest_size=16)
        for file in sorted(self.weights_folder.iterdir()):
            if not file.is_file() or file.name == layout.PINNED:
                continue
            if file.suffix == ".safetensors":  # of a checkpoint the manifest has their digests
                about = file.stat()
                content.update(f"{file.name} {about.st_size} {about.st_mtime_ns}".encode())
            else:
                content.update(read_file(file))
        if base := self._base():
            content.update(changed(base).encode())
        return content.hexdigest()

    def _base(self) -> Path | None:
        return None

    @cached_property
    def weights(self) -> WeightsReader:
        """Its weights, tensor by tensor."""
        return open_weights(self.weights_folder)

    def check_head(self, auto_model: str) -> None:
        """Refuse a class of transformers that the model cannot be, as far as its config says."""
        check_head(self.config, auto_model)

    def engine(self, auto_model: str, how: Inference) -> InferenceEngine:
        """Return the model as that class of transformers, on the GPU if there is one. Collective at
        ZeRO stage 3.

        Raises:
            UserError: if there is no such model, or its weights lack a part of that class.
        """
        disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            refuse_adapter(self.weights_folder)
            saved = [name for name, dtype in DTYPES.items() if dtype == self.config.dtype]
            precision: str = how.precision or (saved or ["fp32"])[0]
            if how.zero_stage == 3:
                self.check_head(auto_model)
                return filled(
                    self.config,
                    auto_model,
                    self.weights,
                    how,
                    name=self.name,
                    folder=self.weights_folder,
                    precision=precision,
                )
            with quiet():  # its report of what is missing; we say it
                model, loaded = getattr(transformers, auto_model).from_pretrained(
                    self.weights_folder,
                    dtype=DTYPES[precision],
                    output_loading_info=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
        except UserError:
            raise
        except Exception as error:  # whatever an architecture says of sizes that do not fit
            if lost_peer(error):
                raise
            if foreign_code(error):
                raise CheckpointError(
                    "this model brings code of its own, which is not run",
                    where=self.name,
                    remedy="name a model that transformers knows itself; training from it: "
                    "model.pretrained=FOLDER model.trust_remote_code=true",
                ) from error
            raise CheckpointError(
                "no model for this task here",
                where=self.name,
                value=first_line(error),
                remedy=f"name a run, a checkpoint, an export, or a folder that {auto_model} loads",
            ) from error
        if auto_model != ENCODER.auto_model and loaded["missing_keys"]:
            raise no_head(auto_model, self.name, sorted(loaded["missing_keys"])[:4])
        return InferenceEngine(model, device=default_device())

    def objective(
        self, make: Callable[[Setting], Asked], setting: Setting, engine: InferenceEngine
    ) -> Asked:
        """Return the objective or task that ``make`` gives for the live model, after all that
        training checks of one.

        Raises:
            ConfigError: if rows are longer than the model can read, or training would refuse it.
        """
        config = engine.module.config
        objective = make(replace(setting, model_config=config))
        longest, rows = longest_row(config), not isinstance(objective, Task)
        if longest is not None and setting.seq_len > longest:
            key = "data.seq_len" if rows else "data.max_length"
            raise ConfigError(
                f"{'rows are' if rows else 'texts may be'} longer than the model can read",
                where=key,
                value=setting.seq_len,
                remedy=f"{key}={longest} or less",
            )
        check_live(objective, engine, device=engine.device, said=schema.Model(pretrained=self.name))
        return objective


class RunModel(Model):
    """A checkpoint of a run of ours."""

    def __init__(self, name: str, checkpoint: Path) -> None:
        super().__init__(name)
        self.checkpoint = checkpoint
        self.address = str(checkpoint.absolute())

    @cached_property
    def run(self) -> TrainConfig:
        """The config of its run."""
        return run_config(self.checkpoint)

    @cached_property
    def state(self) -> CheckpointState:
        """What the checkpoint says of itself."""
        return layout.state_of(self.checkpoint)

    @property
    def home(self) -> Path:
        """Its run directory."""
        return run_files.run_of(self.checkpoint)

    @cached_property
    def folder(self) -> Path:
        """The checkpoint."""
        return checked_files(self.checkpoint)

    @cached_property
    def weights_folder(self) -> Path:
        """The checkpoint."""
        return self.checkpoint

    @cached_property
    def config(self) -> PretrainedConfig:
        """Its config, as it was saved."""
        trusted = self.run.model.trust_remote_code
        return read_config(self.folder, where="MODEL", trust_remote_code=trusted)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of its run."""
        return load_tokenizer(tokenizer_folder(self.run, None))

    @cached_property
    def framed(self) -> PreTrainedTokenizerFast:
        """The tokenizer of its run, putting around a text what the model was trained on."""
        return framed(self.tokenizer, self.trained.frame, self.config)

    @cached_property
    def trained(self) -> Objective:
        """The objective or task of its run, with what its training examples said; without a
        model.
        """
        run = self.run
        setting = Setting(seq_len=run.data.seq_len, tokenizer=self.tokenizer, facts=self._facts)
        if isinstance(run, FinetuneConfig):
            return load_task(run.task, setting)
        assert isinstance(run, RunConfig)
        return load_objective(run.objective, setting)

    @cached_property
    def purpose(self) -> Purpose | None:
        """What it was trained for."""
        return BY_CLASS.get(self.kind)

    @property
    def kind(self) -> str:
        """The class of transformers that it was trained as."""
        return self.trained.auto_model

    def facts(self, task: type[Task]) -> Facts:
        """Return what its training examples said, or else what its config says."""
        return self._facts or super().facts(task)

    @property
    def _facts(self) -> Facts:
        return cast("Facts", self.state.facts)

    def _base(self) -> Path | None:
        return Path(self.state.adapters.folder) if self.state.adapters else None

    @cached_property
    def weights(self) -> WeightsReader:
        """Its weights, verified: silently taking an older checkpoint would be a lie. Collective."""
        return open_weights(self.checkpoint, check=verify_together)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """Its shapes and precision, on the meta device."""
        shapes = skeleton(self.run, self.config, self.trained.auto_model)
        generate_as(shapes, self.checkpoint)
        return shapes

    def check_head(self, auto_model: str) -> None:
        """Refuse what the model was not trained as."""
        if auto_model not in (ENCODER.auto_model, self.trained.auto_model):
            raise no_head(auto_model, self.name, type(self.skeleton).__name__)

    def engine(
        self,
        auto_model: str | None = None,
        how: Inference = Inference(),
        *,
        reader: WeightsReader | None = None,
    ) -> InferenceEngine:
        """Return the model as it was trained, or as another class of transformers has it; with
        other weights, where ``reader`` has them. Collective.
        """
        disable_progress_bar()  # type: ignore[no-untyped-call]
        reader = reader or self.weights  # before any small file is believed
        wanted = auto_model or self.trained.auto_model
        self.check_head(wanted)
        return filled(
            self.skeleton.config,
            wanted,
            reader,
            how,
            name=self.name,
            folder=self.checkpoint,
            precision=how.precision or self.run.engine.precision,
            trust_remote_code=self.run.model.trust_remote_code,
        )


def check_live(
    objective: Objective,
    model: Callable[..., object],
    *,
    device: torch.device | str,
    said: schema.Model,
) -> None:
    """Refuse a live model, in eval mode, that ``objective`` cannot be used with. Whoever makes one
    asks this: training, scoring, predicting, exporting. Collective, in a group.

    Raises:
        ConfigError: with the remedy; ``said`` is what the user said of the model.
    """
    config = objective.setting.model_config
    if config is not None:
        check_padding(config, objective.setting.tokenizer)
    accepted(partial(objective.check, model, device=device), said)
