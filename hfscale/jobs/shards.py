"""A language model on shards: loss, perplexity and bits per byte; each row is scored once, whatever
the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from hfscale.config import permission
from hfscale.config.inference import ShardsConfig
from hfscale.config.load import load_values
from hfscale.config.schema import RunConfig
from hfscale.dist import group
from hfscale.dist.agree import from_all_ranks
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import World
from hfscale.engine.inference import InferenceEngine
from hfscale.errors import ConfigError, DataError
from hfscale.jobs.evaluate import described, folder_of, keep
from hfscale.log import progress_bar
from hfscale.metrics.kept import Scores
from hfscale.metrics.language_model import language_model
from hfscale.metrics.token_bytes import TokenBytes
from hfscale.models.build import longest_row
from hfscale.models.kinds import CAUSAL, MASKED
from hfscale.objectives.base import Objective, Setting, load_objective
from hfscale.run.model import Model, RunModel, find
from hfscale.run.tokens import held_out_rows, open_rows
from hfscale.stream.loader import EvaluationRows
from hfscale.tokenizer import end_of_document_id
from hfscale.training.predictor import stopped

VERSION = 2  # of how scores are made: others are not found again


def settle(model: Model, shards: str | None, overrides: Sequence[str]) -> ShardsConfig:
    """Return what scoring ``model`` on ``shards`` (of a run: on its validation) means, and
    where its scores are kept.

    Nothing is read of the weights.

    Raises:
        UserError: if there is no such model or shards, or they do not fit together, or the model
            has no perplexity.
    """
    model.read()
    values = _values(model, shards) | {"evaluate": {"model": model.name, "out": "."}}
    # a permission to run a model's code is its run's, which was asked by now
    asked = [one for one in overrides if one.partition("=")[0].strip() != permission.CODE]
    config = load_values(values, asked, schema=ShardsConfig)
    if config.data.allow_pipe:
        permission.grant([f"{permission.PIPE}=true"])  # said now, or of its run: to a job, too
    if not _objective(config)(_setting(config, model)).token_loss:
        raise ConfigError(
            "such a model has no perplexity",
            where=model.name,
            value=config.objective.name,
            remedy="name a task: --task",
        )
    rows = open_rows(config.data.sources[0].shards, config, model.tokenizer)
    vocab_size = model.config.get_text_config().vocab_size
    if rows.manifest.max_id >= vocab_size:
        raise DataError(
            "these shards hold ids that the model does not have",
            where=config.data.sources[0].shards,
            value=f"id {rows.manifest.max_id}, vocabulary {vocab_size}",
            remedy="name the model that its tokenizer belongs to, or train from it, which makes "
            "it larger",
        )
    cut = config.data.model_dump_json(exclude={"sources", "validation"})
    key = {
        "model": model.digest,
        "data": rows.fingerprint,
        "config": f"{cut} {config.engine.precision} {VERSION}",
    }
    # a run goes on meanwhile
    where = {
        "model": str(model.weights_folder.absolute()),
        "out": folder_of(model, "shards", key),
    }
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=where)})


def _values(model: Model, shards: str | None) -> dict[str, dict[str, object]]:
    """Return what says how shards are read for the model: its run's config, or one that its
    architecture suggests.
    """
    if isinstance(model, RunModel):
        trained = model.run
        if not isinstance(trained, RunConfig):
            raise ConfigError(
                "this run was fine-tuned; it is evaluated on examples",
                where=model.name,
                remedy="--data FILE, or a test split",
            )
        values: dict[str, dict[str, object]] = {
            "tokenizer": trained.tokenizer.model_dump(),
            "objective": trained.objective.model_dump(),
            "data": trained.data.model_dump(mode="json"),
            "run": {"seed": trained.run.seed},
            "train": {"micro_batch": trained.train.micro_batch},
        }
        held_out = trained.data.validation
        if shards is None and held_out is None:
            raise ConfigError(
                "this run has no validation shards",
                where=model.name,
                remedy="name shards: --data MANIFEST",
            )
        if shards is None and held_out is not None:
            values["data"]["sources"] = [{"shards": held_out.shards}]
    else:
        purpose = model.purpose
        if shards is None or purpose not in (CAUSAL, MASKED):  # what T5 heard of, nobody says
            raise ConfigError(
                "nothing says on what to evaluate this model",
                where=model.name,
                value=model.kind,
                remedy="--task NAME --data FILE; or, of a language model, --data MANIFEST of "
                "shards",
            )
        values = {
            "tokenizer": {"path": model.name},
            "objective": {"name": purpose.objective},
            "data": {"seq_len": min(1024, longest_row(model.config) or 1024)},
        }
    if shards is not None:
        values["data"] |= {"sources": [{"shards": shards}], "validation": None}
    values["data"] |= {"stages": []}
    return values


def _objective(config: ShardsConfig) -> Callable[[Setting], Objective]:
    return partial(load_objective, config.objective)


def _setting(config: ShardsConfig, model: Model) -> Setting:
    return Setting(
        seq_len=config.data.seq_len,
        cross_document=config.data.cross_document,
        micro_batch=config.train.micro_batch,
        tokenizer=model.tokenizer,
        seed=config.run.seed,
    )


def run(config: ShardsConfig, world: World, stop: StopRequest) -> bool:
    """Return True when the scores are kept, False when stopped before: they are soon made again,
    from the start.
    """
    model, make = find(config.evaluate.model), _objective(config)
    with group.joined(world, needed=world.all.size > 1 or config.engine.zero_stage == 3):
        setting = _setting(config, model)
        engine = model.engine(make(setting).auto_model, config.engine)
        objective = model.objective(make, setting, engine)
        count = config.data.validation.rows if config.data.validation else None
        rows = open_rows(config.data.sources[0].shards, config, model.tokenizer)
        scored = held_out_rows(rows, config, objective, world, count=count)
        scores = _scores(objective, engine, scored, model, stop)
        engine.close()
        if scores and world.all.rank == 0:
            keep(config.evaluate.out, model, scores)
    return scores is not None


@torch.no_grad()
def _scores(
    objective: Objective,
    engine: InferenceEngine,
    rows: EvaluationRows,
    model: Model,
    stop: StopRequest,
) -> Scores | None:
    """Return the scores of the rows of all ranks; None if one of them was asked to stop."""
    tokenizer = model.tokenizer
    mine = list[tuple[int, float, int, int]]()  # of a row: its position, nats, tokens, bytes
    unknown = ""  # why bytes are not known
    try:
        end_id = end_of_document_id(tokenizer)
        token_bytes = TokenBytes(tokenizer, end_id=end_id) if objective.causal else None
    except DataError as error:
        token_bytes, unknown = None, error.what
    [term, *_] = [term for term, weight in objective.weights().items() if weight]
    title = "evaluating" if engine.all.rank == 0 else ""
    with progress_bar(title, len(rows), unit=" batches") as bar:
        for micro in rows:
            if stopped(stop, together=engine.all.size > 1):
                return None
            batch = objective.collate(micro)
            nats_B = objective.loss(engine, batch.to(engine.device))[term].tolist()
            tokens_B = batch.counts[term].tolist()
            bytes_B = [0] * len(nats_B)
            if token_bytes is not None:
                sizes_B = [
                    token_bytes.of(ids_L, np.concatenate([[False], labels_T >= 0]))
                    for ids_L, labels_T in zip(
                        micro.ids_BL.numpy(), batch.labels_BT.numpy(), strict=True
                    )
                ]
                if None in sizes_B:
                    unknown = "unknown tokens do not say of how many bytes they are"
                bytes_B = [size or 0 for size in sizes_B]
            lines = zip(micro.position.tolist(), nats_B, tokens_B, bytes_B, strict=True)
            mine += [
                line for line, valid in zip(lines, micro.valid_B, strict=True) if valid and line[2]
            ]
            bar.update()
    _, nats, tokens, sizes = zip(
        *sorted(line for part in from_all_ranks(mine) for line in part), strict=True
    )
    unknown = next((why for why in from_all_ranks(unknown) if why), "")
    known = objective.causal and not unknown  # of a text all of whose tokens are predicted
    scores = described(language_model(nats, tokens, sizes if known else None), model=model.name)
    more = {"bits_per_byte": f"not given: {unknown}"} if unknown else {}
    return scores.model_copy(
        update={"objective": term, "tokens": sum(tokens), "notes": scores.notes | more}
    )
