"""Export: a checkpoint becomes a transformers folder, and is published only if transformers gives
the run's own logits.

Every checkpoint carries the live engine's logits on a small probe batch, so the proof needs neither
the run nor its GPUs.
"""

from __future__ import annotations

import re
import shutil
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import indent

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.checkpoint.export import write_weights
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.load import to_yaml
from hfscale.errors import CheckpointError, literal, shown
from hfscale.jobs.adapters import load_adapter, use_adapter, write_adapter
from hfscale.jobs.asked import tell_of_best
from hfscale.log import logger
from hfscale.models.kinds import WRITERS
from hfscale.monitor.lines import Lines
from hfscale.objectives.base import Objective
from hfscale.run.look import look_at_export
from hfscale.run.model import RunModel, find
from hfscale.run.proof import prove
from hfscale.shards.files import whole_folder
from hfscale.tasks.base import Task
from hfscale.tokenizer import save_tokenizer

# the sections of a config that the card shows
TRAINED = (
    "model",
    "objective",
    "task",
    "optim",
    "schedule",
    "train",
    "engine",
)


def run(name: str, out: Path, *, adapter: bool = False) -> str:
    """Return lines of Python that use the model which is now published at ``out``: of a run of
    adapters merged, or the ``adapter`` alone.

    Raises:
        CheckpointError: if ``out`` exists, ``name`` is no run or checkpoint of ours, or the logits
            differ; then nothing is published.
    """
    look_at_export(name, out)
    source = find(name)
    assert isinstance(source, RunModel), "it is a checkpoint"
    weights, skeleton = source.weights, source.skeleton
    tell_of_best(source)
    with whole_folder(out) as folder:
        try:
            if adapter:
                write_adapter(source, folder)
            else:
                write_weights(weights, skeleton, folder)
        except OSError as error:
            raise CheckpointError(
                "the weights cannot be written; nothing was published",
                where=out.parent,
                value=error.strerror,
                remedy="make room, or export to another disk",
            ) from error
        _write_beside(source, folder, adapter=adapter)
        difference = prove(
            folder,
            source.trained,
            skeleton=skeleton,
            checkpoint=source.checkpoint,
            config=source.run,
            load=partial(load_adapter, source) if adapter else None,
        )
        (folder / "README.md").write_text(card(source, difference, adapter=adapter), "utf-8")
    _note(source, out)
    logger.info(
        f"exported step {layout.step_of(source.checkpoint)} to {out}; logits equal to "
        f"{difference:.1e}"
    )
    return use_adapter(source, out) if adapter else usage(source.trained, out)


def _note(source: RunModel, out: Path) -> None:
    """Write down in the run that it was exported; the export stands without."""
    run_dir = run_files.run_of(source.checkpoint)
    step = layout.step_of(source.checkpoint)
    try:
        lines = Lines(run_dir / run_files.EXPORTS)
        lines.append({"time": round(time.time(), 3), "step": step, "folder": str(out.resolve())})
        lines.close()
    except (OSError, CheckpointError) as error:
        logger.info(f"notice: the run itself does not say that it was exported: {error}")


def _write_beside(source: RunModel, folder: Path, *, adapter: bool) -> None:
    """Write what lies beside the weights: config, tokenizer, how it generates, code of a task."""
    objective, skeleton = source.trained, source.skeleton
    if isinstance(objective, Task):
        config = source.run
        assert isinstance(config, FinetuneConfig), "it has a task"
        skeleton.config.hfscale = {
            "task": config.task.model_dump(mode="json"),
            "max_length": config.data.max_length,
        }
        objective.finish(skeleton, source.tokenizer)
        if objective.code and not adapter:
            shutil.copy(str(import_module(objective.code).__file__), folder)
    # by which others, and we, know what it is for
    skeleton.config.architectures = [type(skeleton).__name__]
    if not adapter:  # transformers takes a folder with a config.json for a whole model
        skeleton.config.save_pretrained(folder)
        _write_files(objective.files(skeleton.config), folder)
    if skeleton.can_generate():
        # not by save_pretrained: it refuses what published models say (a temperature without
        # do_sample)
        how = skeleton.generation_config.to_json_string()
        (folder / layout.GENERATION).write_text(how, "utf-8")
    save_tokenizer(_padding(source.framed, skeleton), folder)


def _write_files(files: dict[str, str], folder: Path) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, "utf-8")


