"""What every pretraining objective offers the loop, and the table of objectives.

An objective turns rows of the stream into a ``Batch``, and a batch into *sums* per row and term.
The step divides by the global count (``hfscale/training/accounting.py``), so how a batch is cut
into micro-batches and ranks does not change the gradient. A term of weight 0 is only reported (an
accuracy, say). Shape legend: B rows, T tokens, L = ``seq_len``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from torch import Tensor

from hfscale.config.schema import Named
from hfscale.config.section import Section
from hfscale.dist.world import Place
from hfscale.errors import ConfigError, nearest
from hfscale.models.call import Model, call, probe_row
from hfscale.models.head import hidden_states
from hfscale.models.kinds import CAUSAL
from hfscale.models.router import balancing
from hfscale.objectives.chunked_head import ChunkedHead, Scores
from hfscale.objectives.cross_entropy import IGNORE_INDEX, token_losses
from hfscale.objectives.isolation import keep_apart
from hfscale.objectives.probes import check_live
from hfscale.registry import load_plugin
from hfscale.stream.examples import Facts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hfscale.stream.rows import Rows

OBJECTIVES: dict[str, str] = {
    "clm": "hfscale.objectives.clm:CausalLM",
    "mlm": "hfscale.objectives.mlm:MaskedLM",
    "seq2seq": "hfscale.objectives.seq2seq:Seq2Seq",
    "contrastive": "hfscale.objectives.contrastive:Contrastive",
}

ROUTER = "router"  # the term of a mixture of experts that keeps its experts in balance


@dataclass(frozen=True)
class Setting:
    """What an objective may need to know of the run."""

    seq_len: int
    micro_batch: int = 1
    global_batch: int = 0  # 0: not known
    seed: int = 0  # of masks, spans and crops: they are drawn from (seed, position of the row)
    cross_document: bool = True
    data: Place = field(default_factory=Place)  # among ranks that have rows of their own
    sources: int = 1  # of the stream; where there are several, sums and counts are kept apart
    tokenizer: Any = None  # a transformers fast tokenizer, for objectives that mask, mark or pad
    model_config: PretrainedConfig | None = None  # None: before there is a model
    # of a task: what its training examples say (labels, ...)
    facts: Facts = field(default_factory=Facts)


@dataclass
class Batch:
    """One micro-batch. ``counts`` stays on the CPU, so that counting never waits for a device."""

    inputs: dict[str, Tensor]  # keywords of the model
    labels_BT: Tensor  # int64; IGNORE_INDEX where nothing is asked
    input_ids: Tensor  # int64 (B, T): the rows before any corruption, whose tokens are counted
    counts: dict[str, Tensor]  # term -> int64 (B,): how many items of each row are scored
    source_B: Tensor  # int16: which corpus each row is from
    position_B: Tensor  # int64: the row's place in the run's order
    document_ids_BT: Tensor | None = (
        None  # int32: documents numbered within their row; None = one document
    )
    lengths_B: Tensor | None = None  # int64: of ``input_ids`` without padding; None = all of T

    def rows(self) -> list[Tensor]:
        """Return ``input_ids`` without padding, which depends on how the batch was cut: what
        ``tokens_seen`` counts.
        """
        if self.lengths_B is None:
            return [self.input_ids]
        return [
            ids_T[None, :length]
            for ids_T, length in zip(self.input_ids, self.lengths_B.tolist(), strict=True)
        ]

    def to(self, device: torch.device | str) -> Batch:
        """Return this batch with everything that enters the model or the loss on ``device``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        documents_BT = self.document_ids_BT
        return replace(
            self,
            inputs={name: move(t) for name, t in self.inputs.items()},
            labels_BT=move(self.labels_BT),
            input_ids=move(self.input_ids),
            document_ids_BT=documents_BT if documents_BT is None else move(documents_BT),
        )


@dataclass(frozen=True)
class Forward:
    """What a forward pass of one micro-batch gave."""

    batch: Batch
    sums: dict[str, Tensor]  # term -> sums_B
    # a scalar with the gradient of the step's loss, where that is not the scaled sum of ``sums``
    surrogate: Tensor | None = None


