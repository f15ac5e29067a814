"""Scores of a model: of a task, from a file of predictions and the references; without one, loss, perplexity and bits per byte on shards.

    EVALUATIONS/NAME/step-00001000-KEY/predictions.jsonl   made by jobs/predict.py
    EVALUATIONS/NAME/step-00001000-KEY/scores.json         what is printed, with confidence intervals

KEY digests model, data and task, so what was evaluated once is found again. EVALUATIONS is in the run directory, or here.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hfscale.checkpoint import layout
from hfscale.config.finetune import PredictConfig
from hfscale.config.load import flatten, load_values
from hfscale.config.schema import RunConfig
from hfscale.dist.group import default_device
from hfscale.errors import ConfigError, DataError
from hfscale.hub import local_folder
from hfscale.jobs.material import open_rows
from hfscale.jobs.opening import model_and_tokenizer, open_run, run_config
from hfscale.jobs.predict import examples_of, key_of
from hfscale.log import progress_bar
from hfscale.metrics.language_model import language_model
from hfscale.metrics.measure import Measure
from hfscale.objectives.base import Objective, Setting, check_options, load_objective
from hfscale.shards.files import write_atomically
from hfscale.shards.tables import table_rows
from hfscale.stream.loader import EvaluationRows
from hfscale.stream.text import HeldOutText, open_encoders
from hfscale.tasks.base import task_class

FOLDER, SCORES, PREDICTIONS = "evaluations", "scores.json", "predictions.jsonl"
OF_ARCHITECTURES = {"ForCausalLM": "clm", "LMHeadModel": "clm", "ForMaskedLM": "mlm"}


def folder_of(name: str, what: str, key: dict[str, str]) -> Path:
    """Return where the evaluation of MODEL ``name`` belongs: in its run, or here."""
    short = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=4).hexdigest()
    if (checkpoint := layout.checkpoint_of(name)) is None:
        return Path(FOLDER).absolute() / what / f"{Path(name).name}-{short}"
    return checkpoint.resolve().parents[1] / FOLDER / what / f"{checkpoint.name}-{short}"


def with_folder(config: PredictConfig) -> PredictConfig:
    """Return ``config`` with its predictions in the folder of its evaluation."""
    table, split = Path(config.data.train), config.predict.split
    what = f"{config.task.name}-{split if config.data.validation or config.data.test else table.name.split('.')[0]}"
    out = folder_of(config.predict.model, what, key_of(config)) / PREDICTIONS
    out.parent.mkdir(parents=True, exist_ok=True)
    return config.model_copy(update={"predict": config.predict.model_copy(update={"out": out})})


def score(config: PredictConfig, predictions: Path, *, model: bool = True) -> dict[str, Any]:
    """Return the scores of a file of predictions. Of the ``model`` only what it says of labels is read, or nothing at all.

    Raises:
        DataError: if a line is broken, or predictions and references are not of the same examples.
    """
    kind = task_class(config.task.name)
    options = check_options(kind.Options, config.task.options, where="task.options")
    rows = dict[str, dict[str, Any]]()
    for where, row in table_rows(predictions):
        if (name := str(row.get("id"))) in rows or not {"prediction", "problem"} & row.keys():
            raise DataError("an id occurs twice" if name in rows else "there is no prediction", where=where, value=str(row)[:80],
                            remedy='one line for each example: {"id": ..., "prediction": ...}')
        rows[name] = row
    references = list(examples_of(config))
    missing = [example["id"] for example in references if example["id"] not in rows]
    if missing or len(rows) != len(references):
        count = f"{len(rows):,} predictions for {len(references):,} examples"
        raise DataError(f"{count}, {len(missing):,} of which have none", where=predictions, value=missing[:5],
                        remedy="give the predictions of these examples, whole; ids must be the same")
    usable = [example for example in references if "problem" not in rows[example["id"]]]
    facts: dict[str, Any] = {}
    if model:
        checkpoint = layout.checkpoint_of(config.predict.model)
        state = json.loads((checkpoint / layout.STATE).read_text("utf-8")) if checkpoint else {}
        facts = state.get("facts") or kind.known(model_and_tokenizer(config.predict.model)[0])
    facts = facts or kind.facts(options, iter(usable))
    task = kind(options, Setting(seq_len=config.data.max_length, facts=facts))
    chosen = [rows[example["id"]] for example in usable]
    try:
        said = described(task.measure(chosen, usable)) | {"scores": task.score(chosen, usable)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if predictions == config.predict.out:  # made here: a defect
            raise
        raise DataError("these are no predictions of this task", where=predictions, value=repr(error),
                        remedy=f"give what hfscale predict --task {config.task.name} writes") from error
    return {"task": config.task.name, "options": config.task.options, "left_out": len(references) - len(usable), **said}


def described(measure: Measure) -> dict[str, Any]:
    """Return what ``scores.json`` says of a measure; what is not a number is null."""
    intervals = measure.intervals()
    return {"examples": measure.examples, "scores": measure.scores(), "intervals": {name: [*ends] for name, ends in intervals.items()},
            "notes": measure.notes}


def on_shards(name: str, shards: str | None, overrides: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Return the scores of a language model on shards (of a run: on its validation), and where they are kept; found there if they are.

    Raises:
        UserError: if there is no such model or shards, or they do not fit together, or the model has no perplexity.
    """
    config = _shard_config(name, shards, overrides)
    run = open_run(name)
    model_config, tokenizer = (run.skeleton.config, run.tokenizer) if run else model_and_tokenizer(name)
    rows = open_rows(config.data.sources[0].shards, config, tokenizer)
    folder = layout.checkpoint_of(name) or local_folder(name, where="MODEL")
    cut = config.data.model_dump_json(exclude={"sources", "validation"})
    key = {"model": str(folder.absolute()), "data": rows.fingerprint, "config": cut}
    home = folder_of(name, "shards", key)
    if (home / SCORES).is_file():
        return home, json.loads((home / SCORES).read_text("utf-8"))
    objective = load_objective(config.objective, Setting(seq_len=config.data.seq_len, cross_document=config.data.cross_document,
                                                         micro_batch=config.train.micro_batch, tokenizer=tokenizer,
                                                         seed=config.run.seed, model_config=model_config))
    if not objective.token_loss:
        raise ConfigError("such a model has no perplexity", where=name, value=config.objective.name, remedy="name a task: --task")
    import transformers

    model: Any = run.model() if run else getattr(transformers, objective.auto_model).from_pretrained(folder).eval()
    count = config.data.validation.rows if config.data.validation else None
    if rows.raw:
        rows = HeldOutText(rows, open_encoders(config, tokenizer), count=count or int(rows.shard_rows.sum()))
    scored = EvaluationRows(rows, count=count or 2**62, micro_batch=config.train.micro_batch, rank=0, world_size=1)
    return home, _language_model_scores(objective, model.to(default_device()), scored, tokenizer)


