"""Tokenizers trained on the train side of a corpus, saved so that ``AutoTokenizer`` loads them.

``bpe``: byte-level, lossless, as GPT-2 (Radford et al. 2019, sec. 2.2). ``wordpiece``: BERT's
normalisation and special tokens (Devlin et al. 2019). ``unigram``: Kudo 2018, with NFKC and word
marks as SentencePiece.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from hfscale.config.corpus import CorpusConfig, TokenizerTraining
from hfscale.corpus.source import Corpus, open_corpus
from hfscale.corpus.split import Side, assign, check_sides
from hfscale.dist.stop import ended_by_ctrl_c
from hfscale.errors import DataError
from hfscale.log import progress_bar
from hfscale.records import Count, Damaged, Record, parse, read_file
from hfscale.shards.counts import Counts, Seen
from hfscale.shards.files import whole_folder
from hfscale.tokenizer import save_files

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.trainers import Trainer
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerFast

REPORT_NAME = "training_report.json"
MEASURED_BYTES = 8 << 20  # of text for the report
# base64, DNA, Chinese: training takes time quadratic in the longest word, which is then broken
LONG_WORD = re.compile(r"\S{1000}")


class Measured(TypedDict):
    """A tokenizer on some text."""

    vocab_size: int
    bytes_per_token: float
    unknown: float  # a share of the tokens
    vocabulary_used: float  # a share of the ids


class Report(Record):
    """What was measured of a tokenizer, and what it was trained on."""

    vocab_size: Count
    bytes_per_token: float
    unknown: float
    vocabulary_used: float
    measured_on: str
    trained_on: Count  # documents, as the next ones
    documents: Count
    duplicates: Count = 0
    undecodable: Count = 0
    seen: Seen | None = None  # None: a report from before
    already_trained: bool = False  # the tokenizer was there


@dataclass
class Recipe:
    """An untrained tokenizer, its trainer, and what transformers calls its special tokens."""

    tokenizer: Tokenizer
    trainer: Trainer
    names: dict[str, str]
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")  # of the models that it is for
    by_line: bool = False  # train on lines, where a whole document as one "word" would be too long


def train_tokenizer(config: CorpusConfig) -> Report:
    """Return the report of the tokenizer trained and saved in ``config.tokenizer.path``, or found
    there from the same training.

    Raises:
        DataError: if the folder holds something else, or the source no text.
    """
    folder, corpus = config.tokenizer.path, open_corpus(config.source)
    training = config.tokenizer.model_dump(mode="json", exclude={"path"})
    plan = json.loads(
        json.dumps(
            {"source": corpus.describe(), "split": config.split.model_dump(), "tokenizer": training}
        )
    )
    if folder.exists():
        return _report_of(folder, plan)
    check_sides(config, ["train"])
    with whole_folder(folder) as partial:  # from here on: two at once would both train for hours
        return _train(config, corpus, plan, partial)


def _train(config: CorpusConfig, corpus: Corpus, plan: dict[str, object], partial: Path) -> Report:
    """Return the report of the tokenizer that is now in ``partial``."""
    from transformers import PreTrainedTokenizerFast  # slow to import

    recipe, reading = RECIPES[config.tokenizer.kind](config.tokenizer), _Reading(config)
    with progress_bar("reading", corpus.total_bytes or None) as bar:
        documents = corpus.documents(reading.counts)
        texts = reading.training_texts(documents, bar, at=corpus.at)
        if recipe.by_line:
            texts = (line for text in texts for line in text.splitlines() if line)
        with ended_by_ctrl_c("interrupted: no tokenizer was made"):
            recipe.tokenizer.train_from_iterator(texts, recipe.trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=recipe.tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=list(recipe.inputs),
        **recipe.names,
    )
    held_out = reading.samples["validation"]
    report = Report(
        **measure(tokenizer, held_out or reading.samples["train"]),
        measured_on="held-out text" if held_out else "training text (nothing was held out)",
        trained_on=reading.trained,
        documents=reading.counts.documents,
        duplicates=reading.counts.duplicates,
        undecodable=reading.counts.undecodable,
        seen=reading.counts.record(),
    )
    save_files(tokenizer, partial)
    text = json.dumps({"plan": plan, "report": report.as_dict()}, indent=1, ensure_ascii=False)
    (partial / REPORT_NAME).write_text(text + "\n", "utf-8")
    return report


class _Kept(Record):
    """What lies beside a trained tokenizer: what was asked for, and the report."""

    plan: dict[str, object]
    report: Report


class _Reading:
    """What was read: how many documents to train on, and the first texts of each side to measure
    on.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self._config, self.counts, self.trained = config, Counts(), 0
        self.samples: dict[Side, list[str]] = {"train": [], "validation": []}
        self._room = dict.fromkeys(self.samples, MEASURED_BYTES)

    def training_texts(
        self, documents: Iterable[str], bar: tqdm, *, at: Callable[[], str]
    ) -> Iterator[str]:
        """Yield the texts of the train side, long words broken."""
        for document in assign(documents, self._config.split, self.counts, at=at):
            bar.update(document.size)
            training = document.side == "train"
            if training and self.trained == self._config.tokenizer.max_documents:
                break
            if self._room[document.side] > 0:
                self.samples[document.side].append(document.text)
                self._room[document.side] -= document.size
            if training:
                self.trained += 1
                yield LONG_WORD.sub(r"\g<0>\n", document.text)


