"""What is to be done with the MODEL on a command line: settled on the login node, with nothing read
of its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from hfscale.checkpoint import layout
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.inference import PredictConfig
from hfscale.config.load import load_values
from hfscale.config.schema import RunConfig
from hfscale.errors import ConfigError
from hfscale.log import logger
from hfscale.models.build import longest_row
from hfscale.run.model import Model, RunModel
from hfscale.stream.labelled import LabelledData
from hfscale.tasks.base import Example
from hfscale.tasks.table import TASKS, code_digest, task_class


def tell_of_best(model: RunModel) -> None:
    """Say so where a run's name stands for its newest checkpoint, and an older one was better."""
    step, best = layout.step_of(model.checkpoint), model.state.best
    named = "@" in model.name or Path(model.name).absolute() == model.checkpoint.absolute()
    if best and not named and best.step != step:
        logger.info(
            f"this is the newest checkpoint, of step {step}; the best by {best.metric} is "
            f"{model.name}@best, of step {best.step}"
        )


def is_pretraining(model: Model, data: str | None) -> bool:
    """Return whether ``model`` is to be evaluated on shards, where no task is named."""
    if data is not None:
        return (Path(data) / "manifest.json").is_file() or Path(data).name == "manifest.json"
    return isinstance(model, RunModel) and isinstance(model.run, RunConfig)


def settle(
    model: Model | None,
    *,
    task: str | None,
    data: str | None,
    out: Path,
    overrides: Sequence[str],
    answers: bool = False,
) -> PredictConfig:
    """Return what predicting with ``model`` means: as its run was trained, or as its architecture
    suggests; ``overrides`` go on top.

    Without a model there are predictions already. An override is of a section
    (``data.columns.text=review``), or else of the task's options. Without ``data`` it is the
    held-out split of the run. Nothing is read of the weights.

    Raises:
        UserError: if there is no such model, or nothing says the task or the data.
    """
    values: dict[str, dict[str, object]] = {
        "predict": {
            "model": model.address if model else "-",
            "name": model.name if model else "",
            "out": str(out),
            "answers": answers,
        },
        "task": {"name": task, "options": {}},
        "data": {},
        "engine": {},
        "cluster": {},
    }
    if isinstance(model, RunModel):
        _as_trained(values, model, data=data)
    elif model is not None:
        _as_suggested(values, model)
    _check_task(values["task"]["name"], model, answers=answers)
    if data is None and "train" not in values["data"]:
        raise ConfigError(
            "nothing says which examples to score the model on",
            where="--data",
            value=model and model.name,
            remedy="--data FILE",
        )
    if data:
        values["data"]["train"] = data
    sections = [
        f"{'' if text.split('.')[0] in values or '=' not in text else 'task.options.'}{text}"
        for text in overrides
    ]
    return load_values(values, sections, schema=PredictConfig)


def _check_task(name: object, model: Model | None, *, answers: bool) -> None:
    if name is None:
        raise ConfigError(
            "nothing says what this model is for",
            where="--task",
            value=model and model.name,
            remedy=f"name the task: {', '.join(TASKS)}",
        )
    if answers and not task_class(str(name)).scored:
        raise ConfigError(
            "this task only predicts: there are no answers to score",
            where="--task",
            value=name,
            remedy="hfscale predict; a language model is scored on shards: --data MANIFEST, "
            "without --task",
        )


def examples_of(config: PredictConfig) -> Iterator[Example]:
    """Yield the examples asked for; without their answers, where these do not matter.

    Raises:
        DataError: as ``read_examples``.
    """
    kind, wanted = task_class(config.task.name), config.predict
    for example in LabelledData(config.data, kind, about="").examples(
        wanted.split, answers=wanted.answers
    ):
        yield (
            example
            if wanted.answers
            else {role: value for role, value in example.items() if role not in kind.answers}
        )


def key_of(config: PredictConfig, model: Model) -> dict[str, str]:
    """Return digests of all that the predictions depend on: model, data, task."""
    kind, data = task_class(config.task.name), config.data
    how = f"{data.max_length} {data.too_long} {config.predict.answers} {config.engine.precision}"
    task = f"{code_digest(kind)} {config.task.model_dump_json()} {how}"
    return {
        "model": model.digest,
        "data": LabelledData(data, kind, about="").digest(config.predict.split),
        "task": hashlib.blake2b(task.encode(), digest_size=16).hexdigest(),
    }


def _as_trained(values: dict[str, dict[str, object]], model: RunModel, *, data: str | None) -> None:
    """Complete ``values`` by what the run of ``model`` was trained for, and on."""
    tell_of_best(model)
    run, task = model.run, values["task"]
    values["data"]["max_length"] = run.data.seq_len
    if not isinstance(run, FinetuneConfig):
        task["name"] = task["name"] or (model.purpose and model.purpose.task)
        return
    task["name"] = task["name"] or run.task.name
    if task["name"] != run.task.name:
        return
    task["options"] = run.task.options
    splits = {"train", "validation", "test"} if data else None
    values["data"] = run.data.model_dump(mode="json", exclude=splits)
    held_out = "test" if run.data.test else "validation"
    values["predict"]["split"] = "train" if data else held_out


def _as_suggested(values: dict[str, dict[str, object]], model: Model) -> None:
    """Complete ``values`` by what a folder says of its model: an export of ours its task, others
    their architecture.
    """
    model.read()
    task, own = values["task"], getattr(model.config, "hfscale", None)
    values["data"]["max_length"] = min(512, longest_row(model.config) or 512)
    if own and task["name"] in (None, own["task"]["name"]):
        values["task"] = dict(own["task"])
        values["data"]["max_length"] = own["max_length"]
    elif model.purpose:
        task["name"] = task["name"] or model.purpose.task
