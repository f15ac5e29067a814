"""What the tests of tasks share: tokenizers that mark sentences as BERT's does, micro-batches, and
a few steps of training.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig

from hfscale.config.schema import Named
from hfscale.objectives.base import Setting
from hfscale.stream.examples import Examples
from hfscale.tasks.table import load_task, task_class
from hfscale.training.accounting import Accounting
from tests.objectives.tokenizers import tokenizer


def marking_tokenizer(kind: str) -> Any:
    """Return the tests' tokenizer of ``kind`` that writes [CLS] text [SEP] pair [SEP]."""
    import copy

    from tokenizers import processors

    made = copy.deepcopy(tokenizer(kind))
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, made.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")],
    )
    return made


def make_task(
    name: str, examples: list[dict], *, tokenizer: Any, seq_len: int = 32, **options: Any
) -> Any:
    kind = task_class(name)
    facts = kind.facts(kind.Options(**options), examples)
    return load_task(
        Named(name=name, options=options),
        Setting(seq_len=seq_len, tokenizer=tokenizer, facts=facts),
    )


def rows_of(task: Any, examples: list[dict], *, valid: list[bool] | None = None) -> Examples:
    features = [
        {**feature, "example": n}
        for n, example in enumerate(examples)
        for feature in task.features(example)
    ]
    n = len(features)
    return Examples(
        features,
        torch.tensor(valid or [True] * n),
        torch.zeros(n, dtype=torch.int16),
        torch.arange(n),
    )


def bert(task: Any, model_class: Any) -> Any:
    torch.manual_seed(0)
    return model_class(
        BertConfig(
            vocab_size=len(task.setting.tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **task.model_overrides(),
        )
    ).eval()


def learn(task: Any, model: Any, examples: list[dict], *, steps: int, lr: float = 3e-3) -> float:
    """Return the loss after some full-batch steps."""
    batch = task.collate(rows_of(task, examples))
    [(term, count)] = Accounting(task).counts([batch]).items()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, batch)[term].sum() / count
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def answers(task: Any, model: Any, examples: list[dict]) -> list[dict]:
    """Return the predictions, one an example."""
    rows = rows_of(task, examples)
    outputs = task.predict(model, task.collate(rows), rows)
    return [
        task.answer(
            example,
            [
                output
                for output, row in zip(outputs, rows.features, strict=True)
                if row["example"] == n
            ],
        )
        for n, example in enumerate(examples)
    ]
