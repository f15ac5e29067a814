"""From a config to one that is rehearsed: the same architecture, tokenizer, objective or task,
precision, stage, data and paths, with a model that is small and a run of a few steps.

Depth: as many layers as show each kind that the architecture mixes (local and global attention,
say). Width: heads are cut in their ratio of groups, so what divides what stays. Where a small model
cannot be built so, less is cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hfscale.config.finetune import Examples, FinetuneConfig
from hfscale.config.schema import Data, TrainConfig
from hfscale.errors import ConfigError, UserError
from hfscale.rehearsal.plan import SAVE_EVERY, STEPS, Size
from launch.request import Request

if TYPE_CHECKING:  # which take seconds to import
    from transformers import PretrainedConfig

    from hfscale.run.run import Run

SMALL = 8_000_000  # a model of so few parameters is taken as it is
LAYERS, MOST_LAYERS, HEAD_DIM = 2, 8, 32
EXAMPLES, HELD_OUT = 16, "held-out.jsonl"  # a validation is of so many
# keys of configs of transformers; an architecture has some of each
DEPTHS = (
    "num_hidden_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_layers",
)
HEADS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads")
GROUPS = ("num_key_value_heads", "num_kv_heads")
HEAD_WIDTHS = ("head_dim", "d_kv")
WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "n_inner",
    "ffn_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "word_embed_proj_dim",
)
Values = dict[str, object]


@dataclass(frozen=True)
class Shrunk:
    """How a config is rehearsed: ``overrides`` on top of what the user said."""

    overrides: tuple[str, ...]
    whole: Size
    small: Size
    scored: bool  # whether its loss is one a token, or its task has scores


def shrink(request: Request, *, home: Path, procs: int) -> Shrunk:
    """Return how to rehearse what is asked for in the folder ``home``, on ``procs`` ranks.

    Raises:
        UserError: if the model of the config cannot be built at all.
    """
    run = _run(request)
    whole, scored = size_of(run), run.shape.objective.token_loss
    values = _short(run.config, procs=procs) | _held_out(run, home)
    short = [f"{key}={value}" for key, value in values.items()]
    short += [f"run.root={json.dumps(str(home))}"]
    if whole.parameters <= SMALL:
        return Shrunk(tuple(short), whole, whole, scored)
    for changes in _smaller(run.shape.model_config):
        try:
            if run.config.model.pretrained:
                model = [f"model.pretrained={json.dumps(str(_folder(run, changes, home)))}"]
            else:
                model = [f"model.config.{key}={json.dumps(to)}" for key, to in changes.items()]
            small = size_of(_run(request, [*short, *model]))
        except UserError:
            continue  # these sizes do not go together
        if small.parameters < whole.parameters:
            return Shrunk((*short, *model), whole, small, scored)
    return Shrunk(tuple(short), whole, whole, scored)


def _run(request: Request, more: list[str] | None = None) -> Run:
    from hfscale.run.run import Run

    return Run(request.load(more or []).config, fresh=True)


def size_of(run: Run) -> Size:
    """Return the size of what a run trains, and its layers and widths in words."""
    weights = [*run.shape.skeleton.parameters()]
    config = run.shape.model_config
    depths = [f"{config_value(config, key)} layers" for key in _present(config, DEPTHS)[:1]]
    widths = [f"{config_value(config, 'hidden_size')} wide"] if _has(config, "hidden_size") else []
    return Size(
        parameters=sum(weight.numel() for weight in weights),
        trained=sum(weight.numel() for weight in weights if weight.requires_grad),
        words=f"{config.model_type}: {', '.join([*depths, *widths])}",
    )


# -------------------------------------------------------------------------------------------- model
def config_value(config: PretrainedConfig, key: str) -> object:
    """Return the value of a key of a model's config, by the name that most architectures use."""
    return getattr(config, key, None)


def _has(config: PretrainedConfig, key: str) -> bool:
    value = config_value(config, key)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _own_name(config: PretrainedConfig, key: str) -> str:
    """Return what an architecture itself calls a key: GPT-2's hidden_size is n_embd."""
    return config.attribute_map.get(key, key)


def _present(config: PretrainedConfig, keys: tuple[str, ...]) -> list[str]:
    """Return those of ``keys`` that a config has, each thing once."""
    names = {_own_name(config, key): key for key in reversed(keys) if _has(config, key)}
    return [key for key in keys if names.get(_own_name(config, key)) == key]


def _smaller(config: PretrainedConfig) -> Iterator[Values]:
    """Yield changes of a model's config, the smallest model first."""
    flat = _depth(config)
    yield {**flat, **_width(config, head_dim=HEAD_DIM)}
    yield {**flat, **_width(config, head_dim=None)}
    yield flat


def _depth(config: PretrainedConfig) -> Values:
    """Return the changes that leave a few layers, of each kind that the config lists."""
    changes: Values = {}
    values = config.to_dict()
    for key in _present(config, DEPTHS):
        layers = int(str(config_value(config, key)))
        kinds = {
            name: value
            for name, value in values.items()
            if isinstance(value, list) and len(value) == layers
        }
        kept = max([LAYERS, *map(_showing_all, kinds.values())])
        if kept > MOST_LAYERS or kept >= layers:
            continue
        changes[_own_name(config, key)] = kept
        changes |= {name: value[:kept] for name, value in kinds.items()}
    return changes


