"""ROUGE-1, -2, -L and -Lsum by rouge_score, with a tokenizer that keeps every script. Scores (F1)
are in [0, 1].

The stock tokenizer drops all but a-z and 0-9, and gives two identical Chinese texts 0. Ours is
equal on plain English; it keeps letters, marks and digits of all scripts, and takes characters one
by one where a script has no spaces. Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of
Summaries.
"""

from __future__ import annotations

from collections.abc import Sequence

from hfscale.metrics.measure import Measure, mean, paired

UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
WORD = rf"(?V1){UNSPACED}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--{UNSPACED}]+"  # of the regex module


class RougeTokenizer:
    """Words of scripts with spaces, characters of the others; in lower case."""

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of ``text``."""
        import regex

        words: list[str] = regex.findall(WORD, text.lower())
        return words


def rouge(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> Measure:
    """Return ``rouge1``, ``rouge2``, ``rougeL``, ``rougeLsum``: mean F1; of several references the
    best. Newlines part Lsum's sentences.

    Raises:
        DataError: if there are no examples.
    """
    from rouge_score.rouge_scorer import RougeScorer

    paired(predictions, references)
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names, tokenizer=RougeTokenizer())
    several = [[answers] if isinstance(answers, str) else answers for answers in references]
    scores = [
        scorer.score_multi(answers, text)
        for text, answers in zip(predictions, several, strict=True)
    ]
    return mean({name: [score[name].fmeasure for score in scores] for name in names})
