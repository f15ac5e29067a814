"""Predictions of every kind of task at ZeRO 3 on two ranks, uneven and empty shares among them:
those of one process that has all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfscale.config.inference import Inference
from hfscale.dist.stop import StopRequest
from hfscale.engine.inference import InferenceEngine
from hfscale.models.build import construct
from hfscale.training.predictor import predict
from tests.helpers.ranks import run_ranks
from tests.tasks.kit import marking_tokenizer
from tests.tasks.toys import load

SPLIT_ALL = Inference(
    zero_stage=3, extra={"zero_optimization": {"stage3_param_persistence_threshold": 0}}
)
LONG = "The old river ran slowly under the bridge. " * 9
TASKS: dict[str, dict[str, Any]] = {  # task -> family of the model, facts, options, examples
    "extractive_qa": {
        "family": "bert",
        "facts": {"no_answer": True},
        "options": {"stride": 8},
        "examples": [{"question": "what ran?", "context": LONG[: 80 * n + 20]} for n in range(5)],
    },
    "token_classification": {
        "family": "bert",
        "facts": {"labels": ["B-X", "I-X", "O"]},
        "examples": [{"words": LONG.split()[: 3 + 9 * n]} for n in range(5)],
    },
    "sequence_classification": {
        "family": "bert",
        "facts": {"problem": "single_label_classification", "labels": ["no", "yes"]},
        "examples": [{"text": text} for text in ("a river", "", "old", "slow", "the bridge")],
    },
    "embedding": {
        "family": "bert",
        "examples": [{"text": text} for text in ("a river", "old", "slow", "the bridge", "ran")],
    },
    "fill_mask": {
        "family": "bert",
        "examples": [
            {"text": f"{text} [MASK] ran"} for text in ("a", "the old river", "the", "old", "no")
        ],
    },
    "instruction": {
        "family": "gpt2",
        "options": {"generation": {"max_new_tokens": 4}},
        "examples": [{"prompt": text} for text in ("a", "the old", "the", "old river", "no")],
    },
    "translation": {
        "family": "t5",
        "options": {"max_target_length": 6, "generation": {"num_beams": 2}},
        "examples": [
            {"source": text} for text in ("a", "the old river ran", "the", "old river", "no")
        ],
    },
}


def parts(name: str, words: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    how = TASKS[name]
    task, model = load(
        name, words, family=how["family"], facts=how.get("facts"), **how.get("options", {})
    )
    return (
        task,
        model,
        [{"id": str(number), **example} for number, example in enumerate(how["examples"])],
    )


def rounded(value: Any) -> Any:
    """Return the value with numbers that can be compared: kernels round by where weights lie in the
    memory.
    """
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value


def on_ranks(name: str, words: Any, cuts: list[int]) -> list[list[dict[str, Any]]]:
    """Return this rank's predictions when it has the first ``cut`` examples, or the rest."""
    task, bare, examples = parts(name, words)
    state = bare.state_dict()
    engine = InferenceEngine.create(
        lambda context: construct(
            bare.config, task.auto_model, dtype=torch.float32, context=context
        ),
        how=SPLIT_ALL,
        precision="fp32",
        device=torch.device("cpu"),
    )
    engine.module.tie_weights()
    with torch.no_grad():
        for fragment in engine.fragments():
            fragment.tensors["weight"].copy_(
                state[fragment.name].flatten()[fragment.start : fragment.start + fragment.numel]
            )
    made = [
        predict(task, engine, examples[:cut] if engine.all.rank == 0 else examples[cut:], batch=2)
        for cut in cuts
    ]
    engine.close()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_uneven_ranks_give_the_predictions_of_one(name: str) -> None:
    cuts = [1, 5]  # one example against four; all against none
    # wordpiece: no two trainings are the same
    words = marking_tokenizer("wordpiece" if TASKS[name]["family"] == "bert" else "bpe")
    first, second = run_ranks(on_ranks, 2, name, words, cuts)
    task, model, examples = parts(name, words)
    for turn, cut in enumerate(cuts):
        for got, mine in ((first[turn], examples[:cut]), (second[turn], examples[cut:])):
            assert got == rounded(predict(task, InferenceEngine(model), mine, batch=2))
    assert len({str(row | {"id": None}) for row in second[0] if "problem" not in row}) > 1, (
        "scores and all"
    )


def test_a_request_to_stop_is_looked_at_before_each_batch() -> None:
    task, model, examples = parts("sequence_classification", marking_tokenizer("wordpiece"))
    engine, stop, asked = InferenceEngine(model, device=torch.device("cpu")), StopRequest(), []
    answer = task.predict

    def count(*args: Any) -> Any:
        asked.append(args)
        stop.reason = "SIGINT"
        return answer(*args)

    task.predict = count
    assert predict(task, engine, examples, batch=1, stop=stop) is None
    assert len(asked) == 1
