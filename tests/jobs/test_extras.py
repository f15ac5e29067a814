"""Adapters, frozen parts, layer-wise learning rates and early stopping, with the real engine on two
ranks, resumed to the bit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hfscale.checkpoint.weights import open_weights
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.load import to_yaml
from hfscale.config.rules import problems
from hfscale.errors import CheckpointError, ConfigError
from hfscale.jobs import export
from hfscale.jobs.asked import settle
from hfscale.jobs.predict import predict_texts
from hfscale.run.model import find
from hfscale.run.origin import pretrained_folder
from hfscale.run.run import Run
from tests.helpers.labelled import make_encoder, reviews, task_values, write_jsonl
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow
EXACT = ("loss", "lr", "grad_norm", "batch_digest", "validation_loss", "validation_accuracy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extras")
    make_encoder(folder / "encoder")
    write_jsonl(folder / "reviews.jsonl", reviews(120))
    return folder


def records(folder: Path, name: str, stage: int, **sections: Any) -> list[dict[str, Any]]:
    """Return what training on two ranks says of each step; goes on with a run of this name."""
    values = task_values(
        folder,
        name,
        **{
            "schedule": {"name": "constant"},
            "data": {"validate_every_steps": 3},
            "engine": {"zero_stage": stage},
            **sections,
        },
    )
    config = FinetuneConfig.model_validate(values)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    return [{key: record.get(key) for key in EXACT} for record in run_ranks(train, 2, values)[0]]


def newest(folder: Path, name: str) -> Path:
    return sorted((folder / "runs" / name / "checkpoints").glob("step-*"))[-1]


def records_of(folder: Path, name: str) -> dict[str, list[float]]:
    lines = [
        json.loads(line)
        for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    ]
    return {key: [line[key] for line in lines if key in line] for key in EXACT}


def saved(folder: Path, name: str) -> dict[str, set[str]]:
    """Return what the newest checkpoint holds: name of the tensor -> kinds."""
    found: dict[str, set[str]] = {}
    for file in newest(folder, name).glob("engine/*.safetensors"):
        for key in load_file(file):
            found.setdefault(key.split("[")[0], set()).add(key.rpartition(".")[2])
    return found


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    "extra",
    [
        {"model": {"lora": {"r": 4, "dropout": 0.1}}},
        {"model": {"freeze": [r"embeddings", r"layer\.0\."]}, "optim": {"layer_decay": 0.7}},
    ],
    ids=["lora", "frozen"],
)
def test_a_resume_is_exact(folder: Path, extra: dict[str, Any], stage: int) -> None:
    kind = f"{'lora' if 'lora' in extra['model'] else 'frozen'}-{stage}"
    extra = {**extra, "model": {"pretrained": str(folder / "encoder"), **extra["model"]}}
    whole = records(folder, kind, stage, **extra)
    halves = records(folder, f"{kind}-halves", stage, **extra, train={"steps": 3}) + records(
        folder, f"{kind}-halves", stage, **extra
    )
    assert halves == whole and whole[0]["loss"] != whole[-1]["loss"]
    one, other = open_weights(newest(folder, kind)), open_weights(newest(folder, f"{kind}-halves"))
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names())


def test_the_stage_changes_nothing(folder: Path) -> None:
    for kind in ("lora", "frozen"):
        one, other = (records_of(folder, f"{kind}-{stage}") for stage in (0, 3))
        for key in ("loss", "grad_norm", "validation_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)


def test_only_what_is_trained_changes(folder: Path) -> None:
    base = load_file(folder / "encoder" / "model.safetensors")
    reader = open_weights(newest(folder, "frozen-3"))
    held = {name for name in base if torch.equal(reader.read(f"bert.{name}"), base[name])}
    assert held == {name for name in base if "embeddings" in name or "layer.0." in name}
    assert {
        len(kinds)
        for name, kinds in saved(folder, "frozen-3").items()
        if name.removeprefix("bert.") in held
    } == {1}
    kinds = saved(folder, "lora-3")  # adapters and the new head, and nothing of the base
    assert all(".lora_" in name or name.startswith("classifier.") for name in kinds)
    assert set(map(frozenset, kinds.values())) == {frozenset({"weight", "exp_avg", "exp_avg_sq"})}
    reader = open_weights(newest(folder, "lora-3"))
    held = {name for name in base if torch.equal(reader.read(f"bert.{name}"), base[name])}
    assert held == {name for name in base if base[name].dim() == 1 or "embeddings" in name}


def test_adapters_are_merged_or_exported_alone(folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    ids = torch.tensor([[2, 5, 9, 13, 3]])
    export.run(str(folder / "runs" / "lora-3"), folder / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
    assert not any("lora" in name for name in merged.state_dict())
    said = export.run(str(folder / "runs" / "lora-3"), folder / "alone", adapter=True)
    assert "PeftModel" in said and not (folder / "alone" / "model.safetensors").exists()
    base = AutoModelForSequenceClassification.from_pretrained(folder / "encoder", num_labels=2)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, folder / "alone").eval()(input_ids=ids).logits
        assert torch.allclose(merged(input_ids=ids).logits, theirs, atol=1e-5)
        names: dict[str, Any] = {}
        exec(said, names)  # as it is printed
        assert torch.allclose(names["model"].eval()(input_ids=ids).logits, theirs, atol=1e-6)
    about = json.loads((folder / "alone" / "adapter_config.json").read_text())
    assert about["task_type"] == "SEQ_CLS"
    assert about["base_model_name_or_path"] == str(folder / "encoder")
    assert not (folder / "alone" / "config.json").exists(), "or it would be taken for a model"
    assert "PeftModel.from_pretrained" in (folder / "alone" / "README.md").read_text()
    with pytest.raises(ConfigError, match="no adapters"):
        export.run(str(folder / "runs" / "frozen-3"), folder / "none", adapter=True)


def test_a_run_may_begin_with_adapters(folder: Path) -> None:
    """Its base is then what they were trained to; the checkpoint that they lie in is pinned."""
    extra = {
        "model": {
            "pretrained": str(folder / "runs" / "lora-0"),
            "lora": {"targets": ["query", "dense"]},
        },
        "train": {"steps": 1},
    }
    records(folder, "again", 2, **extra, engine={"zero_stage": 2, "precision": "bf16"})
    base, reader = (open_weights(newest(folder, name)) for name in ("lora-0", "again"))
    assert (newest(folder, "lora-0") / "pinned").exists()
    changed = {name for name in base.names() if not torch.equal(base.read(name), reader.read(name))}
    assert changed and all("query" in name or "dense" in name for name in changed)
    export.run(str(folder / "runs" / "again"), folder / "again-merged")


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError, match="stand beside have changed") as raised:
        train(values)
    return str(raised.value)


def test_another_base_is_refused(folder: Path) -> None:
    make_encoder(folder / "other")
    records(
        folder,
        "moved",
        0,
        model={"pretrained": str(folder / "other"), "lora": {}},
        train={"steps": 1},
    )
    moved, sized = newest(folder, "moved"), find(newest(folder, "moved")).digest
    open_weights(moved)
    make_encoder(folder / "other")  # drawn anew, and of the same size
    assert find(moved).digest != sized, "or scores of the old base would be found for the new one"
    for use in (
        lambda: open_weights(moved),
        lambda: export.run(str(moved), folder / "moved-merged"),
        lambda: export.run(str(moved), folder / "moved-alone", adapter=True),
        lambda: predict_texts(
            settle(find(moved), task=None, data="x.jsonl", out=folder / "x", overrides=[]),
            {"id": "0", "text": "a film"},
        ),
    ):
        with pytest.raises(CheckpointError, match=r"(?s)have changed.*other.*base of .*moved"):
            use()
    values = task_values(
        folder,
        "moved",
        model={"pretrained": str(folder / "other"), "lora": {}},
        engine={"zero_stage": 0},
    )
    assert all("model.safetensors" in said for said in run_ranks(refused, 2, values))
    begun = task_values(folder, "on", model={"pretrained": str(folder / "runs" / "moved")})
    assert all("base of" in said for said in run_ranks(refused, 2, begun))
    shutil.rmtree(folder / "other")
    with pytest.raises(CheckpointError, match=r"(?s)are gone.*other.*base of .*moved"):
        open_weights(moved)
    with pytest.raises(CheckpointError, match=r"(?s)are gone.*base of .*moved"):
        pretrained_folder(FinetuneConfig.model_validate(values))


def test_patience_ends_a_run_for_good(folder: Path) -> None:
    """A learning rate of nothing at all never improves on the first validation."""
    extra = {
        "optim": {"lr": 1e-30},
        "data": {"validate_every_steps": 1},
        "checkpoint": {"keep_best": {"metric": "validation_loss"}},
    }
    name, model = "patience", {"pretrained": str(folder / "encoder"), "freeze": ["bert"]}
    cut = records(folder, name, 1, model=model, **extra, train={"steps": 2, "patience": 3})
    more = records(folder, name, 1, model=model, **extra, train={"steps": 20, "patience": 3})
    # the first is the best, and three follow, over the resume
    assert (len(cut), len(more)) == (
        2,
        2,
    )
    assert records(folder, name, 1, model=model, **extra, train={"steps": 20, "patience": 3}) == []
    assert (
        len(records(folder, name, 1, model=model, **extra, train={"steps": 20, "patience": 4})) == 1
    )
    kept = [path.name for path in sorted((folder / "runs" / name / "checkpoints").glob("step-*"))]
    assert "step-00000001" in kept


def test_what_names_nothing_is_refused(folder: Path) -> None:
    def refused(words: str, **sections: Any) -> None:
        with pytest.raises(ConfigError, match=words):
            Run(FinetuneConfig.model_validate(task_values(folder, "none", **sections))).check()

    model = {"pretrained": str(folder / "encoder")}
    refused(
        "(?s)freeze.1.*did you mean embeddings", model={**model, "freeze": ["layer", "embedings"]}
    )
    refused("(?s)targets.0.*did you mean query", model={**model, "lora": {"targets": ["quary"]}})
    for words, sections in (
        ("nothing says what shall become better", {"train": {"patience": 2}}),
        (
            "set model.pretrained",
            {"model": {"pretrained": None, "architecture": "bert", "lora": {}}},
        ),
        ("take back model.freeze", {"model": {**model, "lora": {}, "freeze": ["a"]}}),
    ):
        found = problems(FinetuneConfig.model_validate(task_values(folder, "none", **sections)))
        assert any(words in problem for _, problem in found), found
