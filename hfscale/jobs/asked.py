"""What MODEL on a command line means, and what is to be done with it: settled on the login node,
with nothing read of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerFast

from hfscale.checkpoint import layout
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.inference import PredictConfig
from hfscale.config.load import load_values
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.errors import CheckpointError, ConfigError
from hfscale.hub import checked_files, local_folder
from hfscale.jobs.material import run_config, tokenizer_folder
from hfscale.log import logger
from hfscale.models.build import longest_row, read_config
from hfscale.models.kinds import BY_CLASS, architecture, purpose_of
from hfscale.objectives.base import Objective, Setting, load_objective
from hfscale.tasks.base import TASKS, load_task, task_class
from hfscale.tokenizer import load_tokenizer


def objective_of(config: TrainConfig, checkpoint: Path) -> Objective:
    """Return the objective or task of a run, with what its training examples said."""
    facts = layout.state_of(checkpoint).facts
    setting = Setting(
        seq_len=config.data.seq_len,
        tokenizer=load_tokenizer(tokenizer_folder(config, None)),
        facts=facts,
    )
    if isinstance(config, FinetuneConfig):
        return load_task(config.task, setting)
    assert isinstance(config, RunConfig)
    return load_objective(config.objective, setting)


def tell_of_best(name: str, checkpoint: Path) -> None:
    """Say so where a run's name stands for its newest checkpoint, and an older one was better."""
    best = layout.state_of(checkpoint).best
    named = "@" in name or Path(name).absolute() == checkpoint.absolute()
    if best and not named and best.step != layout.step_of(checkpoint):
        logger.info(
            f"this is the newest checkpoint, of step {layout.step_of(checkpoint)}; the best by "
            f"{best.metric} is {name}@best, of step {best.step}"
        )


def auto_model_of(name: str) -> str:
    """Return the class of transformers that MODEL ``name`` is one of; its own name, where it is for
    no text.
    """
    if checkpoint := layout.checkpoint_of(name):
        return objective_of(run_config(checkpoint), checkpoint).auto_model
    config, _ = model_and_tokenizer(name)
    purpose = purpose_of(config)
    return purpose.auto_model if purpose else architecture(config)


def brings_code(name: str) -> CheckpointError:
    """Return the error to raise for a MODEL that only code of its own can open."""
    return CheckpointError(
        "this model brings code of its own, which is not run",
        where=name,
        remedy="name a model that transformers knows itself; training from it: "
        "model.pretrained=FOLDER model.trust_remote_code=true",
    )


def model_and_tokenizer(name: str) -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """Return the config and tokenizer of MODEL ``name``; nothing is read of the weights."""
    if checkpoint := layout.checkpoint_of(name):
        run = run_config(checkpoint)
        config = read_config(
            checked_files(checkpoint),
            where="MODEL",
            trust_remote_code=run.model.trust_remote_code,
        )
        return config, load_tokenizer(tokenizer_folder(run, None))
    folder = local_folder(
        name, where="MODEL", remedy="name a run, a checkpoint, an export, a transformers folder"
    )
    return read_config(folder, where="MODEL"), load_tokenizer(folder)


def is_pretraining(name: str, data: str | None) -> bool:
    """Return whether MODEL ``name`` is to be evaluated on shards, where no task is named."""
    if data is not None:
        return (Path(data) / "manifest.json").is_file() or Path(data).name == "manifest.json"
    checkpoint = layout.checkpoint_of(name)
    return checkpoint is not None and isinstance(run_config(checkpoint), RunConfig)


def settle(
    name: str | None,
    *,
    task: str | None,
    data: str | None,
    out: Path,
    overrides: Sequence[str],
    answers: bool = False,
) -> PredictConfig:
    """Return what predicting with MODEL ``name`` means: as its run was trained, or as its
    architecture suggests; ``overrides`` go on top.

    Without a name there are predictions already. An override is of a section
    (``data.columns.text=review``), or else of the task's options. Without ``data`` it is the
    held-out split of the run. Nothing is read of the weights.

    Raises:
        UserError: if there is no such model, or nothing says the task or the data.
    """
    values: dict[str, Any] = {
        "predict": {"model": name or "-", "out": str(out), "answers": answers},
        "task": {"options": {}},
        "data": {},
        "engine": {},
    }
    suggested, checkpoint = None, None if name is None else layout.checkpoint_of(name)
    if checkpoint:
        tell_of_best(str(name), checkpoint)
        values["predict"]["model"] = str(checkpoint.absolute())  # a run goes on meanwhile
        trained: Any = run_config(checkpoint)
        if isinstance(trained, FinetuneConfig):
            suggested = trained.task.name
        else:
            purpose = BY_CLASS.get(objective_of(trained, checkpoint).auto_model)
            suggested = purpose.task if purpose else None
        values["data"]["max_length"] = trained.data.seq_len
        if isinstance(trained, FinetuneConfig) and task in (None, trained.task.name):
            values["task"]["options"] = trained.task.options
            values["data"] = trained.data.model_dump(
                mode="json", exclude={"train", "validation", "test"} if data else None
            )
            values["predict"]["split"] = (
                "train" if data else "test" if trained.data.test else "validation"
            )
    elif name is not None:
        config, _ = model_and_tokenizer(name)
        purpose = purpose_of(config)
        suggested = purpose.task if purpose else None
        values["data"]["max_length"] = min(512, longest_row(config) or 512)
        if (said := getattr(config, "hfscale", None)) and task in (
            None,
            said["task"]["name"],
        ):  # an export of ours
            suggested, values["task"]["options"] = said["task"]["name"], said["task"]["options"]
            values["data"]["max_length"] = said["max_length"]
    values["task"]["name"] = task or suggested
    if values["task"]["name"] is None:
        raise ConfigError(
            "nothing says what this model is for",
            where="--task",
            value=name,
            remedy=f"name the task: {', '.join(TASKS)}",
        )
    if answers and not task_class(values["task"]["name"]).scored:
        raise ConfigError(
            "this task only predicts: there are no answers to score",
            where="--task",
            value=values["task"]["name"],
            remedy="hfscale predict; a language model is scored on shards: --data MANIFEST, "
            "without --task",
        )
    if data is None and "train" not in values["data"]:
        raise ConfigError(
            "nothing says which examples to score the model on",
            where="--data",
            value=name,
            remedy="--data FILE",
        )
    if data:
        values["data"]["train"] = data
    sections = [
        f"{'' if text.split('.')[0] in values or '=' not in text else 'task.options.'}{text}"
        for text in overrides
    ]
    return load_values(values, sections, schema=PredictConfig)
