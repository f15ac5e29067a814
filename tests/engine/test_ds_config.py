import subprocess
import sys

import pytest

from hfscale.engine.ds_config import deepspeed_config, running_stage
from hfscale.errors import ConfigError
from tests.engine.tiny import tiny_config


def test_needs_neither_torch_nor_deepspeed():
    code = (
        "import sys, hfscale.engine.ds_config; assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sixteen_bit_without_zero_runs_as_stage_1():
    assert running_stage(tiny_config(0, "bf16").engine) == 1
    assert running_stage(tiny_config(0, "fp32").engine) == 0
    assert (
        deepspeed_config(tiny_config(0, "bf16"), device_type="cpu")["zero_optimization"]["stage"]
        == 1
    )


def test_extra_is_merged_into_what_is_derived():
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}, "comms_logger": {"enabled": True}}
    made = deepspeed_config(tiny_config(2, "bf16", extra=extra), device_type="cpu")
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert made["comms_logger"] == {"enabled": True} and made["data_types"] == {
        "grad_accum_dtype": "fp32"
    }


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ({"gradient_clipping": 2.0}, "engine.extra.gradient_clipping"),
        ({"zero_optimization": {"stage": 3}}, "engine.extra.zero_optimization.stage"),
        ({"bf16": True}, "engine.extra.bf16"),
    ],
)
def test_extra_may_not_repeat_a_derived_key(extra, where):
    with pytest.raises(ConfigError) as error:
        deepspeed_config(tiny_config(1, "fp32", extra=extra), device_type="cpu")
    assert error.value.where == where


@pytest.mark.parametrize(
    "engine",
    [
        {"stage": 1, "precision": "fp16"},
        {"stage": 0, "offload": "optimizer"},
        {"stage": 2, "offload": "parameters"},
    ],
)
def test_what_cannot_run_is_refused(engine):
    with pytest.raises(ConfigError, match="remedy"):
        deepspeed_config(tiny_config(**engine), device_type="cpu")
