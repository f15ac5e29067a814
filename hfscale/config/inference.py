"""The config of jobs that train nothing: predictions, a language model on shards, tasks of
lm-evaluation-harness.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Union

from hfscale.config.finetune import Examples
from hfscale.config.schema import Cluster, Data, Named, Tokenizer
from hfscale.config.section import AbsolutePath, LocalPath, PathOrHubName, Positive, Section, Seed


class Inference(Section):
    """How a model that only computes is held: at ZeRO stage 3 a share of its weights on each rank,
    below it all of them.
    """

    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["fp32", "bf16", "fp16", None] = None  # None: as it was trained, or saved
    offload: Literal["none", "parameters"] = (
        "none"  # stage 3: the shares lie in the memory of the host
    )
    extra: dict[
        str, object
    ] = {}  # stage 3: merged last into DeepSpeed's config, as ``Engine.extra``


class Predict(Section):
    """What predicts, and where its predictions go."""

    model: PathOrHubName  # a run, a checkpoint, an export, a transformers folder, a hub name
    name: str = ""  # of the model, as scores show it
    out: LocalPath
    split: Literal["train", "validation", "test"] = "train"  # of the data
    batch: Positive = 32
    answers: bool = (
        False  # the examples have their answers, which predictions will be compared with
    )


class PredictConfig(Section):
    """Predictions of a task for a split of ``data``; a table that stands alone is its ``train``."""

    marker: ClassVar[str] = "predict"
    predict: Predict
    task: Named
    data: Examples
    engine: Inference = Inference()
    cluster: Cluster = Cluster()


class Scored(Section):
    """What is scored, and the folder of its scores."""

    model: PathOrHubName
    out: LocalPath


class Draws(Section):
    """What an objective draws from: which tokens it hides, say."""

    seed: Seed = 17


class Passes(Section):
    """How many rows a rank computes at once."""

    micro_batch: Positive = 8


class ShardsConfig(Section):
    """A language model on held-out shards: what reading and scoring them needs, by the names that a
    run has for it.
    """

    marker: ClassVar[str] = "evaluate"
    evaluate: Scored
    tokenizer: Tokenizer
    objective: Named
    data: Data  # one source: what is scored
    run: Draws = Draws()
    train: Passes = Passes()
    engine: Inference = Inference()
    cluster: Cluster = Cluster()


class Harness(Scored):
    """Tasks of lm-evaluation-harness: its own, or those of a ``folder`` of YAMLs."""

    tasks: list[str]
    folder: Union[AbsolutePath, None] = None
    batch: Positive = 16


class HarnessConfig(Section):
    """Tasks of lm-evaluation-harness on a model."""

    marker: ClassVar[str] = "harness"
    harness: Harness
    engine: Inference = Inference()
    cluster: Cluster = Cluster()
