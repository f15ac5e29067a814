"""Each kind trains, loads with AutoTokenizer, and carries the special tokens that its models
expect.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hfscale.config.corpus import CorpusConfig
from hfscale.corpus.tokenizer_training import train_tokenizer
from hfscale.errors import ConfigError, DataError
from hfscale.tokenizer import end_of_document_id, load_tokenizer, tokenizer_digest, vocabulary_size

SENTENCES = [
    "The tokenizer learns Café words.",
    "今天我们学习语言模型。",
    "def main(): return 42",
    "Words, words\tand more words!",
]
ROUND_TRIP = "Café words\n\n  今天 def main(): \t🙂 never seen"


def config(folder: Path, **tokenizer: Any) -> CorpusConfig:
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        for k in range(60):
            (text / f"{k:02d}.txt").write_text(
                f"{k}: " + " ".join(SENTENCES[(k + j) % 4] for j in range(k % 7 + 4))
            )
    return CorpusConfig.model_validate(
        {
            "source": {"path": str(text)},
            "split": {"validation": 0.2},
            "shards": {"path": str(folder / "shards")},
            "tokenizer": {"path": str(folder / "tok"), "vocab_size": 330, **tokenizer},
        }
    )


def test_byte_level_bpe_is_lossless(tmp_path: Path) -> None:
    report = train_tokenizer(config(tmp_path, special_tokens=["<|user|>"]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert end_of_document_id(tokenizer) == 0
    assert tokenizer.convert_tokens_to_ids("<|user|>") == 1
    assert tokenizer.decode(tokenizer(ROUND_TRIP)["input_ids"]) == ROUND_TRIP
    assert tokenizer.tokenize("hi <|user|>")[-1] == "<|user|>"
    assert report.vocab_size == vocabulary_size(tokenizer) == 330
    assert report.measured_on == "held-out text"
    assert 1 < report.bytes_per_token < 10
    assert 0 < report.vocabulary_used <= 1


def test_wordpiece_is_as_bert(tmp_path: Path) -> None:
    train_tokenizer(config(tmp_path, kind="wordpiece", lowercase=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert (
        tokenizer.pad_token_id,
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
        tokenizer.mask_token_id,
    ) == (0, 2, 3, 4)
    assert tokenizer.tokenize("CAFÉ 学习") == tokenizer.tokenize("cafe学 习")
    pair = tokenizer("words", "more")
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"])[0] == "[CLS]"
    assert pair["input_ids"].count(3) == 2
    assert set(pair["token_type_ids"]) == {0, 1}
    assert end_of_document_id(tokenizer) == 3
    assert "[MASK]" in tokenizer.tokenize("a [MASK] b")


def test_wordpiece_can_keep_case(tmp_path: Path) -> None:
    train_tokenizer(config(tmp_path, kind="wordpiece"))
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert (
        tokenizer.decode(tokenizer("The Café words")["input_ids"], skip_special_tokens=True)
        == "The Café words"
    )


def test_unigram_ends_a_text_with_its_end(tmp_path: Path) -> None:
    train_tokenizer(config(tmp_path, kind="unigram"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    ids = tokenizer("The tokenizer 学习")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == end_of_document_id(tokenizer) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The tokenizer 学习"
    assert tokenizer.unk_token_id == tokenizer.convert_tokens_to_ids("🙂")


def test_held_out_documents_do_not_train(tmp_path: Path) -> None:
    settings = config(tmp_path)
    from hfscale.corpus.source import open_corpus
    from hfscale.corpus.split import assign
    from hfscale.shards.counts import Counts

    documents = [*assign(open_corpus(settings.source).documents(), settings.split, Counts())]
    for document, file in zip(documents, sorted((tmp_path / "text").iterdir()), strict=True):
        if document.side == "validation":
            file.unlink()
    train_tokenizer(settings)
    without = (tmp_path / "tok" / "tokenizer.json").read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    train_tokenizer(config(other))
    assert (other / "tok" / "tokenizer.json").read_bytes() == without


def test_max_documents_limits_what_is_read(tmp_path: Path) -> None:
    assert train_tokenizer(config(tmp_path, max_documents=5)).documents < 12


def test_a_tokenizer_is_never_overwritten(tmp_path: Path) -> None:
    settings = config(tmp_path)
    report = train_tokenizer(settings)
    before = (tmp_path / "tok" / "tokenizer.json").stat().st_mtime_ns
    assert train_tokenizer(settings) == report.model_copy(update={"already_trained": True})
    with pytest.raises(DataError, match="tokenizer differ"):
        train_tokenizer(config(tmp_path, vocab_size=300))
    assert (tmp_path / "tok" / "tokenizer.json").stat().st_mtime_ns == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="already exists"):
        train_tokenizer(config(tmp_path, path=str(tmp_path / "mine")))


def test_no_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(" ")
    with pytest.raises(DataError, match="holds no text"):
        train_tokenizer(config(tmp_path))
    assert not (tmp_path / "tok").exists()


def test_the_digest_survives_use_and_saving_and_tells_tokenizers_apart(tmp_path: Path) -> None:
    train_tokenizer(config(tmp_path))
    digest = tokenizer_digest(tmp_path / "tok")
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert tokenizer_digest(tokenizer) == digest
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=4)
    tokenizer.save_pretrained(tmp_path / "again")
    for same in (tokenizer, tmp_path / "again", load_tokenizer(tmp_path / "again")):
        assert tokenizer_digest(same) == digest
    file = tmp_path / "again" / "tokenizer.json"
    old = json.loads(file.read_text())
    # as files of older versions
    old["model"]["merges"] = [" ".join(merge) for merge in old["model"]["merges"]]
    del old["model"]["byte_fallback"], old["model"]["dropout"]
    file.write_text(json.dumps(old))
    assert tokenizer_digest(tmp_path / "again") == digest
    train_tokenizer(config(tmp_path, path=str(tmp_path / "other"), vocab_size=300))
    assert tokenizer_digest(tmp_path / "other") != digest


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder is empty"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="neither a folder here"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"not JSON[\s\S]*tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="not JSON"):
        tokenizer_digest(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    train_tokenizer(config(tmp_path))
    tokenizer = load_tokenizer(tmp_path / "tok")
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither an eos_token nor a sep_token"):
        end_of_document_id(tokenizer)


def test_a_corpus_that_is_all_held_out_trains_nothing(tmp_path: Path) -> None:
    values = config(tmp_path).model_dump(mode="json")
    for file in sorted((tmp_path / "text").iterdir())[1:]:
        file.unlink()
    values["split"]["validation"] = 0.999999
    with pytest.raises(
        DataError, match=r"none of 1 documents fell to the train side[\s\S]*split.validation"
    ):
        train_tokenizer(CorpusConfig.model_validate(values))
    assert not (tmp_path / "tok").exists()


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_words_without_an_end_do_not_take_for_ever(tmp_path: Path, kind: str) -> None:
    (tmp_path / "text").mkdir()
    for k in range(8):
        # quadratic: two minutes and more
        (tmp_path / "text" / f"{k}.txt").write_text("a" * 250_000 + f" word{k}")
    assert train_tokenizer(config(tmp_path, kind=kind)).documents == 8
