"""The load-balancing loss of a mixture of experts: transformers' own figure of one batch, and the
same however a step is cut.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hfscale.errors import ConfigError
from hfscale.models.call import call
from hfscale.models.router import balancing
from hfscale.objectives.base import ROUTER, Batch, Setting
from hfscale.objectives.clm import CausalLM
from hfscale.training.accounting import Accounting
from tests.models.families import VOCAB

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24},
    "olmoe": {"num_experts": 4, "pad_token_id": 0},
    "gpt_oss": {"num_local_experts": 4, "pad_token_id": 0, "eos_token_id": 0},
}


def mixture(architecture: str, **values: Any) -> Any:
    torch.manual_seed(1)
    config = CONFIG_MAPPING[architecture](**SMALL | EXPERTS[architecture] | values)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def ids(rows: int, tokens: int = 12) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("architecture", EXPERTS)
def test_it_is_transformers_own(architecture: str) -> None:
    model = mixture(architecture).eval()
    term = balancing(model.config, "AutoModelForCausalLM")
    assert term is not None and term.coefficient == model.config.router_aux_loss_coef > 0
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    with torch.no_grad(), term.listening(model) as logits:
        call(model, input_ids=ids(3), attention_mask=mask)
    chosen_E, probability_BE = term.parts(model, logits, mask)
    ours = len(chosen_E) * (chosen_E / mask.sum()) @ (probability_BE.sum(0) / mask.sum())
    with torch.no_grad():
        theirs = model(input_ids=ids(3), attention_mask=mask, output_router_logits=True).aux_loss
    torch.testing.assert_close(ours, theirs)


def losses(model: Any, cut: int, **setting: Any) -> tuple[float, dict[str, float], torch.Tensor]:
    """Return the loss of 4 rows in micro-batches of ``cut``, its terms' sums, and a router's
    gradient.
    """
    objective = CausalLM(
        CausalLM.Options(), Setting(seq_len=12, model_config=model.config, **setting)
    )
    rows = ids(4, 13)
    batches = [
        Batch(
            {"input_ids": part[:, :-1]},
            part[:, 1:],
            part[:, :-1],
            {"clm": torch.full((len(part),), 12)},
            torch.zeros(len(part)),
            torch.arange(len(part)),
        )
        for part in rows.split(cut)
    ]
    model.zero_grad()
    total = 0.0
    accounting = Accounting(objective)
    for loss in accounting.losses(model, batches, accounting.counts(batches)):
        loss.backward()
        total += loss.item()
    sums = {term: value.item() for term, value in accounting.take_sums().items()}
    weight = next(p for name, p in model.named_parameters() if "gate.weight" in name)
    return total, sums, weight.grad.clone()


def test_the_loss_does_not_depend_on_the_cut_and_is_that_of_the_whole_batch() -> None:
    model = mixture("mixtral", router_aux_loss_coef=5.0)
    whole, sums, gradient = losses(model, 4)
    rows = ids(4, 13)
    out = model(
        input_ids=rows[:, :-1], labels=rows[:, :-1], output_router_logits=True, use_cache=False
    )
    model.zero_grad()
    clm = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), rows[:, 1:].flatten())
    expected = clm + 5.0 * out.aux_loss
    expected.backward()
    weight = next(p for name, p in model.named_parameters() if "gate.weight" in name)
    assert whole == pytest.approx(expected.item(), abs=1e-5)
    assert sums[ROUTER] / 48 == pytest.approx(out.aux_loss.item(), abs=1e-6)
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)
    for cut in (1, 2):
        part, _, same = losses(model, cut)
        assert part == pytest.approx(whole, abs=1e-5), cut
        torch.testing.assert_close(same, gradient, rtol=1e-4, atol=1e-6)


def test_a_coefficient_of_0_trains_without_it() -> None:
    model = mixture("mixtral", router_aux_loss_coef=0.0)
    assert balancing(model.config, "AutoModelForCausalLM") is None
    assert set(losses(model, 2)[1]) == {"clm"}


def test_a_held_out_loss_has_no_such_term() -> None:
    model = mixture("mixtral", router_aux_loss_coef=5.0)
    objective = CausalLM(CausalLM.Options(), Setting(seq_len=12, model_config=model.config))
    assert objective.weights() == {"clm": 1.0, ROUTER: 5.0}
    assert objective.validated() == {"loss", "perplexity"}


def test_routers_whose_loss_is_not_known_are_refused_with_what_to_do() -> None:
    config = CONFIG_MAPPING["switch_transformers"]()
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef=0, model\.config\.router_z_loss"):
        balancing(config, "AutoModelForSeq2SeqLM")
    config.router_aux_loss_coef = config.router_z_loss_coef = 0.0
    assert balancing(config, "AutoModelForSeq2SeqLM") is None


def test_routers_that_are_not_heard_are_no_silent_zero() -> None:
    model = mixture("mixtral")
    term = balancing(model.config, "AutoModelForCausalLM")
    assert term is not None
    with pytest.raises(ConfigError, match=r"engine\.compile=false"):
        term.parts(model, [], torch.ones(1, 12))
