"""Tasks of EleutherAI's lm-evaluation-harness (Gao et al. 2024, arXiv 2405.14782) on a model by
name, held at any ZeRO stage.

The harness asks three things of a model (loglikelihood, loglikelihood_rolling, generate_until). Its
own wrapper of transformers' models answers them, around our engine: every rank is asked everything,
computes its share, and gets the others' answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from pydantic import Field
from transformers import PreTrainedTokenizerFast

from hfscale.config.inference import HarnessConfig
from hfscale.config.load import load_values
from hfscale.dist import group
from hfscale.dist.agree import from_all_ranks
from hfscale.dist.stop import StopRequest
from hfscale.dist.world import World
from hfscale.engine.inference import InferenceEngine
from hfscale.errors import ConfigError, DataError, nearest
from hfscale.jobs.evaluate import caution, folder_of, keep
from hfscale.metrics.kept import Scores
from hfscale.metrics.measure import Proportion
from hfscale.models.kinds import WRITERS
from hfscale.objectives.base import Objective, Setting
from hfscale.records import Count, Record
from hfscale.run.model import Model, find

PROPORTIONS = ("acc", "acc_norm", "exact_match")  # metrics that are 0 or 1 of each example
PROBED = 16  # tokens, of which the later are changed to see whether the earlier notice


Q = TypeVar("Q")  # a request
A = TypeVar("A")  # its answer


class EngineLM(HFLM):  # type: ignore[misc]  # which says no types
    """Our engine as the harness wants a model. All ranks get the same requests, in the same
    order.
    """

    def __init__(
        self, engine: InferenceEngine, tokenizer: PreTrainedTokenizerFast, batch: int
    ) -> None:
        logging.disable(logging.WARNING)  # of advice for models that the harness would open itself
        # which would make passes uneven
        super().__init__(engine.module, tokenizer=tokenizer, batch_size=batch, logits_cache=False)
        logging.disable(logging.NOTSET)
        tokenizer.split_special_tokens = True  # a task's text that spells a control token is text
        self._engine = engine

    def _dealt(self, requests: list[Q], answer: Callable[[list[Q]], list[A]]) -> list[A]:
        """Return the answers to all, a share from each rank; shares are filled up to equal size, so
        each makes as many passes.
        """
        rank, ranks = self._engine.all.rank, self._engine.all.size
        filled = requests + requests[:1] * (-len(requests) % ranks)
        parts = from_all_ranks(answer(filled[rank::ranks]))
        return [parts[number % ranks][number // ranks] for number in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Iterable[object], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers = self._dealt(
            [*requests],
            lambda some: HFLM._loglikelihood_tokens(self, some, disable_tqdm=disable_tqdm),
        )
        return [(logprob, greedy) for logprob, greedy in answers]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        settings = [str(request.args[1]) for request in requests]
        answers = dict[int, str]()
        for _, same in groupby(
            sorted(range(len(requests)), key=settings.__getitem__), key=settings.__getitem__
        ):
            numbers = [*same]
            answers |= zip(
                numbers,
                self._dealt(
                    [requests[number] for number in numbers],
                    lambda some: HFLM.generate_until(self, some, disable_tqdm=disable_tqdm),
                ),
                strict=True,
            )
        return [answers[number] for number in range(len(requests))]

    def _model_generate(self, *args: object, **how: object) -> object:
        return super()._model_generate(*args, **how, synced_gpus=self._engine.together)


def settle(
    model: Model, tasks: Sequence[str], folder: Path | None, overrides: Sequence[str]
) -> HarnessConfig:
    """Return what scoring ``model`` on ``tasks`` means. With ``folder`` only its YAMLs are
    tasks; else those of the harness.

    Raises:
        UserError: if a task is unknown, or the model writes no text.
    """
    if _class(model) not in WRITERS:
        raise ConfigError(
            "the harness asks for likelihoods of texts, which this model does not give",
            where=model.name,
            value=model.kind,
            remedy="name a causal model or an encoder-decoder",
        )
    if unknown := [task for task in tasks if task not in _known(folder).all_tasks]:
        raise ConfigError(
            "there is no such task",
            where=folder or "--harness",
            value=unknown[0],
            remedy=nearest(unknown[0], _known(folder).all_tasks),
        )
    key = {"model": model.address, "tasks": ",".join(tasks), "folder": str(folder)}
    home = folder_of(model, "harness-" + "-".join(tasks)[:80], key)
    values = {
        "harness": {
            "model": model.address,
            "out": str(home),
            "tasks": [*tasks],
            "folder": folder and str(folder),
        }
    }
    return load_values(values, overrides, schema=HarnessConfig)


def run(config: HarnessConfig, world: World, stop: StopRequest) -> bool:
    """Return True when the scores are kept, with 95 % intervals. A stop saves nothing."""
    wanted, model = config.harness, find(config.harness.model)
    with group.joined(world, needed=world.all.size > 1 or config.engine.zero_stage == 3):
        auto_model = _class(model)
        engine = model.engine(auto_model, config.engine)
        # one that sees the future would be told the answers
        setting = Setting(seq_len=PROBED, tokenizer=model.framed)
        model.objective(partial(_Writing, auto_model), setting, engine)
        asked = EngineLM(engine, model.framed, wanted.batch)
        try:
            results = simple_evaluate(
                asked, tasks=[*wanted.tasks], task_manager=_known(wanted.folder)
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise DataError(
                "the data of a task cannot be read",
                where=", ".join(wanted.tasks),
                value=str(error).splitlines()[0],
                remedy="fetch it once where there is a network, or name tasks of files here: "
                "--harness-path",
            ) from error
        engine.close()
        if world.all.rank == 0:
            keep(wanted.out, model, _scores(_Results.model_validate(results), model.name))
    return True


def _class(model: Model) -> str:
    """Return the class of transformers that the harness asks, if it writes text."""
    return model.purpose.auto_model if model.purpose else ""


class _Writing(Objective):
    """What is asked of the live model: to write, as that class of transformers."""

    def __init__(self, auto_model: str, setting: Setting) -> None:
        self.auto_model = auto_model
        super().__init__(self.Options(), setting)


def _known(folder: Path | None) -> TaskManager:
    return TaskManager(
        include_path=str(folder) if folder else None, include_defaults=folder is None
    )


class _Counted(Record):
    """How many examples of a task were asked."""

    effective: Count


class _Results(Record):
    """What the harness gives, as far as it is kept."""

    results: dict[str, dict[str, object]]  # of each task: its name, and figures
    asked: dict[str, _Counted] = Field(alias="n-samples")
    versions: dict[str, object]


def _scores(made: _Results, model: str) -> Scores:
    """Return the scores of ``model`` that the harness found."""
    # my_task/acc, my_task/acc_stderr; after a comma the name of a filter
    figures = {
        f"{task}/{key}".removesuffix(",none"): value
        for task, some in made.results.items()
        for key, value in some.items()
        if isinstance(value, float)
    }
    scores = {key: value for key, value in figures.items() if "_stderr" not in key}
    errors = {
        key.replace("_stderr", ""): 1.96 * value
        for key, value in figures.items()
        if "_stderr" in key
    }
    intervals = {key: (scores[key] - half, scores[key] + half) for key, half in errors.items()}
    for key in errors.keys() & scores.keys():
        task, _, metric = key.rpartition("/")
        if metric.split(",")[0] in PROPORTIONS and task in made.asked:
            asked = made.asked[task].effective
            intervals[key] = Proportion(scores[key] * asked, asked).interval()
    examples = sum(count.effective for count in made.asked.values())
    return Scores(
        model=model,
        task="lm_eval",
        versions=made.versions,
        examples=examples,
        scores={**scores},
        intervals={
            key: (float(low), float(high)) for key, (low, high) in intervals.items() if low < high
        },
        notes=caution(examples),
    )
