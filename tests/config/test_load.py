"""Files, extends, overrides, sources, and errors that say everything at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hfscale.config.corpus import CorpusConfig
from hfscale.config.load import COMMAND_LINE, DEFAULT, json_schema, load_config, to_yaml
from hfscale.config.schema import RunConfig
from hfscale.errors import ConfigError

BASE = """\
run: {name: first}
tokenizer: {path: gpt2}
data:
  seq_len: 32
  sources:
    - {name: a, shards: shards/train}
model: {architecture: gpt2, config: {n_layer: 2, layer_norm_epsilon: 1e-5}}
objective: {name: clm}
train: {steps: 10, global_batch: 8, micro_batch: 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    return tmp_path


def refusal(*arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)  # type: ignore[arg-type]
    return str(caught.value)


def test_every_value_knows_where_it_came_from(folder: Path):
    Path("child.yaml").write_text("extends: base.yaml\n\ntrain: {steps: 20}\noptim:\n  lr: 3e-4\n")
    loaded = load_config("child.yaml", ["run.seed=5", "data.sources.0.weight=0.5"])
    assert (loaded.config.train.steps, loaded.config.train.global_batch) == (20, 8)
    assert loaded.config.optim.lr == 3e-4
    assert loaded.config.data.sources[0].name == "a"
    sources = {
        key: loaded.source(key)
        for key in (
            "train.steps",
            "optim.lr",
            "train.global_batch",
            "run.seed",
            "data.sources.0.weight",
            "data.sources.0.name",
            "optim.betas.1",
            "checkpoint.async",
        )
    }
    assert sources == {
        "train.steps": "child.yaml:3",
        "optim.lr": "child.yaml:5",
        "train.global_batch": "base.yaml:9",
        "run.seed": COMMAND_LINE,
        "data.sources.0.weight": COMMAND_LINE,
        "data.sources.0.name": "base.yaml:6",
        "optim.betas.1": DEFAULT,
        "checkpoint.async": DEFAULT,
    }


def test_later_extends_win_and_are_relative_to_their_file(folder: Path):
    Path("parts").mkdir()
    Path("parts/one.yaml").write_text("optim: {lr: 1e-3, eps: 1e-6}\n")
    Path("parts/two.yaml").write_text("extends: one.yaml\noptim: {lr: 2e-3}\n")
    Path("child.yaml").write_text("extends: [base.yaml, parts/two.yaml]\n")
    loaded = load_config("child.yaml")
    assert (loaded.config.optim.lr, loaded.config.optim.eps) == (2e-3, 1e-6)
    assert loaded.source("optim.eps") == "parts/one.yaml:1"


def test_another_architecture_leaves_the_config_of_the_first_behind(folder: Path):
    Path("llama.yaml").write_text("model: {architecture: llama, config: {num_hidden_layers: 2}}\n")
    Path("child.yaml").write_text("extends: [base.yaml, llama.yaml]\n")
    assert load_config("child.yaml").config.model.config == {"num_hidden_layers": 2}
    same = load_config("base.yaml", ["model.config.n_head=2"])
    assert same.config.model.config == {"n_layer": 2, "layer_norm_epsilon": 1e-5, "n_head": 2}


def test_the_layer_on_top_chooses_between_what_excludes_each_other(folder: Path):
    loaded = load_config(
        "base.yaml",
        ["train.tokens=5000", "model.pretrained=runs/other", "model.config.attn_pdrop=0.5"],
    )
    assert (
        loaded.config.train.steps,
        loaded.config.train.tokens,
        loaded.source("train.steps"),
    ) == (None, 5000, DEFAULT)
    assert (loaded.config.model.architecture, loaded.config.model.config) == (
        None,
        {"attn_pdrop": 0.5},
    )
    Path("child.yaml").write_text("extends: base.yaml\ntrain: {epochs: 2}\n")
    assert load_config("child.yaml").config.train.steps is None
    assert "here train.steps and train.epochs" in refusal(
        "base.yaml", ["train.steps=3", "train.epochs=2"]
    )


def test_values_are_yaml_1_2(folder: Path):
    config = load_config(
        "base.yaml",
        [
            "cluster.time=24:00:00",
            "cluster.partition=no",
            "train.tokens=10_000",
            "train.steps=null",
            "model.config.x=[1e-3, true, off]",
        ],
    ).config
    assert (config.cluster.time, config.cluster.partition, config.train.tokens) == (
        "24:00:00",
        "no",
        10000,
    )
    assert config.model.config["x"] == [1e-3, True, "off"]


@pytest.mark.parametrize(
    "sign", ["|", ">", "-", "?", ":", "#", ",", "]", "no", "a: b", "- a", "a #b"]
)
def test_a_value_of_the_command_line_is_what_it_says(folder: Path, sign: str):
    config = load_config("base.yaml", [f"model.config.x={sign}"]).config
    assert config.model.config["x"] == sign


def test_a_resolved_config_loads_to_the_same(folder: Path):
    overrides = [
        "cluster.time=24:00:00",
        "model.config.x={a: '1e-3', b: 1e-7, c: 'no', d: '文'}",
        "run.name='07'",
    ]
    config = load_config("base.yaml", overrides).config
    Path("resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config("resolved.yaml").config == config
    assert yaml.safe_load(to_yaml(config))["cluster"]["time"] == "24:00:00", (
        "any YAML reader sees the same"
    )


def test_paths_are_absolute_and_hub_names_stay(folder: Path):
    config = load_config("base.yaml").config
    assert config.run_dir == folder / "runs/first"
    assert (config.data.sources[0].shards, config.tokenizer.path) == (
        str(folder / "shards/train"),
        "gpt2",
    )
    Path("tok").mkdir()
    assert load_config("base.yaml", ["tokenizer.path=tok"]).config.tokenizer.path == str(
        folder / "tok"
    )


def test_all_errors_of_a_file_come_in_one_report(folder: Path):
    Path("bad.yaml").write_text(
        "extends: base.yaml\nrun: {seeed: 4}\nlr: 3\ndata:\n  lanes: many\n  seq_len: -1\n"
        "optim: {lr: fast, warmup_steps: 3}\ntrain:\n  step: 10\n"
    )
    text = refusal("bad.yaml", ["engine.precision=fp8"])
    lines = text.splitlines()
    assert lines[0] == "8 errors in the config bad.yaml"
    for place, words in (
        ("bad.yaml:2", "run.seeed: unknown key; did you mean seed"),
        ("bad.yaml:3", "did you mean optim.lr"),
        ("bad.yaml:5", "data.lanes: 'many'"),
        ("bad.yaml:6", "data.seq_len: -1: should be greater than 1"),
        ("bad.yaml:7", "optim.lr: 'fast': should be a valid number"),
        ("bad.yaml:7", "did you mean schedule.warmup_steps"),
        ("bad.yaml:9", "train.step: unknown key; did you mean steps"),
        (COMMAND_LINE, "engine.precision: 'fp8'"),
    ):
        assert any(line.strip().startswith(f"{place}: ") and words in line for line in lines), (
            place,
            words,
            text,
        )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.yaml", None, "base.yaml"),
        ("list.yaml", "- a\n", "a mapping of sections"),
        ("syntax.yaml", "run: {name: x\ntrain: 3\n", "syntax.yaml:2"),
        ("twice.yaml", "run: {name: x}\nrun: {name: y}\n", "run is written twice"),
        ("circle.yaml", "extends: circle.yaml\n", "in a circle"),
        ("lost.yaml", "extends: nowhere.yaml\n", "no such file to extend: nowhere.yaml"),
        ("empty.yaml", "", "data: is required"),
        ("latin.yaml", b"run: {name: \xff}\n", "UTF-8"),
    ],
)
def test_unreadable_files(folder: Path, name: str, content: str | bytes | None, words: str):
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refusal(name)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "key=value"),
        ("=3", "key=value"),
        ("train..steps=3", "key=value"),
        ("train.steps=[1", "not YAML"),
        ("task.options.prompt={source} TL;DR", "between quotes"),
        ("data.sources.1.weight=2", "a list of 1"),
        ("train.stepz=3", "did you mean steps"),
        ("run=3", "run: 3"),
        ("data.sources=null", "data.sources"),
        ("run.name=a/b", "run.name"),
        ("optim.lr=.inf", "optim.lr"),
        ("optim.lr=.nan", "optim.lr"),
        ("optim.betas=[0.9,1.0]", "optim.betas.1"),
        ("data.cache.size_gb=0", "data.cache.size_gb"),
        ("modl.x=1", f"{COMMAND_LINE}: modl: unknown key; did you mean model?"),
    ],
)
def test_bad_overrides(folder: Path, override: str, words: str):
    text = refusal("base.yaml", [override])
    assert words in text
    assert COMMAND_LINE in text


def test_configs_are_frozen(folder: Path):
    config = load_config("base.yaml").config
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_the_json_schema_knows_every_section_and_extends():
    schema = json_schema(RunConfig)
    assert {"extends", *RunConfig.model_fields} == schema["properties"].keys()
    assert "required" not in schema
    assert "async" in schema["$defs"]["Checkpoint"]["properties"]
    assert json_schema(CorpusConfig)["properties"].keys() >= {"source", "shards"}


def test_a_bad_config_is_refused_without_torch(folder: Path):
    code = (
        "import sys\nfrom hfscale.config.load import load_config\nfrom hfscale.errors import "
        "ConfigError\n"
        "try:\n    load_config('base.yaml', ['train.stepz=1'])\n"
        "except ConfigError:\n    sys.exit(7 if 'torch' in sys.modules else 0)\n"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": str(Path(__file__).parents[2])}
        ).returncode
        == 0
    )