@torch.no_grad()
def _language_model_scores(objective: Objective, model: Any, rows: EvaluationRows, tokenizer: Any) -> dict[str, Any]:
    nats, tokens, sizes = list[float](), list[int](), list[int]()
    [term, *_] = [term for term, weight in objective.weights().items() if weight]
    with progress_bar("evaluating", len(rows), unit=" batches") as bar:
        for micro in rows:
            batch = objective.collate(micro)
            sums_B = objective.loss(model, batch.to(model.device))[term].tolist()
            for labels_T, valid, total, count in zip(batch.labels_BT, micro.valid_B, sums_B, batch.counts[term].tolist(), strict=True):
                if valid and count:
                    nats.append(total)
                    tokens.append(count)
                    sizes.append(len(tokenizer.decode(labels_T[labels_T >= 0], skip_special_tokens=True).encode()))
            bar.update()
    found = described(language_model(nats, tokens, sizes))
    for figures in (found["scores"], found["intervals"]) if not objective.causal else ():
        del figures["bits_per_byte"]  # of a text all of whose tokens are predicted
    return {"objective": term, "tokens": sum(tokens), **found}


def _shard_config(name: str, shards: str | None, overrides: Sequence[str]) -> RunConfig:
    """Return the config that says how ``shards`` are read for the model: its run's own, or one that its architecture suggests."""
    if checkpoint := layout.checkpoint_of(name):
        trained = run_config(checkpoint)
        if not isinstance(trained, RunConfig):
            raise ConfigError("this run was fine-tuned; it is evaluated on examples", where=name, remedy="--data FILE, or a test split")
        values = trained.model_dump(mode="json", by_alias=True)
        if shards is None and trained.data.validation is None:
            raise ConfigError("this run has no validation shards", where=name, remedy="name shards: --data MANIFEST")
        if shards is None:
            values["data"]["sources"] = [{"shards": values["data"]["validation"]["shards"]}]
    else:
        model_config, _ = model_and_tokenizer(name)
        architecture = (model_config.architectures or [""])[0]
        objective = next((found for end, found in OF_ARCHITECTURES.items() if architecture.endswith(end)), None)
        if shards is None or objective is None:
            raise ConfigError("nothing says on what to evaluate this model", where=name, value=architecture,
                              remedy="--task NAME --data FILE; or, of a language model, --data MANIFEST of shards")
        values = {"run": {"name": "evaluate"}, "tokenizer": {"path": name}, "model": {"pretrained": name}, "objective": {"name": objective},
                  "data": {"seq_len": min(1024, getattr(model_config, "max_position_embeddings", 1024))},
                  "train": {"steps": 1, "global_batch": 8, "micro_batch": 8}}
    if shards is not None:
        values["data"] |= {"sources": [{"shards": shards}], "validation": None}
    values["data"] |= {"stages": []}
    values.get("checkpoint", {}).pop("keep_best", None)
    return load_values(values, overrides, schema=RunConfig)


def keep(folder: Path, model: str, found: dict[str, Any]) -> None:
    """Write scores to ``folder``, and of a run to its TensorBoard at the checkpoint's step."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SCORES, json.dumps({"model": model, **found}, indent=1, ensure_ascii=False).encode())
    if checkpoint := layout.checkpoint_of(model):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(checkpoint.resolve().parents[1] / "tensorboard" / FOLDER)) as board:
            for name, value in flatten(found["scores"]):
                with suppress(TypeError):  # null
                    board.add_scalar(f"{folder.parent.name}/{name}", value, layout.step_of(checkpoint))


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the scores of one or more models as lines, with their intervals."""
    lines = []
    for one in found:
        lines.append(f"{one['model']}  {one['examples']:,} {'rows' if 'objective' in one else 'examples'}")
        for name, value in one["scores"].items():
            low, high = one["intervals"].get(name, (None, None))
            lines.append(f"  {name:<24}{value:>12.4f}" + (f"   95 % [{low:.4f}, {high:.4f}]" if low is not None else ""))
        lines += [f"  {name}: {note}" for name, note in one["notes"].items()]
    return "\n".join(lines)