def _padding(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """Return the tokenizer with the token that the model takes for padding, without which pipelines
    take one text at a time.
    """
    known = [model.config.pad_token_id]
    if model.can_generate():
        known += [model.generation_config.pad_token_id, tokenizer.eos_token_id]
    pad_id = next((id_ for id_ in known if id_ is not None), None)
    if tokenizer.pad_token is None and pad_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return tokenizer


def usage(objective: Objective, folder: Path | str) -> str:
    """Return lines of Python that use the model in ``folder``."""
    task, mark = objective.pipeline, objective.setting.tokenizer.mask_token or "<extra_id_0>"
    place, marked = literal(folder), literal(f"Once upon a {mark}")
    if task is None and objective.auto_model not in WRITERS:
        return f"""from transformers import AutoTokenizer, {(model := objective.auto_model)}
tokenizer, model = AutoTokenizer.from_pretrained({place}), {model}.from_pretrained({place})
print(model(**tokenizer("Once upon a time", return_tensors="pt")))"""
    if task is None:
        return f"""from transformers import AutoTokenizer, {(model := objective.auto_model)}
tokenizer, model = AutoTokenizer.from_pretrained({place}), {model}.from_pretrained({place})
inputs = tokenizer({marked}, return_tensors="pt")
print(tokenizer.batch_decode(model.generate(inputs.input_ids, max_new_tokens=40)))"""
    chats = isinstance(objective, Task) and objective.setting.tokenizer.chat_template
    chat = '[{"role": "user", "content": "Once upon a time"}]' if chats else '"Once upon a time"'
    text = {
        "text-generation": f"{chat}, max_new_tokens=40",
        "fill-mask": marked,
        "question-answering": 'question="Who wrote it?", context="Ada wrote it."',
    }.get(task, '"Once upon a time"')
    # of one file, which lies in the folder
    trusted = ", trust_remote_code=True" if getattr(objective, "code", None) else ""
    return f"""from transformers import pipeline
use = pipeline("{task}", model={place}{trusted})
print(use({text}))"""


def _started_from(source: RunModel) -> str | None:
    """Return what the user said: a name of the hub as it is, not where this machine keeps it; of a
    path what was found there.
    """
    said = source.run.model.pretrained
    if said is None or not Path(said).is_absolute():
        return said
    return source.state.pretrained or said


def card(source: RunModel, difference: float, *, adapter: bool = False) -> str:
    """Return the model card: the run's facts, and how to use the model."""
    at, config = source.state, source.run
    if isinstance(config, FinetuneConfig):
        data = Path(config.data.train).name
    else:
        data = ", ".join(f"{one.name} (weight {one.weight:g})" for one in config.data.sources)
    rows = {
        "architecture": f"{source.skeleton.config.model_type}, "
        f"{sum(p.numel() for p in source.skeleton.parameters()):,} parameters",
        "started from": _started_from(source) or "new weights",
        "trained on": f"{at.tokens_seen:,} tokens in {at.step:,} steps of "
        f"{config.train.global_batch} x {config.data.seq_len} tokens",
        "data": f"{data}; fingerprint {at.data_fingerprint[:16]}, tokenizer "
        f"{at.tokenizer_digest[:16]}",
        "figures": ", ".join(
            f"{key} {value:,.6g}"
            for key, value in at.metrics.items()
            if isinstance(value, int | float)
        )
        or "none",
        "versions": f"{at.versions}, exported by transformers {transformers.__version__}",
        "proof": f"logits equal to the training engine's, relative difference {difference:.1e}",
    }
    # not the rest of the config: a card is for everybody, and that names folders, hosts and
    # accounts
    trained = "".join(
        f"{name}:\n{indent(to_yaml(getattr(config, name)), '  ')}"
        for name in TRAINED
        if hasattr(config, name)
    )
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    base = config.model.pretrained
    hub = f"\nbase_model: {literal(base)}" if base and not Path(base).is_absolute() else ""
    place = "PATH_OF_THIS_FOLDER"
    used = use_adapter(source, place) if adapter else usage(source.trained, place)
    return f"""---
library_name: {"peft" if adapter else "transformers"}{hub}
tags: [hfscale]
---
# {config.run.name}

| | |
|---|---|
{table}

{_block("python", used)}

How it was trained:
{_block("yaml", trained.rstrip())}
"""


def _cell(text: str) -> str:
    """Return ``text`` for a cell of a Markdown table: a name that somebody else chose neither
    leaves it nor becomes a link or HTML.
    """
    return re.sub(r"([\\|`\[\]*_])", r"\\\1", shown(text)).replace("<", "&lt;")


def _block(language: str, text: str) -> str:
    """Return ``text`` as a block of code that nothing in it can end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", text))])
    return f"{fence}{language}\n{text}\n{fence}"
