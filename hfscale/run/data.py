"""What a run trains on, and what follows from it: tokenizer, objective or task, stream, validation.
Of two kinds, with one protocol: tokens (``run/tokens.py``) and labelled examples
(``run/examples.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from transformers import PretrainedConfig, PreTrainedTokenizerFast

from hfscale.checkpoint.state import CheckpointState
from hfscale.objectives.base import Objective
from hfscale.stream.examples import Examples, ExampleStream
from hfscale.stream.loader import Stream
from hfscale.stream.rows import Rows
from hfscale.training.evaluator import Evaluator, TaskEvaluator


@dataclass(frozen=True)
class OpenData:
    """The data of a run that trains, from where its checkpoint left it."""

    stream: Stream | ExampleStream
    names: tuple[str, ...]  # of the sources, as the rows number them
    evaluator: Evaluator | TaskEvaluator | None  # None: the config asks for no validation
    validate_every: int  # steps; 0: never
    about: Mapping[str, object]  # what every checkpoint says of the data, by its keys there
    # held out, and alike on all ranks: what samples of text are of; None: nobody asked
    shown: Rows | Examples | None = None


class RunData(Protocol):
    """The data of a run before there is a model. Opened, it trains one."""

    tokenizer: PreTrainedTokenizerFast
    needs: Mapping[str, object]  # values that the model's config must have

    @property
    def tokenizer_digest(self) -> str:
        """What names the tokenizer."""

    @property
    def rows(self) -> int:
        """Rows of an epoch; 0: not known before raw text is tokenized."""

    def objective(self, model_config: PretrainedConfig | None = None) -> Objective:
        """Return the objective or task; without ``model_config`` it can say what model it wants."""

    def digests(self) -> dict[str, str]:
        """Return what names each part of the data, by key of the config; it must be the same on all
        ranks.
        """

    def open(
        self, objective: Objective, *, saved: CheckpointState | None, pin_memory: bool
    ) -> OpenData:
        """Return the data as ``objective`` takes it, where ``saved`` left it; rank 0 keeps in the
        run directory what says later which data these were. Each rank has its own rows.
        """
