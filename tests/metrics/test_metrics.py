"""Every metric equals its reference implementation: the library where there is one, else what the
official script printed.
"""

from __future__ import annotations

import random

import pytest
import sacrebleu
import scipy.stats
import sklearn.metrics as sk
from rouge_score.rouge_scorer import RougeScorer

from hfscale.errors import ConfigError, DataError
from hfscale.metrics.classification import classification
from hfscale.metrics.correlation import correlation
from hfscale.metrics.entities import entities, entity_f1, parts_entities
from hfscale.metrics.language_model import language_model
from hfscale.metrics.rouge import RougeTokenizer, rouge
from hfscale.metrics.squad import best_threshold, squad
from hfscale.metrics.translation import bleu_tokenizer, translation

RNG = random.Random(7)


@pytest.mark.parametrize("labels", ["ab", "abcd"])
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_classification_equals_scikit_learn(labels, noise):
    true = RNG.choices(labels, k=60)
    guessed = [RNG.choice(labels) if RNG.random() < noise else label for label in true]
    expected = {
        "accuracy": sk.accuracy_score(true, guessed),
        "f1_macro": sk.f1_score(true, guessed, average="macro"),
        "f1_micro": sk.f1_score(true, guessed, average="micro"),
        "mcc": sk.matthews_corrcoef(true, guessed),
    }
    if len(labels) == 2:
        expected["f1"] = sk.f1_score(true, guessed, pos_label="b")
    assert classification(guessed, true, labels=labels).scores() == pytest.approx(
        expected, abs=1e-12
    )


def test_one_class_only_and_classes_that_never_occur():
    constant = classification(
        ["好评"] * 3, ["好评", "差评", "差评"], labels=["差评", "好评", "中评"]
    ).scores()
    assert constant == pytest.approx(
        {"accuracy": 1 / 3, "f1_macro": 0.25, "f1_micro": 1 / 3, "mcc": 0.0}
    )


def test_multi_label_equals_scikit_learn():
    names = ["x", "y", "z"]
    draw = lambda: [name for name in names if RNG.random() < 0.4]  # noqa: E731
    true, guessed = [draw() for _ in range(50)], [draw() for _ in range(50)]
    table = lambda rows: [[name in row for name in names] for row in rows]  # noqa: E731
    expected = {
        "accuracy": sk.accuracy_score(table(true), table(guessed)),
        **{
            f"f1_{how}": sk.f1_score(table(true), table(guessed), average=how)
            for how in ("macro", "micro")
        },
    }
    assert classification(guessed, true, labels=names).scores() == pytest.approx(
        expected, abs=1e-12
    )


def test_correlation_equals_scipy():
    x, y = [RNG.randint(0, 9) / 2 for _ in range(50)], [RNG.gauss(0, 1) for _ in range(50)]
    expected = {
        "pearson": scipy.stats.pearsonr(x, y).statistic,
        "spearman": scipy.stats.spearmanr(x, y).statistic,
    }
    assert correlation(x, y).scores() == pytest.approx(expected, abs=1e-12)
    assert correlation([1, 1], [1, 2]).scores() == pytest.approx(
        {"pearson": float("nan"), "spearman": float("nan")}, nan_ok=True
    )


def test_entity_f1_is_seqevals():
    """The examples of seqeval's README and of its own tests; 300 random cases were compared with
    its source too.
    """
    true = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    guessed = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    expected = {"f1": 0.5, "precision": 0.5, "recall": 0.5, "f1_macro": 0.5, "accuracy": 0.8}
    assert entity_f1(guessed, true).scores() == pytest.approx(expected)
    assert entity_f1([["I-NP", "I-NP", "O"]], [["B-NP", "I-NP", "O"]]).scores()["f1"] == 1.0
    assert entities(["B-PER", "I-PER", "O", "B-LOC"]) == [("PER", 0, 2), ("LOC", 3, 4)]
    assert entities(["B-人", "B-人", "I-地", "I-地", "O", "I-地"]) == [
        ("人", 0, 1),
        ("人", 1, 2),
        ("地", 2, 4),
        ("地", 5, 6),
    ]
    assert entity_f1([["O"]], [["O"]]).scores() == {
        "f1": 0.0,
        "precision": 0.0,
        "recall": 0.0,
        "f1_macro": 0.0,
        "accuracy": 1.0,
    }


