"""The shape of every configuration: one frozen pydantic model a section, nothing but defaults and
ranges.

Rules that look at two sections at once live in ``rules.py``; reading files and overrides in
``load.py``. Sizes are in sequences where a name ends in ``_batch``, in tokens where it ends in
``_tokens`` or ``seq_len``. Paths are relative to the current directory, and absolute once
validated: a job may start somewhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import Field, model_validator

from hfscale.config.section import (
    AbsolutePath,
    Decay,
    FileName,
    Fraction,
    LocalPath,
    PathOrHubName,
    PathOrUrl,
    Positive,
    Section,
    Seed,
)
from hfscale.metrics.better import lower_is_better


# -------------------------------------------------------------------------------------------- a run
class Run(Section):
    """Where a run lives and what makes it repeatable. The run directory is ``root/name``."""

    name: FileName
    root: LocalPath = Path("runs")
    seed: Seed = 17


class Tokenizer(Section):
    """A transformers fast tokenizer: a folder, or a name on the hub."""

    path: PathOrHubName


class Source(Section):
    """One corpus of token shards or of indexed raw text: a ``manifest.json`` or its folder, here or
    at a URL; or ``pipe:COMMAND {}``.
    """

    name: str = "text"
    shards: PathOrUrl
    weight: Annotated[float, Field(ge=0)] = (
        1.0  # its share of the rows, after division by the sum of all
    )
    max_epochs: Annotated[float, Field(gt=0)] | None = None  # then its share goes to the others


class Stage(Section):
    """From here on, the sources that are named have these weights; the others keep theirs."""

    # steps done when it begins, or a fraction of the run's
    at: Union[Positive, Annotated[float, Field(gt=0, lt=1)]]
    weights: Annotated[dict[str, Annotated[float, Field(ge=0)]], Field(min_length=1)]


class Validation(Section):
    """Held-out shards, how often they are scored during training, and on how many rows."""

    shards: PathOrUrl
    every_steps: Positive = 200
    rows: Positive = 256


class Cache(Section):
    """Where this machine keeps shards of URLs, and how they are fetched. The limit holds for all
    that share the folder.
    """

    folder: AbsolutePath | None = None  # hfscale in $XDG_CACHE_HOME or ~/.cache
    size_gb: Annotated[float, Field(gt=0)] = 100.0
    retries: Annotated[int, Field(ge=0)] = 6  # of a block that failed
    timeout_s: Annotated[float, Field(gt=0)] = 60.0  # of a block


class Data(Section):
    """What is read and how it is cut into rows of ``seq_len`` tokens."""

    seq_len: Annotated[int, Field(gt=1)]
    sources: Annotated[list[Source], Field(min_length=1)]
    stages: list[Stage] = []
    validation: Validation | None = None
    lanes: Union[Literal["auto"], Positive] = "auto"
    block: Positive = (
        1024  # rows of a lane that are shuffled together; and of a mixture that hold its weights
    )
    cross_document: bool = True  # False: a token attends to its own document only
    verify: bool = True  # check each chunk's checksum when it is first read
    on_error: Literal["stop", "skip"] = (
        "stop"  # skip: rows that touch damaged data train nothing, and are counted
    )
    max_skipped: Fraction = 0.001  # of the rows read; more than that stops the run
    prefetch_steps: Positive = 2  # steps that the reader thread prepares ahead, at least
    tokenize_procs: Union[Literal["auto"], Positive] = (
        "auto"  # of each rank, for sources of raw text; auto: its share of the cores
    )
    cache: Cache = Cache()
    # shards of pipe:COMMAND {} run that command; counts on the command line alone
    # (config/permission.py)
    allow_pipe: bool = False

    @property
    def remote(self) -> dict[str, object]:
        """How shards of a URL are fetched, as keywords of ``open_manifest``."""
        return {**self.cache.model_dump(), "allow_pipe": self.allow_pipe}


class Lora(Section):
    """Low-rank adapters beside frozen matrices W: (W + alpha / r B A) x (Hu et al. 2021). What has
    no pretrained weights is trained too.
    """

    r: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Decay = 0.0  # of what goes into A
    targets: Union[Literal["all-linear"], list[str]] = (
        "all-linear"  # ends of names of linear modules; all: those of the base model
    )


class Model(Section):
    """A transformers architecture by name with its config, or pretrained weights to start from."""

    architecture: str | None = None
    config: dict[str, object] = {}
    pretrained: PathOrHubName | None = None
    # auto: sdpa where the architecture has it, else eager
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False  # counts on the command line alone, as data.allow_pipe
    freeze: list[
        re.Pattern[str]
    ] = []  # parameters in whose names one of these is found keep their first values
    lora: Lora | None = None


class Named(Section):
    """A plug-in by name, with the options that the plug-in itself declares."""

    name: str
    options: dict[str, object] = {}


class Optim(Section):
    """AdamW (Loshchilov & Hutter 2019), Lion (Chen et al. 2023), SGD with momentum, or Muon (Jordan
    et al. 2024; matrices of layers, the rest under AdamW). Norms, biases, states and other vectors
    are not decayed.

    What an optimizer does not know is null.
    """

    usual: ClassVar[dict[str, dict[str, object]]] = {
        "adamw": {"betas": (0.9, 0.95), "eps": 1e-8},
        "lion": {"betas": (0.9, 0.99)},
        "sgd": {"momentum": 0.9},
        "muon": {"momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-8},
    }

    name: Literal["adamw", "lion", "sgd", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 3e-4
    betas: tuple[Decay, Decay] | None = None  # AdamW (0.9, 0.95), Lion (0.9, 0.99)
    eps: Annotated[float, Field(gt=0)] | None = None  # AdamW 1e-8
    momentum: Decay | None = None  # SGD 0.9, Muon 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(ge=0)] = 1.0  # of the global gradient; 0 = off
    layer_decay: Annotated[float, Field(gt=0, le=1)] = (
        1.0  # a layer's learning rate is this share of the one's above it
    )
    reset: bool = False  # drop what a checkpoint of another optimizer keeps beside the weights

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: object) -> object:
        """Give the optimizer what it usually has, where nothing is said."""
        if not isinstance(values, Mapping):
            return values
        usual = cls.usual.get(str(values.get("name", "adamw")), {})
        missing = {key: value for key, value in usual.items() if values.get(key) is None}
        return {**values, **missing}

    @property
    def unknown(self) -> list[str]:
        """The options that were given, and that this optimizer does not know."""
        options = {key for usual in self.usual.values() for key in usual}
        others = sorted(options - self.usual[self.name].keys())
        return [key for key in others if getattr(self, key) is not None]


class Schedule(Section):
    """The learning rate as a pure function of the step: a warmup, then the named shape."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_fraction: Fraction = 0.2  # wsd: the last part of the run, in which it decays
    min_ratio: Fraction = 0.1  # of the peak, where the decay ends


