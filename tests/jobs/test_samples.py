"""What a model writes while it is trained: to be read, and without a trace in the numbers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hfscale.config.schema import RunConfig
from hfscale.dist.world import World
from hfscale.errors import ConfigError
from hfscale.run.run import Run
from hfscale.training.sampler import SHOWN, Sample, markdown
from tests.helpers.corpus import run_values
from tests.helpers.labelled import task_values, write_jsonl
from tests.helpers.pretraining import PRETRAINING, extended_tokenizer, pretraining
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

EXACT = ("step", "loss", "grad_norm", "validation_loss", "batch_digest")
PROMPT = "def __init__(self<s>"  # a control token that a prompt spells is text


def exact(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: record.get(key) for key in EXACT} for record in records]


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def validated(corpus: Path, **data: Any) -> dict[str, Any]:
    shards = str(corpus / "shards" / "validation")
    return {"validation": {"shards": shards, "every_steps": 1, "rows": 8}, **data}


@pytest.mark.parametrize(
    ("kind", "stage", "data"),
    [("bert", 3, {"cross_document": False}), ("t5", 2, {}), ("bart", 3, {})],
)
def test_held_out_rows_are_filled_in(corpus, tmp_path, kind, stage, data):
    sections = {
        "data": validated(corpus, **data),
        "train": {"steps": 2},
        "engine": {"zero_stage": stage},
    }
    if stage == 3:
        small = {"stage3_param_persistence_threshold": 0}
        sections["engine"]["extra"] = {"zero_optimization": small}
    values = pretraining(corpus, tmp_path, "run", kind, **sections)
    plain = pretraining(corpus, tmp_path, "plain", kind, **sections)
    values["metrics"] = values["metrics"] | {"samples": {"every_validations": 2}}
    assert exact(run_ranks(train, 2, values)[0]) == exact(run_ranks(train, 2, plain)[0])
    lines = samples(tmp_path / "run")
    assert [line["step"] for line in lines] == [2] * SHOWN, "after the second validation alone"
    shown = {"bert": "filled masks"}.get(kind, "denoised spans")
    assert {line["kind"] for line in lines} == {shown}
    assert all(line["expected"] for line in lines)
    mark = "<extra_id_0>" if kind == "t5" else "<mask>"
    marks = sum(line["prompt"].count(mark) for line in lines)
    assert marks >= (1 if kind == "bert" else SHOWN)
    if kind == "bert":
        brackets = [line["output"].count("[") - line["expected"].count("[") for line in lines]
        assert sum(brackets) >= marks


@pytest.mark.parametrize("stage", [1, 3])
def test_texts_go_on(corpus, tmp_path, stage):
    """With dropout: what is drawn for samples is not missing in training."""
    values = run_values(
        corpus,
        tmp_path,
        "run",
        data=validated(corpus),
        train={"steps": 3},
        engine={"zero_stage": stage},
    )
    plain = exact(run_ranks(train, 2, {**values, "run": {**values["run"], "name": "plain"}})[0])
    how = {"prompts": [PROMPT, "import"], "new_tokens": 8}
    values["metrics"] = values["metrics"] | {"samples": how}
    assert exact(run_ranks(train, 2, values)[0]) == plain
    lines = samples(tmp_path / "run")
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, prompt) for step in (1, 2, 3) for prompt in (PROMPT, "import")
    ]
    assert any(line["output"] for line in lines) and {line["kind"] for line in lines} == {
        "continuations"
    }


def test_held_out_rows_go_on(corpus, tmp_path):
    values = run_values(corpus, tmp_path, "run", data=validated(corpus), train={"steps": 1})
    values["metrics"] = values["metrics"] | {"samples": {"temperature": 0}}
    for size in (1, 2):
        named = values["run"] | {"name": f"of{size}"}
        run_ranks(train, size, {**values, "run": named})
    alone, together = (samples(tmp_path / f"of{size}") for size in (1, 2))
    assert len(alone) == SHOWN and all(line["expected"] for line in alone)
    prompts = [[line["prompt"] for line in lines] for lines in (alone, together)]
    assert prompts[0] == prompts[1], "the same rows for any number of ranks"


def test_a_task_shows_its_answers(corpus, tmp_path):
    rows = [{"source": f"number {n}", "target": f"say {n}"} for n in range(40)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    _, architecture, config, _ = PRETRAINING["t5"]
    values = task_values(
        tmp_path,
        "run",
        data={"train": str(tmp_path / "pairs.jsonl"), "validate_every_steps": 2},
        task={"name": "translation", "options": {"generation": {"max_new_tokens": 4}}},
        train={"steps": 2},
    )
    values["tokenizer"] = {"path": str(extended_tokenizer(corpus, tmp_path / "tokenizer"))}
    values["model"] = {"architecture": architecture, "config": config}
    values["metrics"] = values["metrics"] | {"samples": {}}
    run_ranks(train, 2, values)
    lines = samples(tmp_path / "runs" / "run")
    assert len(lines) == SHOWN and {line["kind"] for line in lines} == {"answers"}
    assert all("number" in line["prompt"] and "say" in line["expected"] for line in lines)


def test_a_model_that_cannot_write_trains_on(corpus, tmp_path, monkeypatch):
    values = run_values(corpus, tmp_path, "run", data=validated(corpus), train={"steps": 3})
    values["metrics"] = values["metrics"] | {"samples": {"new_tokens": 4}}
    [(records, warnings)] = run_ranks(trained_without_generate, 1, values)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert warnings == ["no samples of text from here on: RuntimeError: this model cannot"]
    assert samples(tmp_path / "run") == []


def trained_without_generate(values: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    from transformers import GPT2LMHeadModel

    from hfscale.log import logger

    class Handler(logging.Handler):
        def emit(self, record: Any) -> None:
            if "samples" in record.getMessage():
                warnings.append(record.getMessage())

    def generate(*_: object, **__: object) -> None:
        raise RuntimeError("this model cannot")

    warnings: list[str] = []
    handler, own = Handler(), GPT2LMHeadModel.generate
    logger.addHandler(handler)
    GPT2LMHeadModel.generate = generate
    try:
        return train(values), warnings
    finally:
        GPT2LMHeadModel.generate = own
        logger.removeHandler(handler)


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        Run(RunConfig.model_validate(values), World()).check()
    return str(caught.value)


def test_what_cannot_be_shown_is_refused_before_a_job_waits(corpus, tmp_path):
    def values(kind: str, **samples: Any) -> dict[str, Any]:
        made = pretraining(corpus, tmp_path, "run", kind, data=validated(corpus))
        return {**made, "metrics": {"samples": samples}}

    assert "makes no text" in refusal(values("contrastive"))
    assert "filled masks of held-out text" in refusal(values("bert", prompts=["a <mask>"]))


def test_markdown_shows_any_text_as_it_is():
    text = markdown([Sample("# no heading\n```", "<b>", "**")])
    assert "    # no heading\n    ```" in text and "    <b>" in text and "    **" in text
