"""Keys of ``model.config``: what an architecture's code reads is accepted, a typo is not."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from hfscale.config.schema import Model
from hfscale.errors import ConfigError
from hfscale.models.build import check_model_config
from hfscale.models.config_keys import known_keys


def check(architecture: str, **values: Any) -> Any:
    return check_model_config(
        Model(architecture=architecture, config=values), vocab_size=320, seq_len=32
    )


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("qwen3_moe", {"head_dim": 16}),
        ("qwen2", {"head_dim": 16}),
        ("phi3", {"head_dim": 16}),
        ("granite", {"head_dim": 16}),
        (
            "deberta-v2",
            {
                "position_buckets": 32,
                "norm_rel_ebd": "layer_norm",
                "share_att_key": True,
                "pos_att_type": ["p2c", "c2p"],
            },
        ),
        ("llama", {"rope_theta": 5e5}),
    ],
)
def test_a_key_that_the_code_reads_is_taken(architecture: str, values: dict[str, Any]) -> None:
    config = check(architecture, **values)
    if "rope_theta" in values:
        assert config.rope_parameters["rope_theta"] == 5e5
    else:
        assert {key: getattr(config, key) for key in values} == values


@pytest.mark.parametrize(
    ("architecture", "key", "near"),
    [("qwen3_moe", "head_dims", "head_dim"), ("deberta-v2", "position_bucket", "position_buckets")],
)
def test_a_typo_is_refused_with_the_key_that_was_meant(
    architecture: str, key: str, near: str
) -> None:
    with pytest.raises(ConfigError, match=rf"no such config key[\s\S]*did you mean {near}"):
        check(architecture, **{key: 16})


def test_a_published_config_can_be_pasted() -> None:
    published = CONFIG_MAPPING["llama"](hidden_size=32, num_attention_heads=2).to_dict()
    published |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    assert check("llama", **published).hidden_size == 32
    with pytest.raises(ConfigError, match=r"another architecture[\s\S]*model\.architecture=llama"):
        check("mistral", **published)


def test_a_whole_number_is_taken_for_a_float() -> None:
    assert check("mixtral", router_aux_loss_coef=0).router_aux_loss_coef == 0.0


def test_methods_of_a_config_are_no_keys() -> None:
    assert not known_keys(CONFIG_MAPPING["qwen3_moe"]) & {"to_dict", "get_text_config"}