class Train(Section):
    """How long and how wide. Exactly one of ``steps``, ``epochs``, ``tokens``; accumulation is
    derived.
    """

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = None
    tokens: Positive | None = None
    global_batch: Positive
    micro_batch: Positive
    hang_timeout_s: Annotated[float, Field(gt=0)] | None = (
        600.0  # without progress, after which stacks are written and the run ends
    )
    patience: Positive | None = (
        None  # the run is done after so many validations without a new best of checkpoint.keep_best
    )


class Engine(Section):
    """DeepSpeed's side of a run. ``extra`` is merged into its config last, and may not repeat a
    derived key.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    offload: Literal["none", "optimizer", "parameters"] = (
        "none"  # "parameters" (stage 3) includes the optimizer
    )
    activation_checkpointing: bool = False
    compile: bool = False
    # how losses of tokens are made. plain: from all logits of a micro-batch. chunked: from those of
    # some tokens at a time. auto: chunked where all are 2^28 or more, and that saves memory
    head: Literal["auto", "plain", "chunked"] = "auto"
    prove: bool = True  # at each start, the gradient is held against plain autograd's
    extra: dict[str, object] = {}


class Best(Section):
    """A figure of a validation, as it is named in ``metrics.jsonl``, and which way is better."""

    metric: Annotated[str, Field(pattern="^validation_")] = "validation_loss"
    mode: Literal["min", "max"] = Field(  # without it, as metrics/better.py says
        default_factory=lambda given: (
            "min" if lower_is_better(given.get("metric", "loss")) else "max"
        )
    )


class Checkpoint(Section):
    """When a run is saved and what is kept. The newest verified checkpoint is never removed, nor
    one that `--pin` names.
    """

    every_steps: Positive | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    keep_last: Positive = 2
    keep_every_steps: Positive | None = None  # checkpoints of these steps are permanent
    keep_best: Best | None = (
        None  # a validation with the best value yet is saved at once, and kept until a better one
    )
    async_: Annotated[bool, Field(alias="async")] = True


class Profile(Section):
    """Steps of a run to look at with a profiler: hfscale/training/observers/profile.py."""

    at_step: Annotated[int, Field(ge=2)]  # the first step is none to measure
    steps: Annotated[int, Field(ge=1, le=100)] = 3  # a trace grows by megabytes a step
    every_rank: bool = False  # not rank 0 alone


class Samples(Section):
    """Texts that the model writes while it is trained, to be read: continuations (clm), filled
    masks (mlm), denoised spans (seq2seq), answers of a task that generates.
    """

    every_validations: Positive = 1
    # clm: texts to go on with; none: held-out rows, as the others have them
    prompts: list[Annotated[str, Field(min_length=1)]] = []
    new_tokens: Positive = 48
    temperature: Annotated[float, Field(ge=0)] = 0.7  # 0: always the likeliest token


class Metrics(Section):
    """What is written while training."""

    every_steps: Positive = 10
    # what draws the curves, beside metrics.jsonl
    writers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    tensorboard: bool = True  # false: not that one (the older key)
    profile: Profile | None = None  # of a run that is under way: `hfscale profile RUN`
    samples: Samples | None = None

    @property
    def drawn_by(self) -> list[str]:
        """The writers that are asked for, each once."""
        asked = dict.fromkeys(self.writers)
        return [name for name in asked if self.tensorboard or name != "tensorboard"]


class Health(Section):
    """What is done about a step whose loss or gradient is out of the ordinary. A gradient that is
    not finite stops a run that only warns.
    """

    # skip: the update is dropped. rewind: back to the checkpoint before, without those rows
    policy: Literal["warn", "skip", "rewind", "stop"] = "warn"
    budget: Annotated[int, Field(ge=0)] = 3  # updates that are skipped, or rewinds;
    budget_steps: Positive = 1000  # in so many steps: one more stops the run
    window: Annotated[int, Field(ge=8, lt=2**16)] = 128  # steps that say what is ordinary
    threshold: Annotated[float, Field(gt=0)] = 8.0  # robust deviations above it
    replicas_every_steps: Positive | None = 500  # compare the weights of the ranks so often


class Cluster(Section):
    """What a submitter asks Slurm for. Read by submitters only; inside an allocation the allocation
    wins.
    """

    nodes: Positive = 1
    min_nodes: Positive | None = None  # go on with as few, where no more are left
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    partition: str | None = None
    account: str | None = None
    # as sbatch takes it: 90 (minutes), 24:00:00, 2-12
    time: (
        Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d+){0,2}$", coerce_numbers_to_str=True)] | None
    ) = None
    signal_s: Positive = (
        300  # how long before the time limit the ranks are told to save: longer than a save takes
    )
    max_restarts: Annotated[int, Field(ge=0)] = (
        10  # of one job in a row that come no further than the one before
    )
    allow_local_disk: bool = False  # a run directory on a disk that only this machine sees
    scripts: str | None = None  # the folder that holds your own slurm/: `hfscale configs copy`
    sbatch: dict[
        str, object
    ] = {}  # any other option by its long name; true for one without a value
    submitit: dict[str, object] = {}


class TrainConfig(Section):
    """What pretraining and fine-tuning have in common. Which one it is, ``objective`` or ``task``
    says.
    """

    run: Run
    tokenizer: Any
    data: Any
    model: Model
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    train: Train
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    health: Health = Health()
    cluster: Cluster = Cluster()

    verb: ClassVar[str] = "pretrain"  # the command that starts such a run and goes on with it

    @property
    def run_dir(self) -> Path:
        return self.run.root / self.run.name


class RunConfig(TrainConfig):
    """A whole run of pretraining."""

    marker: ClassVar[str] = "objective"
    tokenizer: Tokenizer
    data: Data
    objective: Named