def _showing_all(kinds: list[object]) -> int:
    """Return after how many layers each kind was there."""
    texts = [str(kind) for kind in kinds]
    return max(texts.index(text) + 1 for text in texts)


def _width(config: PretrainedConfig, *, head_dim: int | None) -> Values:
    """Return the changes that leave few heads, of at most ``head_dim`` (None: of the same size),
    and what is as wide as they are.
    """
    heads = _present(config, HEADS)
    if not heads or not _has(config, "hidden_size"):
        return {}
    count = int(str(config_value(config, heads[0])))
    groups = _present(config, GROUPS)
    shared = int(str(config_value(config, groups[0]))) if groups else count
    kept = max(2, count // shared) if shared < count else 2
    hidden = int(str(config_value(config, "hidden_size")))
    per_head = hidden // count
    new_head = min(per_head, head_dim or per_head)
    if kept >= count and new_head >= per_head:
        return {}
    ratio = kept * new_head / hidden
    changes: Values = {_own_name(config, key): kept for key in heads}
    changes |= {_own_name(config, key): max(1, kept * shared // count) for key in groups}
    for key in _present(config, HEAD_WIDTHS):
        own = int(str(config_value(config, key)))
        changes[_own_name(config, key)] = max(8, own * new_head // per_head)
    for key in _present(config, WIDTHS):
        own = int(str(config_value(config, key)))
        changes[_own_name(config, key)] = max(8, round(own * ratio / 8) * 8)
    changes[_own_name(config, "hidden_size")] = kept * new_head
    return changes


def _folder(run: Run, changes: Mapping[str, object], home: Path) -> Path:
    """Return a folder of transformers like the one that the run begins with: of its architecture
    and tokenizer, smaller, with weights drawn anew.

    Raises:
        ConfigError: if transformers builds no such model.
    """
    import transformers

    from hfscale.models.build import read_config
    from hfscale.tokenizer import save_tokenizer

    source = run.shape.folder
    assert source is not None, "model.pretrained is given"
    config = read_config(source, where="model.pretrained")
    for key, value in changes.items():
        setattr(config, key, value)
    name = (config.architectures or ["AutoModel"])[0]
    kind = getattr(transformers, name, None)
    folder = home / "model"
    try:
        model = kind(config) if kind else transformers.AutoModel.from_config(config)
        model.save_pretrained(folder)
    except Exception as error:  # whatever an architecture does with impossible sizes
        raise ConfigError(str(error), where="model.pretrained") from error
    save_tokenizer(run.shape.data.tokenizer, folder)
    return folder


# ---------------------------------------------------------------------------------------------- run
def _short(config: TrainConfig, *, procs: int) -> Values:
    """Return the values that make a run short, let it save often, keep all and log all."""
    train = config.train
    each = max(1, train.global_batch // (train.micro_batch * procs))
    micro_batch = min(2, train.micro_batch)
    ours: Values = {
        "train.steps": STEPS,
        "train.epochs": "null",
        "train.tokens": "null",
        "train.micro_batch": micro_batch,
        "train.global_batch": micro_batch * procs * min(2, each),
        "train.patience": "null",
        "train.hang_timeout_s": 10,
        "schedule.warmup_steps": min(2, config.schedule.warmup_steps),
        "checkpoint.every_steps": SAVE_EVERY,
        "checkpoint.keep_every_steps": SAVE_EVERY,
        "checkpoint.every_minutes": "null",
        "metrics.every_steps": 1,
        "metrics.writers": json.dumps(
            [name for name in config.metrics.drawn_by if name == "tensorboard"]
        ),
        "metrics.profile": "null",
    }
    return ours | _stages(config)


def _held_out(run: Run, home: Path) -> Values:
    """Return on what the run is validated, and how often: on a few rows, or on a few of the
    examples that the config holds out, which are written to ``home``.
    """
    config = run.config
    if config.data.validation is None:
        return {}
    if not isinstance(config, FinetuneConfig):
        rows = min(EXAMPLES, config.data.validation.rows)
        return {"data.validation.every_steps": STEPS // 2, "data.validation.rows": rows}
    from hfscale.stream.labelled import LabelledData
    from hfscale.tasks.table import task_class

    kind, columns = task_class(config.task.name), config.data.columns
    examples = LabelledData(config.data, kind, about="").examples("validation")
    lines = [
        json.dumps({columns.get(role, role): value for role, value in example.items()})
        for example in islice(examples, EXAMPLES)
    ]
    file = home / HELD_OUT
    file.write_text("\n".join(lines) + "\n")
    return {
        "data.validation": json.dumps(str(file)),
        "data.test": "null",
        "data.validate_every_steps": STEPS // 2,
    }


def _stages(config: TrainConfig) -> Values:
    """Return the stages of a mixture at parts of this run, in their order."""
    if isinstance(config.data, Examples):
        return {}
    assert isinstance(config.data, Data)
    if not config.data.stages:
        return {}
    stages = [stage.model_dump(mode="json") for stage in config.data.stages]
    for number, stage in enumerate(stages, 1):
        stage["at"] = number / (len(stages) + 1)
    return {"data.stages": json.dumps(stages)}
