"""Losses without logits: those of the plain head, and their gradients, whatever a model does to its
logits, in however many chunks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoConfig

from hfscale.config.schema import Engine
from hfscale.errors import ConfigError
from hfscale.models.call import call, row_inputs
from hfscale.models.head import After, UnknownHead, head_of, listen
from hfscale.objectives import chunked_head, cross_entropy
from hfscale.objectives.chunked_head import ChunkedHead, Question, chunked, wants_chunks
from hfscale.objectives.cross_entropy import IGNORE_INDEX, token_losses
from hfscale.planning.tracing import Watch

N, H, V = 13, 8, 41
CAUSAL, MASKED, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5: dict[str, Any] = {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1}
BART: dict[str, Any] = {
    **{"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
}
# what it is, its config, and what it does after its head
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": (CAUSAL, SIZES, "nothing"),
    "llama, tied": (CAUSAL, SIZES | {"tie_word_embeddings": True}, "nothing"),
    "gpt2": (CAUSAL, {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 2}, "nothing"),
    "gemma2": (CAUSAL, SIZES | {"head_dim": 16, "final_logit_softcapping": 2.0}, "div, tanh, mul"),
    "cohere": (CAUSAL, SIZES | {"logit_scale": 0.25}, "mul"),
    "granite": (CAUSAL, SIZES | {"logits_scaling": 8.0}, "div"),
    "mamba": (CAUSAL, {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}, "float"),
    "bert": (MASKED, SIZES, "nothing"),
    "roberta": (MASKED, SIZES, "nothing"),
    "t5": (SEQ2SEQ, T5, "nothing"),
    "t5, tied": (SEQ2SEQ, T5 | {"tie_word_embeddings": True}, "nothing"),
    "bart": (SEQ2SEQ, BART, "add"),
}


@pytest.fixture(params=[1, 100, 1 << 20])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one token, of a few, and of all."""
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 12 * request.param)
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", request.param)


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, weight and bias, the same at each call."""
    rng = torch.Generator().manual_seed(0)
    shapes = (N, H), (V, H), (V,)
    made = [torch.randn(shape, generator=rng).to(dtype).requires_grad_() for shape in shapes]
    return made[0], made[1], made[2]


def some_labels(*, asked: float = 0.7) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    labels_N = torch.randint(V, (N,), generator=rng)
    return labels_N.masked_fill(torch.rand(N, generator=rng) > asked, IGNORE_INDEX)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("asked", [0.0, 0.5, 1.0])
def test_values_and_gradients_are_those_of_torch(
    dtype: torch.dtype, smoothing: float, biased: bool, asked: float
) -> None:
    labels_N, factor = some_labels(asked=asked), 0.3

    question = Question(After(), smoothing, guesses=True)
    ours, theirs = leaves(dtype), leaves(dtype)
    bias_V = ours[2] if biased else None
    losses_N, right_N, nothing = chunked(ours[0], ours[1], bias_V, labels_N, question)
    logits_NV = F.linear(theirs[0], theirs[1], theirs[2] if biased else None)
    plain_N = F.cross_entropy(
        logits_NV.float(), labels_N, reduction="none", label_smoothing=smoothing
    )
    torch.testing.assert_close(losses_N, plain_N, rtol=1e-6, atol=1e-6)
    asked_N = labels_N != IGNORE_INDEX
    assert torch.equal(right_N, (logits_NV.argmax(1) == labels_N) & asked_N)
    (losses_N.sum() * factor + nothing.sum()).backward()
    (plain_N.sum() * factor).backward()
    # of 16 bit a few roundings; each element's scale is that of its row
    rtol = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for one, other in zip(ours[: 2 + biased], theirs, strict=False):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.dtype == dtype
        largest = float(other.grad.abs().max())
        torch.testing.assert_close(one.grad, other.grad, rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_losses_and_gradients_of_its_own_logits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 1200)
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", 100)
    auto_model, values, does = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split(",")[0], **values)
    model = getattr(transformers, auto_model).from_config(config).eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    ids_BT = torch.randint(3, 50, (2, 12))
    inputs = row_inputs(ids_BT, config)
    labels_BT = ids_BT.flip(1)
    labels_BT[:, :3] = IGNORE_INDEX

    def forward() -> Tensor:
        logits: Tensor = call(model, **inputs).logits
        return logits

    after, hidden, logits_BTV = listen(model, forward)
    assert after.names == does
    assert hidden.shape == (2, 12, head_of(model).in_features)
    scores = ChunkedHead(after).scores(model, labels_BT, forward, smoothing=0.1, guesses=True)
    plain_BT = token_losses(forward(), labels_BT, smoothing=0.1)
    torch.testing.assert_close(scores.losses_BT, plain_BT, rtol=1e-6, atol=1e-6)
    right_BT = (logits_BTV.argmax(-1) == labels_BT) & (labels_BT != IGNORE_INDEX)
    assert scores.right_BT is not None
    assert torch.equal(scores.right_BT, right_BT)
    seen, right = (
        torch.autograd.grad(losses.sum() * 3.0, [*model.parameters()], allow_unused=True)
        for losses in (scores.losses_BT, plain_BT)
    )
    assert [one is None for one in seen] == [one is None for one in right]
    whole = [torch.cat([one.flatten() for one in of if one is not None]) for of in (seen, right)]
    assert float((whole[0] - whole[1]).norm()) < 2e-6 * float(whole[1].norm())
    assert "forward" not in vars(head_of(model)), "the head is as it was"


def test_the_logits_are_never_there_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 4 * 40 * 1000)
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", 4000)
    hidden_NH = torch.randn(800, 4, requires_grad=True)
    weight_VH = torch.randn(1000, 4, requires_grad=True)
    labels_N = torch.randint(1000, (800,))
    with Watch([hidden_NH, weight_VH, labels_N]) as watch:
        chunked(hidden_NH, weight_VH, None, labels_N, Question(After()))[0].sum().backward()
    assert watch.peak < 0.1 * 800 * 1000 * 4
    before = watch.peak
    with Watch([hidden_NH, weight_VH, labels_N]) as watch, torch.no_grad():
        chunked(hidden_NH, weight_VH, None, labels_N, Question(After(), trained=False))
    assert watch.peak < before


def test_a_frozen_head_has_no_gradient_and_tokens_of_any_weight() -> None:
    hidden_NH, weight_VH, _ = leaves()
    labels_N, weights_N = some_labels(), torch.arange(float(N))
    weight_VH.requires_grad_(False)
    losses_N, *_ = chunked(hidden_NH, weight_VH, None, labels_N, Question(After()))
    (seen,) = torch.autograd.grad((losses_N * weights_N).sum(), hidden_NH)
    plain_N = F.cross_entropy(F.linear(hidden_NH, weight_VH), labels_N, reduction="none")
    (right,) = torch.autograd.grad((plain_N * weights_N).sum(), hidden_NH)
    torch.testing.assert_close(seen, right, rtol=1e-5, atol=1e-6)


def test_tokens_that_are_weighed_unlike_are_refused() -> None:
    hidden_NH, weight_VH, _ = leaves()
    losses_N, *_ = chunked(hidden_NH, weight_VH, None, some_labels(), Question(After()))
    with pytest.raises(ConfigError, match="weighs the tokens of a micro-batch unlike"):
        (losses_N * torch.arange(float(N))).sum().backward()


class Odd(torch.nn.Module):
    """A model with a head, after which ``what`` is done."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.head = what, torch.nn.Linear(H, V)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return None if self.what == "no head" else self.head

    def forward(self) -> Tensor:
        logits_NV: Tensor = self.head(leaves()[0])
        ways = {
            "softmax": lambda: logits_NV.softmax(-1),
            "a trained scale": lambda: logits_NV * self.scale,
            "one factor a token": lambda: logits_NV * torch.ones(N, 1),
            "part": lambda: logits_NV[:3],
            "twice": lambda: self.head(leaves()[0]),
            "other": lambda: torch.zeros(N, V),
        }
        return ways[self.what]() if self.what in ways else logits_NV


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("softmax", "its logits go through softmax"),
        ("a trained scale", "its logits go through mul"),
        ("one factor a token", "its logits go through mul"),
        ("part", "its logits go through __getitem__"),
        ("twice", "its head is asked 2 times"),
        ("other", "what comes of its head are not its logits"),
        ("no head", "it has no head"),
        ("wrapped", "its head is no plain linear module but Bilinear"),
    ],
)
def test_a_head_that_is_not_understood_is_named(what: str, why: str) -> None:
    model = Odd(what)
    if what == "wrapped":
        model.head = torch.nn.Bilinear(H, H, V)  # type: ignore[assignment]
    with pytest.raises(UnknownHead, match=why):
        listen(model, model)


@pytest.mark.parametrize(
    ("tokens", "engine", "wanted"),
    [
        (4096, {}, True),
        (2048, {}, False),
        (4096, {"head": "plain"}, False),
        (4096, {"compile": True}, False),
        (4096, {"precision": "fp16"}, False),
        (2, {"head": "chunked"}, True),
    ],
)
def test_chunks_are_chosen_by_the_size_of_the_logits(
    tokens: int, engine: dict[str, Any], wanted: bool
) -> None:
    head = torch.nn.Linear(512, 128256, device="meta")
    assert wants_chunks(Engine(**engine), tokens=tokens, head=head) == wanted


def test_a_wide_head_that_is_trained_wants_more_tokens() -> None:
    head = torch.nn.Linear(4096, 128256, device="meta")
    assert not wants_chunks(Engine(), tokens=4096, head=head), "its gradient takes as much"
    assert wants_chunks(Engine(), tokens=8192, head=head)
    assert wants_chunks(Engine(), tokens=4096, head=head.requires_grad_(False))
