"""A run leaves as a transformers folder with the engine's own logits, or not at all; and goes on
with prompts.
"""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, pipeline

from hfscale.checkpoint.export import untied, write_weights
from hfscale.checkpoint.manager import CheckpointManager
from hfscale.checkpoint.state import CheckpointState
from hfscale.checkpoint.weights import CheckpointWeights
from hfscale.config.corpus import CorpusConfig
from hfscale.config.schema import Checkpoint, RunConfig
from hfscale.config.section import Section
from hfscale.corpus.tokenizer_training import train_tokenizer
from hfscale.dist.world import Place
from hfscale.engine.engine import Engine
from hfscale.errors import CheckpointError, DataError
from hfscale.jobs import export
from hfscale.models.build import build_model, check_model_config
from hfscale.objectives.base import Objective, Setting
from hfscale.run import origin, proof
from hfscale.run.model import RunModel, find
from hfscale.run.origin import model_needs
from hfscale.tokenizer import framed, load_tokenizer
from launch.commands.predict import predict
from tests.engine.tiny import tiny_config
from tests.helpers.cli import hfscale
from tests.helpers.corpus import GPT2, LLAMA, run_values
from tests.helpers.ranks import run_ranks
from tests.models.families import FAMILIES, SPECIAL_IDS, VOCAB

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-like run at ZeRO 3 in bf16, saved by two ranks."""
    folder = tmp_path_factory.mktemp("export")
    config = folder / "run.yaml"
    config.write_text(
        yaml.safe_dump(
            run_values(
                corpus, folder, "run", model=LLAMA, engine={"zero_stage": 3, "precision": "bf16"}
            )
        )
    )
    hfscale("pretrain", config, "--procs", 2)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    out = run / "exports" / "model"
    printed = hfscale("export", run, out).stdout
    assert "from transformers import pipeline" in printed and str(out) in printed
    return out


def test_transformers_loads_it(exported: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(exported),
        AutoTokenizer.from_pretrained(exported),
    )
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == len(tokenizer)
    card = (exported / "README.md").read_text()
    for fact in (
        "logits equal",
        "in 6 steps of 16 x 32 tokens",
        "text (weight 1); ",
        "step 6, loss ",
        "'torch': '2.",
        "stage: 3",
    ):
        assert fact in card
    assert json.loads((exported / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    text = pipeline("text-generation", model=str(exported))(
        "import", max_new_tokens=4, do_sample=False
    )[0]["generated_text"]
    assert text.startswith("import") and len(text) > len("import")
    ours = hfscale("predict", exported, "--prompt", "import", "generation.max_new_tokens=4").stdout
    assert ours.strip() == text.removeprefix("import").strip()


def test_nothing_is_overwritten(run: Path, exported: Path) -> None:
    before = (exported / "model.safetensors").read_bytes()
    refused = hfscale("export", run, exported, check=False)
    assert (
        refused.returncode == 2
        and "exists already" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    assert (exported / "model.safetensors").read_bytes() == before


def test_a_tied_tensor_is_counted_and_written_once(corpus: Path, tmp_path: Path) -> None:
    config = RunConfig.model_validate(run_values(corpus, tmp_path, "run", model=GPT2))
    needs = model_needs(config, load_tokenizer(corpus / "tokenizer"), None)
    skeleton = origin.skeleton(config, check_model_config(**needs), "AutoModelForCausalLM")
    names = untied(skeleton)
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    assert sum(tensor.numel() for tensor in names.values()) == sum(
        p.numel() for p in skeleton.parameters()
    )


def opened(run: Path) -> RunModel:
    source = find(run)
    assert isinstance(source, RunModel)
    return source


def prove(source: RunModel, folder: Path) -> float:
    about = {"skeleton": source.skeleton, "checkpoint": source.checkpoint, "config": source.run}
    return proof.prove(folder, source.trained, **about)


class Planted:
    """A weights reader with a fault: tensors by another name."""

    def __init__(self, reader: Any, swaps: dict[str, str]) -> None:
        self._reader, self._swaps = reader, swaps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read_slice(self, name: str, **where: int) -> torch.Tensor:
        return self._reader.read_slice(self._swaps.get(name, name), **where)


def test_swapped_layers_are_not_published(run: Path, tmp_path: Path) -> None:
    source = opened(run)
    swap = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    names = {
        name: name.replace(layer, other)
        for name in source.weights.names()
        for layer, other in swap.items()
        if layer in name
    }
    write_weights(Planted(source.weights, names), source.skeleton, tmp_path)  # type: ignore[arg-type]
    source.skeleton.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not give the run's logits"):
        prove(source, tmp_path)


def test_missing_tensors_are_named(run: Path, tmp_path: Path) -> None:
    source = opened(run)
    reader = Planted(source.weights, {})
    reader.names = lambda: [name for name in source.weights.names() if "norm" not in name]  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="missing, misshapen") as error:
        write_weights(reader, source.skeleton, tmp_path)  # type: ignore[arg-type]
    assert "layernorm" in str(error.value)


def test_empty_tensors_are_named(run: Path, tmp_path: Path) -> None:
    source = opened(run)
    reader = Planted(source.weights, {})
    reader.shape = lambda name: (0,) if "mlp" in name else source.weights.shape(name)  # type: ignore[attr-defined]
    with pytest.raises(
        CheckpointError,
        match=r"6 tensors of the model are missing, misshapen(.|\n)*mlp.gate_proj.weight: \[0\]",
    ):
        write_weights(reader, source.skeleton, tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_head_that_was_tied_by_mistake_is_not_published(run: Path, tmp_path: Path) -> None:
    source = opened(run)
    assert not source.skeleton.config.tie_word_embeddings
    mistaken = copy.deepcopy(source.skeleton.config)
    mistaken.tie_word_embeddings = True
    tied = opened(run)
    tied.skeleton = origin.skeleton(source.run, mistaken, "AutoModelForCausalLM")
    with pytest.raises(
        CheckpointError,
        match=r"lm_head.weight: the model ties it to model.embed_tokens.weight, the checkpoint "
        r"does not",
    ):
        write_weights(tied.weights, tied.skeleton, tmp_path)
    assert not list(tmp_path.iterdir())
    write_weights(source.weights, source.skeleton, tmp_path)  # and if somebody else wrote it so
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mistaken.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not give the run's logits"):
        prove(tied, tmp_path)


def saved_family(folder: Path, family: str, stage: int) -> None:
    auto_model, model = FAMILIES[family]
    config = tiny_config(stage, world_size=2)
    built = build_model(
        model, auto_model=auto_model, vocab_size=VOCAB, seq_len=16, seed=1, overrides=SPECIAL_IDS
    )
    for parameter in built.parameters():
        # as large as trained ones: at first a layer hardly adds to the stream
        parameter.data *= 10 if parameter.ndim == 2 else 1
    engine = Engine.create(built, config=config, device=torch.device("cpu"))
    checkpoints = CheckpointManager(folder, config=Checkpoint(), place=Place(engine.all.rank, 2))
    checkpoints.save(engine, CheckpointState(step=1, device="cpu"))
    checkpoints.wait()
    engine.close()


@pytest.mark.parametrize(("family", "stage"), [("t5", 3), ("bart", 1), ("bert", 0), ("gpt2", 2)])
def test_every_kind_of_model_has_a_probe_and_an_export(
    tmp_path: Path, family: str, stage: int
) -> None:
    run_ranks(saved_family, 2, tmp_path, family, stage)
    checkpoint, out = tmp_path / "step-00000001", tmp_path / "out"
    out.mkdir()
    config = tiny_config(stage)
    skeleton = origin.skeleton(config, AutoConfig.from_pretrained(checkpoint), FAMILIES[family][0])
    objective = Objective(Section(), Setting(seq_len=16))
    objective.auto_model = FAMILIES[family][0]
    reader = CheckpointWeights(checkpoint)
    write_weights(reader, skeleton, out)
    skeleton.config.save_pretrained(out)
    proved = partial(
        proof.prove, out, objective, skeleton=skeleton, checkpoint=checkpoint, config=config
    )
    assert proved() < 1e-6
    swapped = load_file(out / "model.safetensors")
    one = next(name for name in swapped if ".0." in name and swapped[name].ndim == 2)
    other = one.replace(".0.", ".1.", 1)  # the same weight of the next layer
    swapped[one], swapped[other] = swapped[other], swapped[one]
    save_file(swapped, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not give the run's logits"):
        proved()


def test_shards_hold_every_tensor_once(run: Path, tmp_path: Path) -> None:
    source = opened(run)
    write_weights(source.weights, source.skeleton, tmp_path, shard_bytes=20_000)
    source.skeleton.config.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    names = [name for file in files for name in load_file(file)]
    assert sorted(names) == sorted(
        json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    )
    assert len(names) == len(set(names))
    assert prove(source, tmp_path) < 1e-6


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("exports"))
    [file] = copy.glob("checkpoints/step-*/engine/rank-00001.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused = hfscale("export", copy, tmp_path / "out", check=False)
    assert (
        refused.returncode == 2
        and "rank-00001.safetensors" in refused.stderr
        and not (tmp_path / "out").exists()
    )


def test_the_newest_checkpoint_is_meant_even_when_it_lost_its_manifest(
    run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("exports"))
    [newest] = (copy / "checkpoints").glob("step-*")
    shutil.copytree(newest, newest.with_name("step-00000005"))
    (newest / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json"):
        assert opened(copy).weights


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_an_exported_causal_model_gets_prompts_without_an_end(tmp_path: Path, kind: str) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the cat sat on the mat\n" * 50)
    train_tokenizer(
        CorpusConfig.model_validate(
            {
                "source": {"path": str(tmp_path / "text")},
                "split": {"validation": 0},
                "tokenizer": {"path": str(tmp_path / kind), "kind": kind, "vocab_size": 300},
                "shards": {"path": str(tmp_path / "shards")},
            }
        )
    )
    tokenizer = load_tokenizer(tmp_path / kind)
    bare = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert tokenizer("the cat")["input_ids"] != bare
    framed(tokenizer, (), GPT2Config()).save_pretrained(tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("the cat")["input_ids"] == bare


def test_files_of_others_are_left_alone(run: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "out.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    assert "pipeline" in export.run(str(run), tmp_path / "out")
    assert (theirs / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"], (
        "nothing is left behind"
    )


def test_prompts_in_predictions_out(run: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(
        '{"prompt": "import os"}\n\n{"prompt": "你好\u2028", "id": "zh"}\n{"prompt": ""}\n', "utf-8"
    )
    predict(str(run), ["generation.max_new_tokens=5"], data=str(prompts), out=out)
    lines = [json.loads(line) for line in out.read_text("utf-8").split("\n") if line]
    assert [line["id"] for line in lines] == ["0", "zh", "2"] and all(
        isinstance(line["prediction"], str) for line in lines
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": ', r"not a JSON line[\s\S]*:1"),
        ("", "there are no rows in it"),
        ("[" * 100_000, "not a JSON line"),
        ('{"text": "a"}', "no column 'prompt'"),
        ('{"prompt": "a\\ud800"}', "half of a character"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}', "an id occurs twice"),
    ],
)
def test_broken_prompts_name_their_line(
    run: Path, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        predict(str(run), data=str(path), out=tmp_path / "out.jsonl")
