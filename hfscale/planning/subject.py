"""What a plan is of: the model that a config describes, on the meta device, and what a step of it
holds and computes, traced when it is asked for.

Data and tokenizer need not be there. What is then taken for them is said (``assumed``).
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from hfscale.config.finetune import FinetuneConfig
from hfscale.config.rules import Length
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.dist.world import Place
from hfscale.engine.ds_config import deepspeed_config, running_stage
from hfscale.engine.optimizers import kept_a_weight
from hfscale.errors import ConfigError, UserError
from hfscale.log import logger
from hfscale.models.build import accepted, check_head, check_model_config, first_line
from hfscale.models.call import call, row_inputs
from hfscale.models.flops import flops_per_token
from hfscale.models.head import UnknownHead, head_of, listen
from hfscale.models.trained import choose_trained
from hfscale.objectives.base import OBJECTIVES, Batch, Objective, Setting, load_objective
from hfscale.objectives.chunked_head import ChunkedHead, chunk_tokens, wants_chunks
from hfscale.objectives.cross_entropy import token_losses
from hfscale.planning.layers import Deep, trace_deep
from hfscale.planning.memory import DEFAULTS, Setup
from hfscale.planning.parameters import Weights, weights_of
from hfscale.planning.tracing import OtherDevice, Rows, Step, Trace, checkpoint, quiet
from hfscale.registry import load_plugin
from hfscale.run.origin import Needs, model_needs, pretrained_folder, skeleton, tokenizer_folder
from hfscale.run.run import Run
from hfscale.stream.rows import Rows as StreamRows
from hfscale.tasks.table import task_class
from hfscale.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

META = torch.device("meta")
OPTIMIZERS = {"adamw": "AdamW", "lion": "Lion", "sgd": "SGD", "muon": "Muon"}
# of what a layer keeps, where a model cannot be traced: bytes a token and unit of width, without
# attention's matrix (Korthikanti et al. 2022, sec. 4.1, at 16 bit)
KEPT_A_UNIT = 34.0


class Subject:
    """The model of ``config``, and what its steps hold on a device (``on_cpu``, or a GPU).

    Raises:
        UserError: if the model cannot be built.
    """

    def __init__(self, config: TrainConfig, *, on_cpu: bool) -> None:
        self.config, self.on_cpu = config, on_cpu
        self.assumed: list[str] = []
        self._steps: dict[tuple[int, bool, bool], Deep] = {}

    # ---------------------------------------------------------------------------------------- parts
    @cached_property
    def folder(self) -> Path | None:
        """Where the model's config comes from, if it is pretrained."""
        return pretrained_folder(self.config, fresh=True)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer; None: it is not there."""
        try:
            return load_tokenizer(tokenizer_folder(self.config, self.folder))
        except UserError as error:
            self._assume(f"no tokenizer ({error.what}): the vocabulary is the model's")
            return None

    @cached_property
    def auto_model(self) -> str:
        """The class of transformers that the objective or task asks for."""
        return self._kind.auto_model

    @cached_property
    def _kind(self) -> type[Objective]:
        if isinstance(self.config, FinetuneConfig):
            return task_class(self.config.task.name)
        assert isinstance(self.config, RunConfig)
        kind: type[Objective] = load_plugin("objective", OBJECTIVES, self.config.objective.name)
        return kind

    @cached_property
    def model_config(self) -> PretrainedConfig:
        """The config of the model."""
        if self.tokenizer is not None:
            needs = model_needs(self.config, self.tokenizer, self.folder)
        else:
            needs = self._needs_without_tokenizer()
        config = check_model_config(**needs)
        check_head(config, self.auto_model)
        return config

    def _needs_without_tokenizer(self) -> Needs:
        """Return what the run asks of its model, with the vocabulary that the model's config, or
        its architecture, has.
        """
        model, folder = self.config.model, self.folder
        start = {} if folder is None else {"pretrained": str(folder), "architecture": None}
        model = model.model_copy(update=start)
        given = model.config.get("vocab_size")
        size = given if isinstance(given, int) else 0
        if not size and folder is None:
            from transformers import CONFIG_MAPPING

            name = model.architecture or ""
            default = CONFIG_MAPPING[name]() if name in CONFIG_MAPPING else None
            size = int(getattr(default, "vocab_size", 0) or 0)
        return {
            "model": model,
            "vocab_size": size,
            "seq_len": self.config.data.seq_len,
            "overrides": {},
        }

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on the meta device, in training mode."""
        make = partial(skeleton, self.config, self.model_config, self.auto_model)
        model: PreTrainedModel = accepted(make, self.config.model)
        choose_trained(model, self.config.model)
        model.train()
        return model

    @cached_property
    def weights(self) -> Weights:
        """How many weights there are, by part."""
        below = self.setup(1, a_node=1).size("stage3_param_persistence_threshold")
        return weights_of(self.model, whole_below=below)

    @cached_property
    def flops_per_token(self) -> float:
        """What training on one token costs."""
        return flops_per_token(self.model, seq_len=self.config.data.seq_len)

    @cached_property
    def objective(self) -> Objective | None:
        """The objective; None: a task, or one that needs the tokenizer that is missing."""
        config = self.config
        if not isinstance(config, RunConfig):
            return None
        setting = Setting(
            seq_len=config.data.seq_len,
            micro_batch=config.train.micro_batch,
            global_batch=config.train.global_batch,
            data=Place(),
            cross_document=config.data.cross_document,
            tokenizer=self.tokenizer,
            model_config=self.model_config,
        )
        if self.tokenizer is None and config.objective.name != "clm":
            return None
        return load_objective(config.objective, setting)

    @cached_property
    def length(self) -> Length | None:
        """How long the run is; None: its data says, and is not there."""
        run = Run(self.config, fresh=True)
        try:
            rows = run.sources.rows if run.sources and not run.sources.unknown() else 0
        except UserError as error:
            logger.debug(f"no data: {error.what}")
            rows = 0
        if (length := run.length(rows)) is None:
            self._assume("the data is not there: the length of the run is not known")
        return length

    def _assume(self, line: str) -> None:
        if line not in self.assumed:
            self.assumed.append(line)

    @cached_property
    def _kept(self) -> float:
        """Bytes that the optimizer keeps beside a trained weight, on average."""
        if self.config.optim.name == "muon":
            self._assume("muon's work on whole matrices takes memory and time that are not planned")
        return kept_a_weight(self.model, self.config.optim)

    # ---------------------------------------------------------------------------------------- setup
    def setup(self, ranks: int, *, a_node: int, micro_batch: int | None = None) -> Setup:
        """Return how the config trains on ``ranks`` ranks, with ``micro_batch`` in place of its own
        where that is given.
        """
        config, engine = self.config, self.config.engine
        device_type = "cpu" if self.on_cpu else "cuda"
        rows = micro_batch or config.train.micro_batch
        settings = deepspeed_config(config, device_type=device_type)["zero_optimization"]
        raw = getattr(config.data, "tokenize_procs", 0)
        return Setup(
            stage=running_stage(engine),
            precision=engine.precision,
            offload=engine.offload,
            checkpointing=engine.activation_checkpointing,
            micro_batch=rows,
            accumulation=max(1, -(-config.train.global_batch // (rows * ranks))),
            ranks=ranks,
            a_node=min(ranks, a_node),
            on_cpu=self.on_cpu,
            async_save=config.checkpoint.async_,
            optimizer=OPTIMIZERS[config.optim.name],
            kept=self._kept,
            tokenizing=raw if isinstance(raw, int) else 0,
            zero={key: float(settings[key]) for key in DEFAULTS if key in settings},
        )

    # ---------------------------------------------------------------------------------------- steps
    def step(self, rows: int, *, checkpointing: bool) -> Step:
        """Return what a micro-batch of ``rows`` rows holds; many follow from few and twice as
        many.
        """
        head = self._head(rows)
        few = 1
        if head is not None:  # so many that they fill a chunk of it
            chunk = chunk_tokens(head_of(self.model).weight)
            few = -(-chunk // self.config.data.seq_len)
        if rows <= 2 * few:
            return self._traced(rows, checkpointing, head)
        one, two = (self._traced(some, checkpointing, head) for some in (few, 2 * few))
        return Rows(one, two, rows, few)

    def _head(self, rows: int) -> ChunkedHead | None:
        """Return what makes the losses of ``rows`` rows without their logits, where the run will
        choose that.
        """
        tokens = rows * self.config.data.seq_len
        try:
            linear = head_of(self.model)
        except UnknownHead:
            return None
        wanted = wants_chunks(self.config.engine, tokens=tokens, head=linear)
        return self._chunked_head if wanted and self._kind.token_loss else None

    @cached_property
    def _chunked_head(self) -> ChunkedHead | None:
        """What stands in for the logits; None: the model keeps them whole."""
        ids_BT = torch.zeros(1, min(2, self.config.data.seq_len), dtype=torch.int64, device=META)
        inputs = row_inputs(ids_BT, self.model_config)
        try:
            with OtherDevice(on_cpu=self.on_cpu):
                after, *_ = listen(self.model, lambda: call(self.model, **inputs).logits)
        except UnknownHead as error:
            self._assume(f"the logits are kept whole: {error}")
            return None
        return ChunkedHead(after)

    @property
    def checkpoints(self) -> bool:
        """Whether the architecture has activation checkpointing."""
        return bool(getattr(self.model, "supports_gradient_checkpointing", False))

    def _traced(self, rows: int, checkpointing: bool, head: ChunkedHead | None) -> Deep:
        key = (rows, checkpointing, head is not None)
        if key in self._steps:
            return self._steps[key]
        if checkpointing and not self.checkpoints:
            raise ConfigError(
                "this architecture has no activation checkpointing",
                where="engine.activation_checkpointing",
                value=True,
                remedy="engine.activation_checkpointing=false",
            )
        if checkpointing:
            checkpoint(self.model, on_cpu=self.on_cpu)
        try:
            run, inputs = self._micro_batch(rows, head)
            step = trace_deep(self.model, run, inputs=inputs, on_cpu=self.on_cpu)
        except UserError:
            raise
        except Exception as error:  # whatever an architecture does that has no shape alone
            logger.debug(f"not traced: {first_line(error)}")
            self._assume(
                f"{self.model_config.model_type} cannot be traced ({first_line(error):.120}): "
                f"activations by a rule, {KEPT_A_UNIT:.0f} bytes a token and unit of width"
            )
            step = self._by_rule(rows, checkpointing)
        finally:
            if checkpointing:
                with quiet():
                    self.model.gradient_checkpointing_disable()  # type: ignore[operator]
        self._steps[key] = step
        return step

    def _micro_batch(
        self, rows: int, head: ChunkedHead | None
    ) -> tuple[Callable[[nn.Module], Tensor], list[Tensor]]:
        """Return what maps the model to the loss of a micro-batch, and the tensors of that."""
        objective = self.objective
        if objective is None:
            return self._plain(rows, head)
        objective.head = head
        batch = objective.collate(_rows(rows, self.config.data.seq_len)).to(META)

        def run(model: nn.Module) -> Tensor:
            scales = {term: 1.0 for term, weight in objective.weights().items() if weight}
            return torch.stack(
                [
                    _loss(objective, forward.sums, forward.surrogate)
                    for forward in objective.forwards(model, [batch], scales)
                ]
            ).sum()

        return run, _tensors(batch)

    def _plain(
        self, rows: int, head: ChunkedHead | None
    ) -> tuple[Callable[[nn.Module], Tensor], list[Tensor]]:
        """Return the same for a task: rows as long as they may be, a loss of every logit."""
        ids_BT = torch.zeros(rows, self.config.data.seq_len, dtype=torch.int64, device=META)
        inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        if self.model_config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids_BT
        if isinstance(self.config, FinetuneConfig):
            self._assume("examples are taken to be as long as data.max_length lets them be")

        def run(model: nn.Module) -> Tensor:
            if head is not None:
                scores = head.scores(model, ids_BT, lambda: call(model, **inputs).logits)
                return scores.losses_BT.sum()
            out = call(model, **inputs)
            logits: Tensor | None = getattr(out, "logits", None)
            if logits is None:
                logits = getattr(out, "start_logits", out[0])
            assert logits is not None, "a model gives something"
            if logits.dim() == 3 and logits.shape[-1] == self.model_config.vocab_size:
                return token_losses(logits, ids_BT).sum()
            return logits.float().sum()

        return run, [ids_BT, inputs["attention_mask"]]

    def _by_rule(self, rows: int, checkpointing: bool) -> Deep:
        config = self.model_config
        text = config.get_text_config()
        tokens = rows * self.config.data.seq_len
        width, layers = int(text.hidden_size), int(text.num_hidden_layers)
        vocabulary = int(getattr(text, "vocab_size", 0))
        size = 4 if self.config.engine.precision == "fp32" else 2
        layer = KEPT_A_UNIT / 2 * size * tokens * width
        logits = 2.0 * size * tokens * vocabulary
        kept = layers * (size * tokens * width if checkpointing else layer)
        work = [(self.flops_per_token * tokens, 6.0 * (kept + logits))]
        whole = Trace(kept + logits / 2, kept + logits + layer, work=work)
        return Deep(whole, whole, 0.0, 0, (0, 0))


def _loss(objective: Objective, sums: dict[str, Tensor], surrogate: Tensor | None) -> Tensor:
    if surrogate is not None:
        return surrogate
    trained = [term for term, weight in objective.weights().items() if weight and term in sums]
    return torch.stack([sums[term].sum() for term in trained]).sum()


def _rows(rows: int, seq_len: int) -> StreamRows:
    """Return rows of one document each, of the first id alone."""
    return StreamRows(
        ids_BL=torch.zeros(rows, seq_len + 1, dtype=torch.int64),
        boundaries=torch.zeros(0, dtype=torch.int64),
        valid_B=torch.ones(rows, dtype=torch.bool),
        source_B=torch.zeros(rows, dtype=torch.int16),
        position=torch.arange(rows),
    )


def _tensors(batch: Batch) -> list[Tensor]:
    documents = batch.document_ids_BT
    more = [] if documents is None else [documents]
    return [*batch.inputs.values(), batch.labels_BT, batch.input_ids, *more]
