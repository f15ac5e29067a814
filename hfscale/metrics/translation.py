"""BLEU and chrF by sacreBLEU, with the signatures that make them comparable. Scores are in [0,
100].

Sources: Post 2018, A Call for Clarity in Reporting BLEU Scores; Popovic 2015, chrF.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from hfscale.errors import ConfigError, nearest
from hfscale.metrics.measure import Measure, from_sums, paired

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU, CHRF

_KANA = re.compile(r"[\u3040-\u30ff]")
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
# Thai, Lao, Burmese, Khmer
_OTHER_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")


def bleu_tokenizer(texts: Sequence[str]) -> str:
    """Return the sacreBLEU tokenizer for the language of ``texts``: zh, ja-mecab (char without
    MeCab), char for Thai and the like, 13a.
    """
    text = "".join(texts)
    kana, han, other = (len(pattern.findall(text)) for pattern in (_KANA, _HAN, _OTHER_UNSPACED))
    if 3 * (kana + han + other) <= sum(map(str.isalpha, text)):
        return "13a"
    if kana > 0.1 * han:
        has_mecab = importlib.util.find_spec("MeCab") and importlib.util.find_spec("ipadic")
        return "ja-mecab" if has_mecab else "char"
    return "zh" if han > other else "char"


def translation(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], *, tokenize: str = "auto"
) -> Measure:
    """Return ``bleu`` and ``chrf`` of the corpus, signatures in the notes. An example may have
    several references.

    Args:
        tokenize: a tokenizer of sacreBLEU; auto: by the script of the references.

    Raises:
        ConfigError: for a tokenizer that sacreBLEU does not have.
        DataError: if there are no examples.
    """
    from sacrebleu.metrics import BLEU, CHRF

    paired(predictions, references)
    several = [[answers] if isinstance(answers, str) else list(answers) for answers in references]
    if tokenize == "auto":
        tokenize = bleu_tokenizer([text for answers in several for text in answers])
    if tokenize not in BLEU.TOKENIZERS:
        raise ConfigError(
            "sacreBLEU has no such tokenizer",
            value=tokenize,
            remedy=nearest(tokenize, ["auto", *BLEU.TOKENIZERS]),
        )
    streams = list(zip_longest(*several))  # None: this example has fewer
    bleu = _corpus("bleu", BLEU(tokenize=tokenize, force=True), predictions, streams)
    return bleu | _corpus("chrf", CHRF(), predictions, streams)


def _corpus(
    name: str,
    metric: BLEU | CHRF,
    predictions: Sequence[str],
    streams: Sequence[Sequence[str | None]],
) -> Measure:
    """Return one of sacreBLEU's metrics from its own statistics of each example, as its own
    significance tests do.
    """
    # its types do not say that an example may have fewer references than others
    rows = metric._extract_corpus_statistics(list(predictions), streams)  # type: ignore[arg-type]

    def score(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    return from_sums(
        rows,
        lambda sums_RK: {name: np.array([score(sums) for sums in sums_RK])},
        **{name: str(metric.get_signature())},
    )
