"""Tokenizers trained on the train side of a corpus, saved so that ``AutoTokenizer`` loads them.

``bpe``: byte-level, lossless, as GPT-2 (Radford et al. 2019, sec. 2.2). ``wordpiece``: BERT's normalisation and special
tokens (Devlin et al. 2019). ``unigram``: Kudo 2018, with NFKC and word marks as SentencePiece.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfscale.config.schema import CorpusConfig, TokenizerTraining
from hfscale.corpus.progress import Progress
from hfscale.corpus.source import Corpus, open_corpus
from hfscale.corpus.split import Counts, Document, assign, check_sides
from hfscale.errors import DataError
from hfscale.shards.files import cannot_write

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

REPORT_NAME = "training_report.json"
HELD_OUT_BYTES = 8 << 20  # of text for the report
LONG_WORD = re.compile(r"\S{1000}")  # base64, DNA, Chinese: training takes time quadratic in the longest word, which is then broken


@dataclass
class Recipe:
    """An untrained tokenizer, its trainer, and what transformers calls its special tokens."""

    tokenizer: Tokenizer
    trainer: Any
    names: dict[str, str]
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")  # of the models that it is for
    by_line: bool = False  # train on lines, where a whole document as one "word" would be too long


@dataclass
class Sides:
    """What was read of each side: how many documents to train on, and some texts to measure on."""

    trained: int = 0
    held_out: list[str] = field(default_factory=list)


def train_tokenizer(config: CorpusConfig) -> dict[str, Any]:
    """Return the report of the tokenizer trained and saved in ``config.tokenizer.path``, or found there from the same training.

    The report: ``vocab_size``, ``bytes_per_token`` and ``vocabulary_used`` (a fraction) on ``measured_on`` text, and counts.

    Raises:
        DataError: if the folder holds something else, or the source no text.
    """
    folder, corpus = config.tokenizer.path, open_corpus(config.source)
    training = config.tokenizer.model_dump(mode="json", exclude={"path"})
    plan = {"source": corpus.describe(), "split": config.split.model_dump(), "tokenizer": training}
    if folder.exists():
        return _report_of(folder, plan)
    check_sides(config, ["train"])
    recipe = RECIPES[config.tokenizer.kind](config.tokenizer)
    sides, counts = Sides(), Counts()
    with Progress("reading", corpus.total_bytes) as progress:
        texts = _training_texts(config, corpus, counts, sides, progress)
        recipe.tokenizer.train_from_iterator(_lines(texts) if recipe.by_line else texts, recipe.trainer)
    _finish(recipe, config.tokenizer.kind)
    tokenizer = _wrap(recipe)
    measured_on = "held-out text" if sides.held_out else "training text (nothing was held out)"
    measured = sides.held_out or _first_texts(corpus, config)
    report = {**measure(tokenizer, measured), "measured_on": measured_on,
              "trained_on": sides.trained, "documents": counts.documents,
              "duplicates": counts.duplicates, "undecodable": corpus.undecodable, "skipped": corpus.examples}
    _save(tokenizer, folder, {"plan": json.loads(json.dumps(plan)), "report": report})
    return report


def measure(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, Any]:
    """Return ``vocab_size``, ``bytes_per_token``, ``unknown`` (a share of the tokens) and ``vocabulary_used`` (of the ids) of ``texts``."""
    used: set[int] = set()
    tokens = unknown = 0
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        tokens += len(encoding.ids)
        used.update(encoding.ids)
        unknown += encoding.ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    size = sum(len(text.encode()) for text in texts)
    return {"vocab_size": len(tokenizer), "bytes_per_token": round(size / max(tokens, 1), 4), "unknown": round(unknown / max(tokens, 1), 6),
            "vocabulary_used": round(len(used) / len(tokenizer), 4)}


def _training_texts(config: CorpusConfig, corpus: Corpus, counts: Counts, sides: Sides, progress: Progress) -> Iterator[str]:
    """Yield the texts of the train side, long words broken; some of the other side are kept in ``sides``."""
    held_out_bytes = 0
    for document in _documents(config, corpus, counts):
        progress.advance(document.size)
        if document.side == "validation":
            if held_out_bytes < HELD_OUT_BYTES:
                sides.held_out.append(document.text)
                held_out_bytes += document.size
            continue
        if sides.trained == config.tokenizer.max_documents:
            break
        sides.trained += 1
        yield LONG_WORD.sub(r"\g<0>\n", document.text)


def _documents(config: CorpusConfig, corpus: Corpus, counts: Counts) -> Iterator[Document]:
    return assign(corpus.documents(), config.split, counts)


def _first_texts(corpus: Corpus, config: CorpusConfig) -> list[str]:
    texts, size = [], 0
    for document in _documents(config, corpus, Counts()):
        texts.append(document.text)
        size += document.size
        if size >= HELD_OUT_BYTES:
            break
    return texts


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in text.splitlines() if line)


def _bpe(training: TokenizerTraining) -> Recipe:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **_common(training, [end]))
    return Recipe(tokenizer, trainer, {"bos_token": end, "eos_token": end, "pad_token": end})


def _wordpiece(training: TokenizerTraining) -> Recipe:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=training.lowercase)  # accents go with the case; Chinese is split
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    trainer = trainers.WordPieceTrainer(continuing_subword_prefix="##", **_common(training, [*names.values()]))
    return Recipe(tokenizer, trainer, names, inputs=("input_ids", "token_type_ids", "attention_mask"))


def _unigram(training: TokenizerTraining) -> Recipe:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    common = _common(training, [*names.values()])
    del common["min_frequency"]  # this trainer prunes by likelihood instead
    trainer = trainers.UnigramTrainer(unk_token="<unk>", initial_alphabet=["\n", "\t"], **common)  # lines hold no line's end to learn from
    return Recipe(tokenizer, trainer, names, by_line=True)


def _common(training: TokenizerTraining, special: list[str]) -> dict[str, Any]:
    extra = [token for token in training.special_tokens if token not in special]
    return {"vocab_size": training.vocab_size, "min_frequency": training.min_frequency, "special_tokens": special + extra,
            "show_progress": sys.stderr.isatty()}


def _finish(recipe: Recipe, kind: str) -> None:
    """Return with the special tokens that a model's input carries put around it; their ids are known only now."""
    from tokenizers import processors

    tokenizer = recipe.tokenizer
    if kind == "wordpiece":
        around = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                                 special_tokens=around)
    if kind == "unigram":
        end = [("</s>", tokenizer.token_to_id("</s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=end)


def _wrap(recipe: Recipe) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=recipe.tokenizer, clean_up_tokenization_spaces=False,
                                   model_input_names=list(recipe.inputs), **recipe.names)


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path, report: dict[str, Any]) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        tokenizer.save_pretrained(temporary)
        (temporary / REPORT_NAME).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
        os.rename(temporary, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _report_of(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Return the report in ``folder`` if it is of the same training."""
    try:
        there = json.loads((folder / REPORT_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        there = {}
    if _digest(there.get("plan")) != _digest(plan):
        differing = [key for key in plan if there.get("plan", {}).get(key) != json.loads(json.dumps(plan[key]))]
        raise DataError(f"there is something else already ({', '.join(differing)} differ)" if there else "the folder already exists",
                        where="tokenizer.path", value=str(folder),
                        remedy="choose another tokenizer.path, or remove the folder if it is not needed")
    return {**there["report"], "already_trained": True}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


RECIPES = {"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram}