class Objective:
    """Base of all objectives: subclasses give ``Options``, ``auto_model``, ``collate``, and
    ``term`` or ``weights`` and ``loss``.
    """

    Options: ClassVar[type[Section]] = Section  # none
    auto_model: str = CAUSAL.auto_model
    pipeline: ClassVar[str | None] = (
        "text-generation"  # the transformers pipeline that uses such a model; None: generate() does
    )
    frame: tuple[str | None, ...] | None = (
        None  # roles of tokens that an export's tokenizer puts before and after text; None: its own
    )
    causal: ClassVar[bool] = False  # a token sees only what came before it
    token_loss: ClassVar[bool] = True  # the loss is in nats a token, so it has a perplexity
    needs_documents: ClassVar[bool] = False  # of the rows, even where documents may see each other
    # the name of the one term of the loss; those of several give ``weights`` and ``loss``
    term: ClassVar[str]

    def __init__(self, options: Section, setting: Setting) -> None:
        self.options, self.setting = options, setting
        # of a mixture of experts: the term that keeps its routers in balance
        self.balancing = balancing(setting.model_config, self.auto_model)
        # what makes losses without the logits, where the run has chosen it (run/head.py)
        self.head: ChunkedHead | None = None

    def weights(self) -> dict[str, float]:
        """Return ``{term: its weight in the loss}``; a term of weight 0 is reported only.

        A mixture of experts has the term ``router`` beside: in training, never in a held-out loss.
        """
        router = {ROUTER: self.balancing.coefficient} if self.balancing else {}
        return {self.term: 1.0, **router}

    def validated(self) -> set[str]:
        """Return the names of what a validation can give."""
        trained = {term for term, weight in self.weights().items() if weight} - {ROUTER}
        parts = {f"loss_{term}" for term in trained} if len(trained) > 1 else set()
        return {
            "loss",
            *parts,
            *(self.weights().keys() - trained - {ROUTER}),
            *(["perplexity"] if self.token_loss else []),
        }

    def collate(self, rows: Any) -> Batch:  # Rows; a task's are Examples
        """Return the batch of ``rows`` on the CPU. Depends on the rows, their positions and the
        seed alone.
        """
        raise NotImplementedError

    def loss(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Return ``{term: sums_B}``: fp32, one sum a row, with gradient where the term has a
        weight.
        """
        return {self.term: self.scores(model, batch).losses_BT.sum(1)}

    def scores(
        self, model: Model, batch: Batch, *, smoothing: float = 0.0, guesses: bool = False
    ) -> Scores:
        """Return the losses of the labels' tokens, and with ``guesses`` which labels are the
        likeliest ids. The logits of the batch are there together only if nobody chose a chunked
        head.
        """
        labels_BT = batch.labels_BT
        if self.head is not None:
            forward = partial(self.logits, model, batch)
            return self.head.scores(model, labels_BT, forward, smoothing=smoothing, guesses=guesses)
        logits_BTV = self.logits(model, batch)
        right_BT = None
        if guesses:
            right_BT = (logits_BTV.detach().argmax(-1) == labels_BT) & (labels_BT != IGNORE_INDEX)
        return Scores(token_losses(logits_BTV, labels_BT, smoothing=smoothing), right_BT)

    def forwards(
        self, model: Model, batches: Iterable[Batch], scales: Mapping[str, float]
    ) -> Iterator[Forward]:
        """Yield what the model gives for each micro-batch of a step, one after the other: by
        default its ``loss``. An objective that compares rows of several micro-batches overrides it.

        ``scales`` says by what the sum of each term is multiplied in the backward of the step.
        """
        for batch in batches:
            yield Forward(batch, self.loss(model, batch))

    def logits(self, model: Model, batch: Batch) -> Tensor:
        """Return ``logits_BTV`` of the live model, documents kept apart where the batch names
        them.
        """
        if batch.document_ids_BT is None:
            logits: Tensor = call(model, **batch.inputs).logits
            return logits
        assert self.setting.model_config is not None, "documents are kept apart in a model"
        return keep_apart(
            model,
            batch.inputs,
            batch.document_ids_BT,
            config=self.setting.model_config,
            causal=self.causal,
        )

    def probe_inputs(self, config: PretrainedConfig) -> dict[str, Tensor] | None:
        """Return fixed inputs of a model with ``config``, by keyword, on the CPU: an export must
        answer them as the engine did.

        By default one row of text; for a model that takes something else, one example of that.
        None: nothing is compared.
        """
        return probe_row(config)

    def logits_of(self, model: Model, *, device: torch.device | str) -> Callable[..., Tensor]:
        """Return the function (``ids_BT``, ``document_ids_BT`` if they are kept apart) ->
        ``logits_BTV`` of the live model, for probes; where the run does without logits, the hidden
        states that they would be made of.
        """

        def logits(ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
            batch = Batch({"input_ids": ids_BT}, ids_BT, ids_BT, {}, ids_BT, ids_BT, documents_BT)
            forward = partial(self.logits, model, batch.to(device))
            return forward() if self.head is None else hidden_states(model, forward, ids_BT.shape)

        return logits

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens of a micro-batch: probes ask for the same, so that the live kernels
        answer and nothing is compiled again.
        """
        return self.setting.micro_batch, self.setting.seq_len

    def document_ids(self, rows: Rows) -> Tensor | None:
        """Return the ``document_ids_BT`` of the inputs of ``rows`` where documents are to be kept
        apart, else None.
        """
        documents_BL = None if self.setting.cross_document else rows.document_ids_BL
        return None if documents_BL is None else documents_BL[:, :-1]

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """Return what is logged of the terms' means over the step, where that is not the mean
        itself.
        """
        return means

    def check(self, model: Model, *, device: torch.device | str) -> None:
        """Refuse a live model that this objective cannot train. Every rank calls it alike, in eval
        mode, before step 1.

        Here that is a causal model that sees the future (an encoder), one of masks that sees only
        the past (a decoder), or another document where they are to be kept apart.

        Raises:
            ConfigError: with the remedy.
        """
        check_live(self, model, device=device)

    def files(self, config: PretrainedConfig) -> dict[str, str]:
        """Return what else lies in an export of a model of ``config``, for other libraries:
        ``{path: text}``.
        """
        return {}


def load_objective(named: Named, setting: Setting) -> Objective:
    """Return the objective that a config names, with its options checked.

    Raises:
        ConfigError: for an unknown objective or option, or a value out of range.
    """
    objective: type[Objective] = load_plugin("objective", OBJECTIVES, named.name)
    return objective(check_options(objective.Options, named.options), setting)


def check_options(
    schema: type[Section], options: Mapping[str, object], *, where: str = "objective.options"
) -> Section:
    """Return ``options`` as ``schema``, or raise a ConfigError that names every bad one and the
    nearest valid names.
    """
    try:
        return schema(**options)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"]))
            unknown = problem["type"] == "extra_forbidden"
            known: Mapping[str, FieldInfo] = schema.model_fields
            for part in problem["loc"][:-1]:
                known = getattr(known[str(part)].annotation, "model_fields", {})
            lines.append(
                f"{name}: unknown option; {nearest(str(problem['loc'][-1]), known)}"
                if unknown
                else f"{name}: {problem['msg']}"
            )
        raise ConfigError("; ".join(lines), where=where, value=dict(options)) from error
