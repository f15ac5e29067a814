"""Tiny models, a byte-level tokenizer of two languages, and a few seconds of training, for tests of
tasks that write text.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from hfscale.config.schema import Model, Named
from hfscale.models.build import build_model, special_ids
from hfscale.objectives.base import Setting
from hfscale.stream.examples import Examples
from hfscale.tasks.base import Task
from hfscale.tasks.table import load_task
from hfscale.training.accounting import Accounting
from tests.models.families import FAMILIES


def words_tokenizer(words: str, **special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of these words (separated by spaces) and every Chinese character in
    them.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    vocabulary = [*special.values(), *dict.fromkeys(words.split())]
    made = Tokenizer(
        models.WordLevel(
            {word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"
        )
    )
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def rows_of(task: Task, examples: list[dict[str, Any]], *, fillers: int = 0) -> Examples:
    """Return the features of the examples as one micro-batch; the last ``fillers`` of them are not
    valid.
    """
    features = [
        {**feature, "example": number}
        for number, example in enumerate(examples)
        for feature in task.features(example)
    ]
    n = len(features)
    return Examples(
        features, torch.arange(n) < n - fillers, torch.zeros(n, dtype=torch.int16), torch.arange(n)
    )


def load(
    name: str,
    tokenizer: Any,
    *,
    family: str = "t5",
    seq_len: int = 32,
    seed: int = 3,
    model: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Return a task and a model for it, without dropout, that knows nothing yet."""
    setting = {"seq_len": seq_len, "tokenizer": tokenizer, "micro_batch": 4, "facts": facts or {}}
    task = load_task(Named(name=name, options=options), Setting(**setting))
    known = FAMILIES[family][1]
    dropout = {"t5": {"dropout_rate": 0.0}, "bart": {"dropout": 0.0}, "llama": {}}.get(family, {})
    if family == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    if family == "bert":
        dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    config = Model(
        architecture=known.architecture, config={**known.config, **dropout, **(model or {})}
    )
    made = build_model(
        config,
        seq_len=seq_len,
        seed=seed,
        auto_model=task.auto_model,
        vocab_size=len(tokenizer),
        overrides=special_ids(tokenizer),
    )
    return load_task(
        Named(name=name, options=options), Setting(**setting, model_config=made.config)
    ), made.eval()


def train(
    task: Task,
    model: Any,
    examples: list[dict[str, Any]],
    *,
    steps: int,
    lr: float = 3e-3,
    batch: int = 32,
) -> float:
    """Return the mean loss of the last step, after AdamW on ``examples`` in turn, as the loop does
    it.
    """
    accounting = Accounting(task)
    adamw = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        rows = [examples[(step * batch + k) % len(examples)] for k in range(batch)]
        batches = [task.collate(rows_of(task, rows[half::2])) for half in range(2)]
        counts = accounting.counts(batches)
        for group in adamw.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
        adamw.zero_grad()
        for loss in accounting.losses(model, batches, counts):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
    term, sums = next(iter(accounting.take_sums().items()))
    return sums.item() / counts[term]


def predict(task: Task, model: Any, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the prediction for each example, from what is known of it without its answers."""
    asked = [
        {role: value for role, value in example.items() if role not in task.answers}
        for example in examples
    ]
    rows = rows_of(task, asked)
    with torch.no_grad():
        return [
            task.answer(example, [output])
            for example, output in zip(
                asked, task.predict(model, task.collate(rows), rows), strict=True
            )
        ]