@pytest.mark.parametrize("letters", ["BIES", "BMES", "BILU", "BIEW"])
@pytest.mark.parametrize("form", ["{}-P", "{}_P", "{}"])
def test_other_schemes_part_the_same_entities(letters: str, form: str):
    """王伟丽 in 北京 by 李: B M E, B E, S; compared with seqeval on 16,000 random sequences."""
    begin, inside, end, whole = (form.format(letter) for letter in letters)
    tags = [begin, inside, end, "O", begin, end, whole]
    kind = "P" if "P" in form else "_"
    assert parts_entities({*tags})
    assert entities(tags) == [(kind, 0, 3), (kind, 4, 6), (kind, 6, 7)]
    cut = [begin, end, whole, *tags[3:]]
    assert entity_f1([cut], [tags]).scores()["f1"] == pytest.approx(2 * 2 / (4 + 3))


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        (["O", "B-P", "I-P"], True),
        (["O", "I-P"], True),
        (["O", "S-P"], True),
        (["B", "M", "E", "S"], True),  # Chinese word segmentation
        (["NOUN", "VERB", "X"], False),
        (["a", "b", "i", "n"], False),  # parts of speech
        (["N-NOM", "V-PST"], False),
        (["LABEL_0", "LABEL_1"], False),
        (["ADJ", "O"], False),
    ],
)
def test_which_tags_part_entities(labels: list[str], parts: bool):
    assert parts_entities(labels) == parts


@pytest.mark.parametrize(
    ("labels", "strange"),
    [
        (["O", "B-P", "I-P", "PAD"], "PAD"),
        (["O", "B-P", "X-P"], "X-P"),
        (["O", "X-P", "Y-P"], "X-P"),
        (["O", "P-B", "P-I"], "P-B"),
        (["O", "b-p", "i-p"], "b-p"),
    ],
)
def test_tags_of_an_unknown_scheme_are_refused(labels: list[str], strange: str):
    with pytest.raises(DataError, match=rf"(?s)no scheme that is known.*{strange}.*B-TYPE"):
        parts_entities(labels)


ANSWERED = [
    ("The Cat!", ["cat", "a dog"]),
    ("in the year 1990", ["1990", "the year 1990"]),
    ("", ["Norman"]),
    ("U.S. troops", ["us"]),
]
SILENT = [("", []), ("Paris", [])]


def test_squad_1():
    """By hand: F1 1, 0.8 (in year 1990 / year 1990), 0, 2/3."""
    scores = squad(*zip(*ANSWERED, strict=True)).scores()
    assert scores == pytest.approx({"exact_match": 25.0, "f1": 100 * (1 + 0.8 + 0 + 2 / 3) / 4})


def test_squad_2_with_a_threshold():
    """Compared with the official script on 200 random sets too; here by hand."""
    texts, answers = zip(*ANSWERED, *SILENT, strict=True)
    plain = squad(texts, answers).scores()
    assert plain["no_answer_accuracy"] == 50.0
    assert plain["has_answer_f1"] == pytest.approx(100 * (1.8 + 2 / 3) / 4)
    no_answer = [0.1, 0.2, 0.9, 0.8, 0.7, 0.6]
    strict = squad(texts, answers, no_answer=no_answer, threshold=0.5).scores()
    assert strict == pytest.approx(
        {
            "exact_match": 50.0,
            "f1": 100 * 3.8 / 6,
            "has_answer_exact_match": 25.0,
            "has_answer_f1": 45.0,
            "no_answer_accuracy": 100.0,
        }
    )
    assert best_threshold(texts, answers, no_answer) == pytest.approx(
        {"best_f1": 100 * 3.8 / 6, "best_f1_threshold": 0.2}
    )
    assert squad(texts, answers, no_answer=no_answer, threshold=0.2).scores()[
        "f1"
    ] == pytest.approx(100 * 3.8 / 6)
    assert best_threshold(["x"], [[]], [2.0])["best_f1_threshold"] < 2.0  # say nothing at all


def test_squad_of_chinese_is_by_characters():
    """As MLQA's script: 5 of 6 and 5 of 5 characters are shared; full-width punctuation is none."""
    scores = squad(["中国的北京市", "《红楼梦》。"], [["中国北京市"], ["红楼梦"]]).scores()
    assert scores == pytest.approx({"exact_match": 50.0, "f1": 100 * (2 * 5 / 11 + 1) / 2})


ENGLISH = ["The cat is on the mat.", "It's 5 o'clock - isn't it?", "Guten Tag, Welt", "one"]
GUESSED = ["The cat sat on a mat.", "It is 5 o'clock, isn't it?", "Guten Tag Welt!", ""]