def measure(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Measured:
    """Return what the tokenizer makes of ``texts``."""
    used: set[int] = set()
    tokens = unknown = 0
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # text that spells a control token is text
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    backend.encode_special_tokens = False
    for encoding in encodings:
        tokens += len(encoding.ids)
        used.update(encoding.ids)
        unknown += (
            encoding.ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
        )
    size = sum(len(text.encode()) for text in texts)
    return {
        "vocab_size": len(tokenizer),
        "bytes_per_token": round(size / max(tokens, 1), 4),
        "unknown": round(unknown / max(tokens, 1), 6),
        "vocabulary_used": round(len(used) / len(tokenizer), 4),
    }


def _bpe(training: TokenizerTraining) -> Recipe:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=training.min_frequency,
        **_common(training, [end]),
    )
    return Recipe(tokenizer, trainer, {"bos_token": end, "eos_token": end, "pad_token": end})


def _wordpiece(training: TokenizerTraining) -> Recipe:
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    # accents go with the case; Chinese is split
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=training.lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    tokenizer.post_processor = (
        processors.TemplateProcessing(  # special tokens get the first ids, in their order
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    )
    trainer = trainers.WordPieceTrainer(
        continuing_subword_prefix="##",
        min_frequency=training.min_frequency,
        **_common(training, [*names.values()]),
    )
    return Recipe(
        tokenizer, trainer, names, inputs=("input_ids", "token_type_ids", "attention_mask")
    )


def _unigram(training: TokenizerTraining) -> Recipe:
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    common = _common(training, [*names.values()])
    # lines hold no line's end to learn from; without min_frequency: it prunes by likelihood instead
    trainer = trainers.UnigramTrainer(unk_token="<unk>", initial_alphabet=["\n", "\t"], **common)
    return Recipe(tokenizer, trainer, names, by_line=True)


class _Common(TypedDict):
    """What all trainers are told."""

    vocab_size: int
    special_tokens: list[str | AddedToken]
    show_progress: bool


def _common(training: TokenizerTraining, special: list[str]) -> _Common:
    extra = [token for token in training.special_tokens if token not in special]
    return {
        "vocab_size": training.vocab_size,
        "special_tokens": [*special, *extra],
        "show_progress": sys.stderr.isatty(),
    }


def _report_of(folder: Path, plan: dict[str, object]) -> Report:
    """Return the report in ``folder`` if it is of the same training."""
    there: _Kept | None = None
    with suppress(OSError, Damaged):
        there = parse(_Kept, read_file(folder / REPORT_NAME))
    differing = [key for key in plan if there is None or there.plan.get(key) != plan[key]]
    if there is None or differing:
        raise DataError(
            f"there is something else already ({', '.join(differing)} differ)"
            if there
            else "the folder already exists",
            where="tokenizer.path",
            value=str(folder),
            remedy="choose another tokenizer.path, or remove the folder if it is not needed",
        )
    return there.report.model_copy(update={"already_trained": True})


RECIPES = {"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram}
