"""Embeddings: InfoNCE with hard negatives by hand, toy pairs learnt, STS and retrieval scores, the
export's hidden states.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import pipeline

from hfscale.config.finetune import FinetuneConfig
from hfscale.config.schema import Named
from hfscale.errors import DataError
from hfscale.objectives.contrastive import text_keys
from hfscale.run.run import Run
from hfscale.stream.examples import BadExample
from hfscale.tasks import sentence_embedding
from hfscale.tasks.table import load_task
from hfscale.training.accounting import Accounting
from launch.commands.evaluate import evaluate
from tests.helpers.labelled import make_encoder, task_values, write_jsonl
from tests.tasks.toys import load, predict, rows_of, train, words_tokenizer

ENGLISH, CHINESE = ["river", "town", "old", "slow", "bridge", "night"], list("河城老慢桥夜")
PAIRS = [
    {"id": str(n), "text": text, "positive": positive, "negative": negative}
    for n, (text, positive, negative) in enumerate(
        [("old river", "老 河", "老 桥"), ("slow", "慢", "夜"), ("town night", "城 夜", "城 河")]
    )
]


def embedding(**options: Any) -> Any:
    words = words_tokenizer(" ".join([*ENGLISH, *CHINESE]), cls_token="[CLS]", sep_token="[SEP]")
    return *load("embedding", words, family="bert", **options), words


def without(role: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in pair.items() if name != role} for pair in PAIRS]


@pytest.mark.parametrize("pairs", [PAIRS, without("negative")], ids=["triples", "pairs"])
def test_the_loss_is_over_all_positives_and_hard_negatives(pairs: list[dict[str, Any]]) -> None:
    task, model, _ = embedding(temperature=0.1)
    one, two = task.collate(rows_of(task, pairs[:2])), task.collate(rows_of(task, pairs[2:]))
    accounting = Accounting(task)
    counts = accounting.counts([one, two])
    sum(loss for loss in accounting.losses(model, [one, two], counts)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()

    def vectors(role: str) -> torch.Tensor:
        return torch.cat(
            [
                F.normalize(
                    model(
                        input_ids=torch.tensor([task.encode(pair[role])["input_ids"]])
                    ).last_hidden_state.mean(1)
                )
                for pair in pairs
            ]
        )

    candidates = torch.cat([vectors(role) for role in pairs[0] if role in ("positive", "negative")])
    by_hand = F.cross_entropy(vectors("text") @ candidates.T / 0.1, torch.arange(3))
    assert accounting.take_sums()["contrastive"].item() / counts["contrastive"] == pytest.approx(
        by_hand.item(), rel=1e-5
    )
    by_hand.backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_toy_pairs_are_learnt_and_found(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [[rng.randrange(6) for _ in range(3)] for _ in range(300)]
    toy = [
        {
            "id": str(n),
            "text": " ".join(ENGLISH[k] for k in row),
            "positive": " ".join(CHINESE[k] for k in row),
        }
        for n, row in enumerate(dict.fromkeys(map(tuple, map(sorted, texts))))
    ]
    task, model, words = embedding()
    tests, learnt = toy[:12], toy[12:]

    def scores() -> dict[str, float]:
        rows = rows_of(task, tests)
        with torch.no_grad():
            sums, outputs = task.judge(model.eval(), task.collate(rows), rows)
        assert outputs == task.predict(model.eval(), task.collate(rows), rows) and sums[
            "contrastive"
        ].shape == (12,)
        return task.score(outputs, tests)

    before = scores()
    train(task, model.train(), learnt, steps=40, batch=24)
    after = scores()
    assert (
        after["accuracy"] >= 0.75 > before["accuracy"]
        and 1 >= after["mrr"] > before["mrr"]
        and after["recall_at_10"] == 1
    )

    texts = [example["text"] for example in tests]
    for pooling in ("mean", "cls", "last"):
        task = load_task(Named(name="embedding", options={"pooling": pooling}), task.setting)
        folder = tmp_path / pooling
        task.finish(model, words)
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        shutil.copy(sentence_embedding.__file__, folder)
        use = pipeline("sentence-embedding", str(folder), trust_remote_code=True)
        got = [answer["prediction"] for answer in predict(task, model.eval(), tests)]
        np.testing.assert_allclose(use(texts), got, atol=1e-6)
        np.testing.assert_allclose(
            use([*texts, texts[0] + " slow"], batch_size=4)[:-1], got, atol=1e-5
        )


def test_scores() -> None:
    task, _, _ = embedding()
    angles = [0.0, 0.3, 0.9, 1.2]
    predictions = [{"prediction": [1.0, 0.0], "positive": [np.cos(a), np.sin(a)]} for a in angles]
    assert task.score(predictions, [{"score": s} for s in (5, 4, 2.5, 0)])[
        "spearman"
    ] == pytest.approx(1.0)
    assert task.score(predictions, [{"score": s} for s in (0, 4, 5, 2)])[
        "spearman"
    ] == pytest.approx(-0.4)
    found = task.score(predictions, [{}] * 4)
    assert found.keys() <= task.metrics
    assert found["accuracy"] == 0.25 and found["mrr"] == pytest.approx(
        (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    )
    assert task.score(predictions[:1] * 5, [{}] * 5)["accuracy"] == 1.0, (
        "equal positives are all right"
    )


def test_equal_texts_are_no_negatives_of_each_other() -> None:
    """Each positive twice, perfect vectors: the loss is 0 (it was ln 2), and every answer of a
    question is right.
    """
    task, _, _ = embedding()
    pairs = [("a", "x"), ("b", "y"), ("c", "x"), ("a", "z")]
    axes = {"x": 0, "y": 1, "z": 2}
    ids = {name: n for n, name in enumerate("abcxyz")}
    answers = F.one_hot(torch.tensor([axes[p] for _, p in pairs]), 3).float()
    views_VNH = torch.stack([answers, answers])
    views_VNH[0, [0, 3]] = F.normalize(torch.tensor([1.0, 0.0, 1.0]), dim=0)  # a: as near to x as z
    keys_VN = torch.tensor([[ids[text] for text, _ in pairs], [ids[p] for _, p in pairs]])
    loss, sums = task.contrastive.compare(views_VNH, torch.ones(4), keys_VN)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert sums["retrieval_accuracy"].tolist() == [1.0] * 4
    predictions = [
        {"prediction": text.tolist(), "positive": positive.tolist()}
        for text, positive in views_VNH.transpose(0, 1)
    ]
    predictions[0]["prediction"] = [0.6, 0.0, 0.8]  # z, which is an answer to a as well
    references = [{"text": text, "positive": positive} for text, positive in pairs]
    measure = task.measure(predictions, references)
    assert measure.scores()["accuracy"] == measure.scores()["mrr"] == 1.0
    assert measure.notes["repeated"].startswith("3 texts and 3 positives differ")
    assert task.facts_of_training(task.options, references) == {"repeated": 2}


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_an_export_says_to_sentence_transformers_how_it_pools(pooling: str) -> None:
    """Its vectors are then ours to all digits (tried with 5.1); without these files it takes the
    mean, and no unit vectors.
    """
    task, model, _ = embedding(pooling=pooling)
    files = {path: json.loads(text) for path, text in task.files(model.config).items()}
    assert [module["type"].rpartition(".")[2] for module in files["modules.json"]] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    chosen = [key for key, value in files["1_Pooling/config.json"].items() if value is True]
    names = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    assert chosen == [f"pooling_mode_{names[pooling]}"]
    assert files["1_Pooling/config.json"]["word_embedding_dimension"] == model.config.hidden_size
    assert files["sentence_bert_config.json"]["max_seq_length"] == task.setting.seq_len


def test_a_task_from_before_there_was_a_model_checks_one() -> None:
    """As an export does, that has a checkpoint and no training beside it."""
    task, model, _ = embedding()
    early = type(task)(task.options, replace(task.setting, model_config=None))
    early.setting = replace(early.setting, model_config=model.config)
    early.check(model, device="cpu")


def test_the_key_of_a_text_knows_no_padding() -> None:
    task, _, _ = embedding()
    alone = text_keys(task.collate(rows_of(task, PAIRS[:1])))
    beside = text_keys(task.collate(rows_of(task, [PAIRS[0], *PAIRS[1:], PAIRS[0]])))
    assert alone[:, 0].tolist() == beside[:, 0].tolist() == beside[:, -1].tolist()
    assert len({*beside[:, :-1].flatten().tolist()}) == len(
        {text for pair in PAIRS for role, text in pair.items() if role != "id"}
    )


def test_what_cannot_be_learnt_from() -> None:
    task, _, _ = embedding()
    with pytest.raises(BadExample, match="positive is empty"):
        task.features({"id": "0", "text": "old", "positive": ""})
    for score in ("", "high", float("nan")):
        with pytest.raises(BadExample, match="score .* is not a number"):
            task.answered_features({"id": "0", "text": "old", "positive": "slow", "score": score})
    with pytest.raises(BadExample, match="for evaluation"):
        task.facts_of_training(task.options, [{**PAIRS[0], "score": 3}])
    with pytest.raises(BadExample, match="others have none"):
        task.facts_of_training(task.options, [PAIRS[0], without("negative")[1]])


def test_what_cannot_be_learnt_from_can_be_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs with a score, or with hard negatives here and there: by the command, on predictions
    that are there.
    """
    pairs = [{"id": str(n), "text": "old", "positive": "slow", "score": n} for n in range(3)]
    vectors = [
        {"id": str(n), "prediction": [1.0, 0.0], "positive": [float(np.cos(n)), float(np.sin(n))]}
        for n in (2, 1, 0)
    ]
    predictions = write_jsonl(tmp_path / "vectors.jsonl", vectors)
    evaluate(
        task=["embedding"],
        data=[str(write_jsonl(tmp_path / "sts.jsonl", pairs))],
        predictions=predictions,
    )
    assert "spearman                     -1.0000" in capsys.readouterr().out
    mixed = [PAIRS[0], *without("negative")[1:]]
    evaluate(
        task=["embedding"],
        data=[str(write_jsonl(tmp_path / "mixed.jsonl", mixed))],
        predictions=predictions,
    )
    assert "mrr" in capsys.readouterr().out
    make_encoder(tmp_path / "encoder")
    for rows, words in (
        (pairs, "(?s)for evaluation.*sts.jsonl"),
        (mixed, "(?s)others have none.*mixed.jsonl"),
    ):
        file = tmp_path / ("sts.jsonl" if rows is pairs else "mixed.jsonl")
        with pytest.raises(DataError, match=words):
            Run(
                FinetuneConfig.model_validate(
                    task_values(
                        tmp_path,
                        "run",
                        task={"name": "embedding"},
                        data={"train": str(file), "validation": None},
                    )
                )
            ).check()