def test_bleu_and_chrf_equal_sacrebleu():
    measure = translation(GUESSED, ENGLISH)
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    expected = {
        "bleu": bleu.corpus_score(GUESSED, [ENGLISH]).score,
        "chrf": chrf.corpus_score(GUESSED, [ENGLISH]).score,
    }
    assert measure.scores() == pytest.approx(expected)
    assert measure.notes == {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())}
    assert "tok:13a" in measure.notes["bleu"]
    low, high = measure.intervals(seed=1)["bleu"]
    assert low < expected["bleu"] < high


def test_bleu_of_several_references_not_as_many_for_each():
    several = [[ENGLISH[0], "A cat sat on the mat."], [ENGLISH[1]], [ENGLISH[2]], [ENGLISH[3]]]
    streams = [ENGLISH, ["A cat sat on the mat.", None, None, None]]
    measure = translation(GUESSED, several)
    assert measure.scores()["bleu"] == pytest.approx(
        sacrebleu.BLEU().corpus_score(GUESSED, streams).score
    )
    assert "nrefs:var" in measure.notes["bleu"]


def test_bleu_of_chinese():
    true, guessed = (
        ["我喜欢在北京的秋天散步。", "今天天气很好，我们去公园。"],
        ["我喜欢北京的秋天。", "今天天气很好，我们去公园吧。"],
    )
    measure = translation(guessed, true)
    assert measure.scores()["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(guessed, [true], tokenize="zh").score
    )
    assert "tok:zh" in measure.notes["bleu"]
    assert (
        measure.scores()["bleu"] > 5 * translation(guessed, true, tokenize="13a").scores()["bleu"]
    )


def test_the_tokenizer_follows_the_script():
    # the first with MeCab installed
    assert bleu_tokenizer(["今日は天気がいいですね"]) in (
        "ja-mecab",
        "char",
    )
    assert [
        bleu_tokenizer([t])
        for t in ("สวัสดีครับ", "Привет, мир", "안녕하세요", "他说 OK，没问题", "", "the word 好 once")
    ] == ["char", "13a", "13a", "zh", "13a", "13a"]
    with pytest.raises(ConfigError, match="did you mean"):
        translation(["a"], ["a"], tokenize="13b")


def test_rouge_equals_rouge_score():
    true = ["The cat sat on the mat.\nThe dog, 3 years old, lay under the tree.", "A short one"]
    guessed = ["A cat sat on a mat.\nUnder the tree lay a dog.", "Quite another_one"]
    stock = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    expected = [stock.score(t, g) for t, g in zip(true, guessed, strict=True)]
    means = {
        name: (expected[0][name].fmeasure + expected[1][name].fmeasure) / 2 for name in expected[0]
    }
    assert rouge(guessed, true).scores() == pytest.approx(means)
    assert rouge(guessed[:1], [true]).scores()["rouge1"] == pytest.approx(
        expected[0]["rouge1"].fmeasure
    )


@pytest.mark.parametrize(
    "text",
    [
        "北京是中国的首都。",
        "Привет, мир",
        "नमस्ते दुनिया",
        "สวัสดีครับ",
        "서울은 한국의 수도",
        "Ärger über Öl",
    ],
)
def test_rouge_of_the_same_text_is_1_in_every_script(text):
    assert rouge([text], [text]).scores() == pytest.approx(
        dict.fromkeys(["rouge1", "rouge2", "rougeL", "rougeLsum"], 1.0)
    )
    assert RougeScorer(["rouge1"]).score(text, text)["rouge1"].fmeasure < 1 or text.startswith("Ä")


def test_rouge_of_chinese_by_hand():
    """4 of 5 and 4 of 4 characters are shared, 2 of 4 and 2 of 3 pairs."""
    scores = rouge(["我爱北京"], ["我很爱北京"]).scores()
    assert scores["rouge1"] == pytest.approx(2 * 4 / 9)
    assert scores["rouge2"] == pytest.approx(2 * 2 / 7)
    assert RougeTokenizer().tokenize("我用Python 3，नमस्ते!") == ["我", "用", "python", "3", "नमस्ते"]


def test_perplexity_and_bits_per_byte():
    """Two documents whose tokens cost 1 and 3 bits: 4 tokens of 8 bits, of 4 bytes in all."""
    scores = language_model(
        [2 * 0.6931471805599453, 6 * 0.6931471805599453], [2, 2], [2, 2]
    ).scores()
    assert scores == pytest.approx(
        {"loss": 2 * 0.6931471805599453, "perplexity": 4.0, "bits_per_byte": 2.0}
    )
