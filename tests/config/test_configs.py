"""Every YAML that is shipped loads; there are few of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfscale.config.load import load_config
from hfscale.config.schema import RunConfig
from hfscale.models.build import check_model_config
from hfscale.reports.show import schema_of

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
FRAGMENTS = {"models", "engines", "clusters"}


def load(path: Path, tmp_path: Path) -> object:
    """A fragment is loaded on top of the quickstart's config, as a file of its user would."""
    if path.parent.name in FRAGMENTS:
        user = tmp_path / "user.yaml"
        user.write_text(f"extends: [{ROOT / 'configs/pretrain/quickstart.yaml'}, {path}]\n")
        path = user
    return load_config(path, schema=schema_of(path)).config


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_it_loads_and_its_model_is_one(path: Path, tmp_path: Path):
    config = load(path, tmp_path)
    if isinstance(config, RunConfig):
        check_model_config(config.model, vocab_size=4096, seq_len=config.data.seq_len)


@pytest.mark.parametrize("said", [[], ["optim.lr=1e-3"], ["optim={eps: 1e-6}"]])
def test_fine_tuning_keeps_its_defaults_whatever_key_is_said(said: list[str]):
    optim = load_config(ROOT / "configs/finetune/sentiment.yaml", said).config.optim
    assert (optim.betas, optim.weight_decay) == ((0.9, 0.999), 0.01)


def test_there_are_few():
    assert 10 < len(FILES) < 30


def test_each_says_what_it_is_for():
    assert [
        path.name for path in FILES if not path.read_text(encoding="utf-8").startswith("# ")
    ] == []
