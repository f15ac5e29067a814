"""The config of a fine-tuning: labelled examples instead of shards, a task instead of an
objective.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Union

from pydantic import Field

from hfscale.config.schema import Named, Optim, Tokenizer, TrainConfig
from hfscale.config.section import AbsolutePath, HeldOut, Positive, Section, Table


class Examples(Section):
    """Labelled examples: files of JSONL, csv, tsv, parquet or WebDataset, folders or globs of them,
    or ``NAME:SPLIT`` of the hub.
    """

    train: Table
    validation: Union[HeldOut, Table, None] = (
        None  # or a fraction of the training examples, chosen by a hash of what they say
    )
    test: Union[HeldOut, Table, None] = None
    subset: str | None = None  # of the hub: the configuration
    # role of the task -> column; a role has the column of its own name, "id" the number of the row
    columns: dict[str, str] = {}
    max_length: Annotated[int, Field(gt=1)] = 256  # tokens of a feature, special ones included
    too_long: Literal["truncate", "refuse"] = "truncate"
    on_error: Literal["stop", "skip"] = (
        "stop"  # skip: examples that cannot be used are counted, shown and left out
    )
    length_grouping: bool = True  # batches of about equal length
    validate_every_steps: Positive | None = None  # without it once an epoch
    cache: AbsolutePath | None = (
        None  # of preprocessed examples; hfscale in $XDG_CACHE_HOME or ~/.cache
    )

    @property
    def seq_len(self) -> int:
        """The longest row, as ``Data`` calls it."""
        return self.max_length


class FinetuneOptim(Optim):
    """As weights that know something are trained (Devlin et al. 2019, BERT, appendix A.3)."""

    usual: ClassVar[dict[str, dict[str, object]]] = {
        **Optim.usual,
        "adamw": {"betas": (0.9, 0.999), "eps": 1e-8},
        "muon": {"momentum": 0.95, "betas": (0.9, 0.999), "eps": 1e-8},
    }

    lr: Annotated[float, Field(gt=0)] = 5e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01


class FinetuneConfig(TrainConfig):
    """A whole run of fine-tuning; without ``tokenizer`` the pretrained model's own."""

    marker: ClassVar[str] = "task"
    verb: ClassVar[str] = "finetune"
    tokenizer: Tokenizer | None = None
    data: Examples
    task: Named
    optim: FinetuneOptim = FinetuneOptim()
