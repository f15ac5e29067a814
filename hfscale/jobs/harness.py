"""Tasks of EleutherAI's lm-evaluation-harness (Gao et al. 2024, arXiv 2405.14782) on a model by name: of a run of any ZeRO stage too.

The harness asks three things of a model (loglikelihood, loglikelihood_rolling, generate_until); its own wrapper of transformers' models
answers them, around the model that our weights reader fills.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hfscale.checkpoint import layout
from hfscale.dist.group import default_device
from hfscale.errors import ConfigError, nearest
from hfscale.hub import local_folder
from hfscale.jobs.evaluate import folder_of
from hfscale.jobs.opening import model_and_tokenizer, open_run

BATCH = 16


def run(name: str, tasks: Sequence[str], *, path: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Return the scores of MODEL ``name`` as ``described`` gives them, with 95 % intervals, and where they belong.

    With ``path``, a folder of task YAMLs, only its tasks are known; without, those of the harness, whose data comes from the hub.

    Raises:
        UserError: if lm-eval is not installed, a task is unknown, or the model writes no text.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"the harness cannot be loaded: {error}", where="--harness", remedy="pip install 'hfscale[eval]'") from error
    source, (config, tokenizer) = open_run(name), model_and_tokenizer(name)
    kind = type(source.skeleton).__name__ if source else (config.architectures or [""])[0]
    if not kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise ConfigError("the harness asks for likelihoods of texts, which this model does not give", where=name, value=kind)
    known = TaskManager(include_path=str(path) if path else None, include_defaults=path is None)
    if unknown := [task for task in tasks if task not in known.all_tasks]:
        raise ConfigError("there is no such task", where=path or "--harness", value=unknown[0], remedy=nearest(unknown[0], known.all_tasks))
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = source.model() if source else auto.from_pretrained(local_folder(name, where="MODEL", weights=True)).eval()
    model = model.to(default_device())  # type: ignore[arg-type]
    made: Any = simple_evaluate(HFLM(model, tokenizer=tokenizer, batch_size=BATCH), tasks=[*tasks], task_manager=known)
    figures = {f"{task}/{key}".removesuffix(",none"): value for task, some in made["results"].items() for key, value in some.items()
               if isinstance(value, float)}  # my_task/acc, my_task/acc_stderr; after a comma the name of a filter
    scores = {key: value for key, value in figures.items() if "_stderr" not in key}
    errors = {key.replace("_stderr", ""): 1.96 * value for key, value in figures.items() if "_stderr" in key}
    found = {"task": "lm_eval", "versions": made["versions"], "examples": sum(count["effective"] for count in made["n-samples"].values()),
             "scores": scores, "intervals": {key: [scores[key] - half, scores[key] + half] for key, half in errors.items()}, "notes": {}}
    about = {"model": str(layout.checkpoint_of(name) or name), "found": str(found)}
    return folder_of(name, "harness-" + "-".join(tasks)[:80], about), found
