"""What every pretraining objective offers the loop, and the table of objectives.

An objective turns rows of the stream into a ``Batch``, and a batch into *sums* per row and term.
The step divides by the global count, so how a batch is cut into micro-batches and ranks does not
change the gradient:

    gradient of  sum over terms  weight * (sum over all rows of all ranks) / (global count)

Each backward gets ``weight * its sum * data.size / global count``: the engine averages gradients
over the ranks of ``data``. A term of weight 0 is only reported (an accuracy, say). Shape legend: B
rows, T tokens, L = ``seq_len``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor

from hfscale.config.schema import Named, Section
from hfscale.dist.agree import sum_over_ranks
from hfscale.dist.world import Place
from hfscale.errors import ConfigError, nearest
from hfscale.models.call import call, probe_row
from hfscale.models.kinds import CAUSAL
from hfscale.models.router import balancing
from hfscale.objectives.cross_entropy import token_losses
from hfscale.objectives.draws import random_state
from hfscale.objectives.isolation import keep_apart
from hfscale.objectives.probes import check_live
from hfscale.registry import load_plugin

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hfscale.stream.rows import Rows

OBJECTIVES: dict[str, str] = {
    "clm": "hfscale.objectives.clm:CausalLM",
    "mlm": "hfscale.objectives.mlm:MaskedLM",
    "seq2seq": "hfscale.objectives.seq2seq:Seq2Seq",
    "contrastive": "hfscale.objectives.contrastive:Contrastive",
}

# the engine, or a bare model: called with keywords, returns an output with ``.logits``
Model = Callable[..., Any]
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
    facts: Mapping[str, Any] = field(default_factory=dict)


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

        def move(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            inputs={name: move(t) for name, t in self.inputs.items()},
            labels_BT=move(self.labels_BT),
            input_ids=move(self.input_ids),
            document_ids_BT=move(self.document_ids_BT),
        )


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
        self._sums: dict[str, Tensor] = {}
        self._balancing = balancing(setting.model_config, self.auto_model)

    def weights(self) -> dict[str, float]:
        """Return ``{term: its weight in the loss}``; a term of weight 0 is reported only.

        A mixture of experts has the term ``router`` beside: in training, never in a held-out loss.
        """
        router = {ROUTER: self._balancing.coefficient} if self._balancing else {}
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
        return {self.term: self.row_losses(self.logits(model, batch), batch)}

    def row_losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return ``sums_B`` of the one term, 0 for fillers; here in nats of the labels' tokens."""
        return token_losses(logits, batch.labels_BT).sum(1)

    def logits(self, model: Model, batch: Batch) -> Tensor:
        """Return ``logits_BTV`` of the live model, documents kept apart where the batch names
        them.
        """
        if batch.document_ids_BT is None:
            return call(model, **batch.inputs).logits
        assert self.setting.model_config is not None, "documents are kept apart in a model"
        return keep_apart(
            model,
            batch.inputs,
            batch.document_ids_BT,
            config=self.setting.model_config,
            causal=self.causal,
        )

    def probe_inputs(self, config: Any) -> dict[str, Tensor] | None:
        """Return fixed inputs of a model with ``config``, by keyword, on the CPU: an export must
        answer them as the engine did.

        By default one row of text; for a model that takes something else, one example of that.
        None: nothing is compared.
        """
        return probe_row(config)

    def logits_of(self, model: Model, *, device: torch.device | str) -> Callable[..., Tensor]:
        """Return the function (``ids_BT``, ``document_ids_BT`` if they are kept apart) ->
        ``logits_BTV`` of the live model, for probes.
        """

        def logits(ids_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
            batch = Batch({"input_ids": ids_BT}, ids_BT, ids_BT, {}, ids_BT, ids_BT, documents_BT)
            return self.logits(model, batch.to(device))

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

    def counts(self, batches: Iterable[Batch]) -> dict[str, int]:
        """Return ``{term: n}``, the scored items of these micro-batches, and ``{term/source: n}``
        where there are several sources.

        Sum over ranks gives the global counts.
        """
        totals = dict.fromkeys(self.weights(), 0)
        for batch in batches:
            counts = dict(batch.counts)
            if self._balancing:
                counts[ROUTER] = self._routed(batch).sum(1)
            for term, count_B in counts.items():
                apart = self._by_source(count_B, batch).tolist()
                totals[term] += sum(apart)
                if self.setting.sources > 1:
                    totals |= {
                        f"{term}/{s}": totals.get(f"{term}/{s}", 0) + n for s, n in enumerate(apart)
                    }
        return totals

    def losses(
        self,
        model: Model,
        batches: Iterable[Batch],
        global_counts: Mapping[str, int],
    ) -> Iterator[Tensor]:
        """Yield one scalar for each backward of the step, ``weight * sum * data.size / global
        count``; fp32.

        By default one micro-batch after the other. What was measured is there for ``take_sums`` at
        the end of the step.
        """
        self._sums = {}
        balanced = self._balancing is not None and torch.is_grad_enabled()
        for batch, sums in (
            self._balanced(model, list(batches), global_counts[ROUTER])
            if balanced
            else ((batch, self.loss(model, batch)) for batch in batches)
        ):
            self.record(sums, batch)
            scales = {
                term: weight * self.setting.data.size / max(1, global_counts[term])
                for term, weight in self.weights().items()
                if weight and term in sums
            }
            yield torch.stack([scale * sums[term].sum() for term, scale in scales.items()]).sum()

    def _balanced(
        self, model: Model, batches: list[Batch], tokens: int
    ) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Yield each micro-batch with its sums, the routers' among them; ``tokens`` are those of
        the global step.

        How often each expert is chosen in the whole step must be known before the first backward. A
        step of one micro-batch a rank knows it after its forward; one of several goes through them
        once before, with the same random numbers.
        """
        states, chosen_E = [], torch.zeros(())
        if len(batches) > 1:
            with torch.no_grad():
                for batch in batches:
                    states.append(random_state())
                    chosen_E = chosen_E + self._heard(model, batch)[1]
            chosen_E = sum_over_ranks(chosen_E)
        for number, batch in enumerate(batches):
            if states:
                random_state(states[number])
            sums, own_E, probability_BE = self._heard(model, batch)
            if not states:
                chosen_E = sum_over_ranks(own_E)
            frequency_E = (chosen_E / max(1, tokens)).to(probability_BE)
            sums[ROUTER] = len(frequency_E) * (probability_BE @ frequency_E)
            yield batch, sums

    def _heard(self, model: Model, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return ``loss`` of a micro-batch, and of its routers ``chosen_E`` (on the CPU) and
        ``probability_BE``.
        """
        assert self._balancing is not None, "there are routers"
        with self._balancing.listening(model) as logits:
            sums = self.loss(model, batch)
        weight_BT = self._routed(batch)
        chosen_E, probability_BE = self._balancing.parts(model, logits, weight_BT)
        return sums, chosen_E.cpu().double(), probability_BE

    def _routed(self, batch: Batch) -> Tensor:
        """Return ``weight_BT`` (0 or 1) of the tokens that count for the routers: no padding, and
        no row that asks nothing.
        """
        ids_BT, mask_BT = batch.inputs["input_ids"], batch.inputs.get("attention_mask")
        weight_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        asked_B = batch.counts[self.term] > 0
        return weight_BT * asked_B.to(weight_BT.device)[:, None]

    def record(self, sums: Mapping[str, Tensor], batch: Batch) -> None:
        """Add the ``{term: sums_B}`` of ``batch`` to what ``take_sums`` returns; without waiting
        for the device.
        """
        for term, sums_B in sums.items():
            total = self._by_source(sums_B.detach().double(), batch)
            self._sums[term] = self._sums[term] + total if term in self._sums else total

    def take_sums(self) -> dict[str, Tensor]:
        """Return ``{term: sum of each source}`` (fp64) of this rank's part of the step just made,
        and forget it.
        """
        sums, self._sums = self._sums, {}
        return sums

    def _by_source(self, values_B: Tensor, batch: Batch) -> Tensor:
        """Return the sum of the values of each source, in their type."""
        if self.setting.sources == 1:
            return values_B.sum()[None]
        source_B = batch.source_B.to(values_B.device, torch.int64, non_blocking=True)
        return values_B.new_zeros(self.setting.sources).index_add(0, source_B, values_B)


def load_objective(named: Named, setting: Setting) -> Objective:
    """Return the objective that a config names, with its options checked.

    Raises:
        ConfigError: for an unknown objective or option, or a value out of range.
    """
    objective: type[Objective] = load_plugin("objective", OBJECTIVES, named.name)
    return objective(check_options(objective.Options, named.options), setting)


def check_options(
    schema: type[Section], options: Mapping[str, Any], *, where: str = "objective.options"
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
            known: Any = schema
            for part in problem["loc"][:-1]:
                known = known.model_fields[part].annotation
            lines.append(
                f"{name}: unknown option; {nearest(str(problem['loc'][-1]), known.model_fields)}"
                if unknown
                else f"{name}: {problem['msg']}"
            )
        raise ConfigError("; ".join(lines), where=where, value=dict(options)) from error
