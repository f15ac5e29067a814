"""Contrastive learning of text embeddings: two views of a text belong together, every other text of
the global batch is a negative.

    loss = - sum over i of log( exp(a_i . p_i / tau) / sum over j of exp(a_i . p_j / tau) )
           / number of texts                                                        (InfoNCE)

a and p are unit vectors, j runs over the texts of all ranks and micro-batches. So the loss of one
text needs all embeddings, and the memory of one backward would grow with the global batch. Gradient
caching breaks that up and gives the same gradient: embed every micro-batch without gradient, take
the loss of all embeddings and its gradient d loss / d embedding, then embed each micro-batch again,
with the random state of its first time, and send that gradient back.

Shape legend: n texts of this rank, N of all ranks; V views of a text (2, or 3 with a hard
negative); T tokens of the longest view; H width. Sources: Oord et al. 2018 (InfoNCE); Gao et al.
2021, GradCache, sec. 3; Gao et al. 2021, SimCSE, sec. 3 (views that differ in dropout alone);
Izacard et al. 2022, Contriever, sec. 3.1 (independent crops of a document); Wang & Isola 2020
(alignment, uniformity).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hfscale.config.section import Section
from hfscale.dist.agree import gather_rows
from hfscale.errors import ConfigError
from hfscale.models.call import call
from hfscale.models.pooling import Pooling, pool
from hfscale.objectives.base import Batch, Forward, Model, Objective, Setting
from hfscale.objectives.cross_entropy import IGNORE_INDEX, token_losses
from hfscale.objectives.draws import random_state, row_generators, special_id
from hfscale.objectives.mlm import MaskedLM, MaskingOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hfscale.stream.rows import Rows

Length = Annotated[float, Field(gt=0, le=1)]


class ContrastiveOptions(Section):
    """How views are made and compared."""

    views: Literal["dropout", "crops"] = (
        "crops"  # the same text twice; or two spans of it, drawn independently
    )
    crop: tuple[Length, Length] = (0.1, 0.5)  # shortest and longest span, as a part of the text
    temperature: Annotated[float, Field(gt=0)] = 0.05
    pooling: Pooling = "mean"
    mlm_weight: Annotated[float, Field(ge=0)] = (
        0.0  # of a masked-language-modelling loss on the first view
    )


class Contrastive(Objective):
    """Unsupervised embeddings, for any architecture of ``AutoModel`` (of ``AutoModelForMaskedLM``
    with ``mlm_weight``).
    """

    Options = ContrastiveOptions
    auto_model = "AutoModel"
    pipeline = "feature-extraction"
    frame: tuple[str | None, ...] | None = ("cls_token", "eos_token")
    token_loss = False
    needs_documents = True
    options: ContrastiveOptions

    def __init__(self, options: Section, setting: Setting) -> None:
        super().__init__(options, setting)
        assert isinstance(options, ContrastiveOptions)
        if setting.global_batch == 1:
            raise ConfigError(
                "a batch of one text has no negatives",
                where="train.global_batch",
                value=1,
                remedy="give at least 2, better 256",
            )
        if options.crop[0] > options.crop[1]:
            raise ConfigError(
                "the shortest crop is longer than the longest",
                where="objective.options.crop",
                value=list(options.crop),
            )
        if options.views == "crops" and setting.seq_len * options.crop[0] < 1:
            raise ConfigError(
                "rows are too short to crop",
                where="data.seq_len",
                value=setting.seq_len,
                remedy=f"at objective.options.crop={list(options.crop)} give at least "
                f"{math.ceil(1 / options.crop[0])}",
            )
        tokenizer = setting.tokenizer
        self._pad_id = special_id(tokenizer, "pad_token", why="and views differ in length")
        self._cls_id = (
            special_id(tokenizer, "cls_token", why="whose state is to be the embedding")
            if options.pooling == "cls"
            else tokenizer.cls_token_id
        )
        self._mlm = None
        if options.mlm_weight:
            self.auto_model = "AutoModelForMaskedLM"
            self._mlm = MaskedLM(MaskingOptions(), setting)

    def weights(self) -> dict[str, float]:
        """Return ``contrastive`` (nats a text), ``mlm`` if there is one, and what is reported
        only.
        """
        mlm = {"mlm": self.options.mlm_weight} if self._mlm else {}
        return {
            "contrastive": 1.0,
            **mlm,
            "retrieval_accuracy": 0.0,
            "alignment": 0.0,
            "uniformity": 0.0,
        }

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means with the logarithm that uniformity is defined by."""
        return (
            means | {"uniformity": float(np.log(means["uniformity"]))}
            if means.get("uniformity", 0) > 0
            else means
        )

    def collate(self, rows: Rows) -> Batch:
        """Return the views (V * n, T), first views first. The text of a row is the longest document
        in it.
        """
        documents_BT = rows.document_ids_BL
        assert documents_BT is not None, "needs_documents"
        views: tuple[list[np.ndarray], list[np.ndarray]] = [], []
        generators = row_generators(self.setting.seed, rows.position)
        for ids_L, documents_L, rng in zip(
            rows.ids_BL.numpy(), documents_BT.numpy(), generators, strict=True
        ):
            text = ids_L[:-1][documents_L[:-1] == np.bincount(documents_L[:-1]).argmax()]
            for view in views:
                view.append(self._view(text, rng))
        texts = [torch.from_numpy(view) for view in (*views[0], *views[1])]
        ids_BT = torch.nn.utils.rnn.pad_sequence(
            texts, batch_first=True, padding_value=self._pad_id
        )
        mask_BT = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(text) for text in texts], batch_first=True
        )
        asked_B = rows.valid_B.long()
        counts = dict.fromkeys(
            ("contrastive", "retrieval_accuracy", "alignment", "uniformity"), asked_B
        )
        labels_BT = torch.empty(len(asked_B), 0, dtype=torch.int64)
        batch = Batch(
            inputs={"input_ids": ids_BT, "attention_mask": mask_BT},
            labels_BT=labels_BT,
            input_ids=rows.ids_BL[:, :-1],
            counts=counts,
            source_B=rows.source_B,
            position_B=rows.position,
        )
        return self._with_masks(batch, rows) if self._mlm else batch

    def _view(self, text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.options.views == "crops":
            shortest, longest = self.options.crop
            length = max(1, round(len(text) * rng.uniform(shortest, longest)))
            start = rng.integers(len(text) - length + 1)
            text = text[start : start + length]
        return (
            text
            if self._cls_id is None
            else np.concatenate([[self._cls_id], text[: self.setting.seq_len - 1]])
        )

    def _with_masks(self, batch: Batch, rows: Rows) -> Batch:
        """Return the batch with a corrupted copy of the first views, and what was hidden as
        labels.
        """
        assert self._mlm is not None
        n = len(rows.valid_B)
        ids_BT = batch.inputs["input_ids"][:n].clone()
        labels_BT = torch.full_like(ids_BT, IGNORE_INDEX)
        # what is drawn must not depend on padding
        lengths_B = batch.inputs["attention_mask"][:n].sum(1) * rows.valid_B
        generators = row_generators(self.setting.seed + 1, rows.position)
        for length, ids_T, labels_T, rng in zip(
            lengths_B.tolist(), ids_BT, labels_BT, generators, strict=True
        ):
            self._mlm.corrupt(ids_T[:length].numpy(), labels_T[:length].numpy(), rng)
        batch.inputs["masked_ids"], batch.labels_BT = ids_BT, labels_BT
        batch.counts["mlm"] = (labels_BT != IGNORE_INDEX).sum(1)
        return batch

    def embed(self, model: Model, batch: Batch) -> Tensor:
        """Return the unit vectors ``z_VnH`` (fp32) of every view."""
        ids_BT, mask_BT = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        if self._mlm is None:
            hidden_BTH = call(model, input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        else:
            hidden_BTH = call(
                model, input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True
            ).hidden_states[-1]
        pooled_BH = F.normalize(pool(hidden_BTH, mask_BT, self.options.pooling), dim=-1)
        return pooled_BH.view(-1, len(batch.position_B), pooled_BH.shape[-1])

    def forwards(
        self, model: Model, batches: Iterable[Batch], scales: Mapping[str, float]
    ) -> Iterator[Forward]:
        """Yield each micro-batch with a surrogate, whose gradient is that of the global loss. In
        evaluation there is none.
        """
        batches = list(batches)
        states, parts = [], []
        keys_Vn = torch.cat([text_keys(batch) for batch in batches], dim=1)
        with torch.no_grad():
            for batch in batches:
                states.append(random_state())
                parts.append(self.embed(model, batch))
        own_VnH = torch.cat(parts, dim=1).requires_grad_()
        valid_n = torch.cat([batch.counts["contrastive"] for batch in batches]).to(own_VnH.device)
        with torch.enable_grad():
            loss, values = self.compare(own_VnH, valid_n, keys_Vn)
            (grad_VnH,) = torch.autograd.grad(loss * scales["contrastive"], own_VnH)
        at = 0
        for batch, state, part in zip(batches, states, parts, strict=True):
            mine = slice(at, at + part.shape[1])
            at = mine.stop
            sums = {term: values_n[mine] for term, values_n in values.items()}
            surrogate = None
            if torch.is_grad_enabled() or self._mlm:
                random_state(state)
                surrogate = (self.embed(model, batch) * grad_VnH[:, mine]).sum()
                if self._mlm:
                    sums["mlm"] = self._mlm_losses(model, batch)
                    surrogate = surrogate + sums["mlm"].sum() * scales["mlm"]
            yield Forward(batch, sums, surrogate)

    def _mlm_losses(self, model: Model, batch: Batch) -> Tensor:
        """Return ``sums_B`` in nats of what was hidden in the first views."""
        out = call(
            model,
            input_ids=batch.inputs["masked_ids"],
            attention_mask=batch.inputs["attention_mask"][: len(batch.position_B)],
        )
        return token_losses(out.logits, batch.labels_BT).sum(1)

    def compare(
        self, own_VnH: Tensor, valid_n: Tensor, keys_Vn: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the InfoNCE sum over the texts of all ranks, with gradient to ``own_VnH``, and
        this rank's ``{term: values_n}``.

        The first view asks, the second answers; further views (hard negatives) are candidates
        beside all answers. No candidate is a text that equals the one that asks or its answer, nor
        the answer of an equal text: ``keys_Vn`` says which are equal; without it none are.
        """
        data = self.setting.data
        # (N, V, H)
        others, first = gather_rows(own_VnH.detach().transpose(0, 1).contiguous(), data)
        valid_N = gather_rows(valid_n, data)[0].bool()
        n = own_VnH.shape[1]
        mine = slice(first, first + n)
        all_VNH = torch.cat(
            [others[:first].transpose(0, 1), own_VnH, others[first + n :].transpose(0, 1)], dim=1
        )
        anchors_NH, positives_NH = all_VNH[:2]
        # C: candidates, N of each view but the first
        wrong_NC = ~valid_N.repeat(len(all_VNH) - 1)[None]
        if keys_Vn is not None:
            wrong_NC = wrong_NC | _no_negatives(gather_rows(keys_Vn.T.contiguous(), data)[0].T)
        scores_NC = (
            anchors_NH @ all_VNH[1:].flatten(0, 1).T / self.options.temperature
        ).masked_fill(wrong_NC, float("-inf"))
        target_N = torch.arange(len(valid_N), device=valid_N.device)
        nll_N = F.cross_entropy(scores_NC[valid_N], target_N[valid_N], reduction="none")
        with torch.no_grad():
            values_N = anchors_NH.new_zeros(len(valid_N))
            distance_NN = torch.cdist(anchors_NH[mine], anchors_NH).square()
            near_NN = torch.exp(-2 * distance_NN) * valid_N * (target_N[mine, None] != target_N)
            sums = {
                "contrastive": values_N.index_put((target_N[valid_N],), nll_N)[mine],
                "retrieval_accuracy": (scores_NC[mine].argmax(1) == target_N[mine]).float(),
                "alignment": (anchors_NH - positives_NH)[mine].square().sum(1),
                "uniformity": near_NN.sum(1) / max(1, int(valid_N.sum()) - 1),
            }
        return nll_N.sum(), {term: values_n * valid_n for term, values_n in sums.items()}

    def files(self, config: PretrainedConfig) -> dict[str, str]:
        """Return what sentence-transformers reads of a folder, so that its vectors are those of the
        training: pooled alike, of length 1.
        """
        home = "sentence_transformers.models"
        modules = [
            {"idx": n, "name": str(n), "path": path, "type": f"{home}.{kind}"}
            for n, (path, kind) in enumerate(
                [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
            )
        ]
        pooling = {"word_embedding_dimension": config.hidden_size} | {
            f"pooling_mode_{theirs}": self.options.pooling == ours
            for ours, theirs in (
                ("cls", "cls_token"),
                ("mean", "mean_tokens"),
                ("last", "lasttoken"),
            )
        }
        reads = {"max_seq_length": self.setting.seq_len, "do_lower_case": False}
        return {
            "modules.json": json.dumps(modules, indent=1),
            "sentence_bert_config.json": json.dumps(reads),
            "config_sentence_transformers.json": json.dumps({"similarity_fn_name": "cosine"}),
            "1_Pooling/config.json": json.dumps(pooling, indent=1),
            "2_Normalize/config.json": "{}",
        }

    def check(self, model: Model, *, device: torch.device | str) -> None:
        """Refuse a model whose embedding does not depend on the text: the first token of a model
        that sees only the past.

        And views that would be the same, without dropout.
        """
        super().check(model, device=device)
        config = self.setting.model_config
        assert config is not None, "check() needs Setting.model_config"
        if self.options.views == "dropout" and not any(
            value for key, value in config.to_dict().items() if "drop" in key
        ):
            raise ConfigError(
                "two views that differ in dropout alone are the same: this model has none",
                where="objective.options.views",
                value="dropout",
                remedy="set views to crops, or give the model dropout in model.config",
            )
        ids_BT = torch.randint(
            config.vocab_size, (2, self.setting.seq_len), generator=torch.Generator().manual_seed(0)
        )
        ids_BT[:, 0] = ids_BT[0, 0]  # [CLS], say
        batch = Batch(
            {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)},
            ids_BT,
            ids_BT,
            {},
            ids_BT[:, 0],
            ids_BT[:, 0],
        )
        one, other = self.embed(model, batch.to(device))[0]
        if torch.equal(one, other):
            raise ConfigError(
                "contrastive: the first token of this model does not see the text",
                where="objective.options.pooling",
                value=f"{self.options.pooling}, {config.model_type}",
                remedy="set it to last or mean, or choose an encoder",
            )


def text_keys(batch: Batch) -> Tensor:
    """Return a number a view and text (V, n), equal for equal texts: a polynomial of the ids modulo
    2^64, whatever the padding.
    """
    ids_BT, mask_BT = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    odd = torch.randint(
        -(2**62), 2**62, (ids_BT.shape[1],), generator=torch.Generator().manual_seed(0)
    )
    return (
        ((ids_BT + 1) * mask_BT * (2 * odd + 1).to(ids_BT.device))
        .sum(1)
        .view(-1, len(batch.position_B))
    )


def _no_negatives(keys_VN: Tensor) -> Tensor:
    """Return (N, C) which candidates are right, or the very text that asks, beside the text's own
    answer.
    """
    asks_N, answers_N, N = keys_VN[0], keys_VN[1], keys_VN.shape[1]
    candidates_C = keys_VN[1:].flatten()
    answer_NC, alike_NN = candidates_C == answers_N[:, None], asks_N == asks_N[:, None]
    if alike_NN.sum() > N:  # an answer of an equal text is right as well
        answer_NC = alike_NN.float() @ answer_NC.float() > 0
    right_NC = answer_NC | (candidates_C == asks_N[:, None])
    right_NC[:, :N].fill_diagonal_(False)
    return right_NC
