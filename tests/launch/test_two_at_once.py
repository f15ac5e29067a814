"""Two of the same command at once: one works, the other is refused before it has written or
computed anything.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hfscale.config.corpus import CorpusConfig
from hfscale.config.inference import PredictConfig
from hfscale.config.load import load_config
from hfscale.corpus.tokenizer_training import train_tokenizer
from hfscale.errors import DataError
from hfscale.shards.files import alone
from launch.commands.predict import make
from launch.commands.tokenizer import add

CORPUS = """\
source: {path: texts}
tokenizer: {path: tokenizer, vocab_size: 270}
shards: {path: shards}
"""


def test_predictions_of_two_processes_do_not_mix(tmp_path: Path):
    values = {
        "predict": {"model": "nowhere", "out": str(tmp_path / "out.jsonl")},
        "task": {"name": "text_generation"},
        "data": {"train": "none.jsonl"},
    }
    config = PredictConfig.model_validate(values)
    with alone(tmp_path / "out.jsonl"):
        with pytest.raises(DataError, match="another process is making this"):
            make(config, procs=1)
        assert os.listdir(tmp_path) == [".out.jsonl.lock"]


def test_tokens_are_added_by_one_process_into_a_folder_that_appears_whole(
    corpus: Path, tmp_path: Path
):
    out, tokens = tmp_path / "more", ["mask=<mask>"]
    with alone(out):
        with pytest.raises(DataError, match="another process is making this"):
            add(str(corpus / "tokenizer"), out, tokens)
        assert not out.exists()
    add(str(corpus / "tokenizer"), out, tokens)
    assert (out / "tokenizer.json").is_file()
    assert os.listdir(tmp_path) == ["more"]


def test_a_tokenizer_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some text of some words\n" * 50)
    (tmp_path / "corpus.yaml").write_text(CORPUS)
    config = load_config("corpus.yaml", schema=CorpusConfig).config
    with alone(tmp_path / "tokenizer"), pytest.raises(DataError, match="another process"):
        train_tokenizer(config)
    assert not (tmp_path / "tokenizer").exists()
    train_tokenizer(config)
    assert train_tokenizer(config).already_trained
    assert sorted(os.listdir(tmp_path)) == ["corpus.yaml", "texts", "tokenizer"]
