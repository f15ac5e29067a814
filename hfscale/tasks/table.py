"""The table of tasks: what a config's ``task.name`` stands for, and what its features depend on."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

from hfscale.config.schema import Named
from hfscale.objectives.base import Setting, check_options
from hfscale.registry import load_plugin
from hfscale.tasks.base import Task

TASKS: dict[str, str] = {
    "translation": "hfscale.tasks.text_generation:Translation",
    "summarization": "hfscale.tasks.text_generation:Summarization",
    "instruction": "hfscale.tasks.instruction:Instruction",
    "embedding": "hfscale.tasks.embedding:Embedding",
    "fill_mask": "hfscale.tasks.inference:FillMask",
    "feature_extraction": "hfscale.tasks.inference:FeatureExtraction",
    "text_generation": "hfscale.tasks.inference:TextGeneration",
    "sequence_classification": "hfscale.tasks.sequence_classification:SequenceClassification",
    "token_classification": "hfscale.tasks.token_classification:TokenClassification",
    "extractive_qa": "hfscale.tasks.extractive_qa:ExtractiveQA",
}


def task_class(name: str) -> type[Task]:
    """Return the class of a task.

    Raises:
        ConfigError: if there is none of this name; the message offers the nearest.
    """
    task: type[Task] = load_plugin("task", TASKS, name)
    return task


def load_task(named: Named, setting: Setting) -> Task:
    """Return the task that a config names, with its options checked.

    Raises:
        ConfigError: for an unknown task or option, or a value out of range.
    """
    kind = task_class(named.name)
    return kind(check_options(kind.Options, named.options, where="task.options"), setting)


def code_digest(kind: type[Task]) -> str:
    """Return the digest of the code of a task, of what tasks share, and of the metrics: what was
    made by other code is not found in a cache.
    """
    rooms = Path(__file__).parent, Path(__file__).parents[1] / "metrics"
    files = {Path(inspect.getfile(kind)), *(file for room in rooms for file in room.glob("*.py"))}
    code = hashlib.blake2b(digest_size=8)
    for file in sorted(files):
        code.update(file.read_bytes())
    return code.hexdigest()


def cache_key(task: Task) -> str:
    """Return all that ``task.features`` depends on, beside the example."""
    tokenizer, setting = task.setting.tokenizer, task.setting
    texts = (
        tokenizer.backend_tokenizer.to_str()
        + str(tokenizer.chat_template)
        + str(tokenizer.special_tokens_map)
    )
    return json.dumps(
        [
            code_digest(type(task)),
            task.options.model_dump(mode="json"),
            dict(setting.facts),
            setting.seq_len,
            hashlib.blake2b(texts.encode(), digest_size=16).hexdigest(),
        ]
    )
