"""Small real tokenizers with every special token, trained on two languages."""

from __future__ import annotations

from functools import cache
from typing import Any

TEXTS = [
    "The old river ran unbelievably slowly under the unbelievable bridges of the town.",
    "河水慢慢地流过古老的桥。城里的人都在桥上看河水。",
    "def unbelievable(river):\n    return river.slowly()\n",
] * 20
SPECIAL = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
    "unk_token": "[UNK]",
    "eos_token": "</s>",
}


@cache
def tokenizer(kind: str = "bpe", *, sentinels: int = 40) -> Any:
    """Return a fast tokenizer of ``kind`` "bpe" (byte-level), "wordpiece" or "unigram"."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [*SPECIAL.values(), *(f"<extra_id_{number}>" for number in range(sentinels))]
    if kind == "bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        trainer: Any = trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = (
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        )
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=110, special_tokens=special)
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="[UNK]")
    made.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)
