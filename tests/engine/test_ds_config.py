import os
import subprocess
import sys

import pytest

from hfscale.config.inference import Inference
from hfscale.engine.ds_config import deepspeed_config, inference_config, running_stage
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


@pytest.mark.parametrize(
    ("extra", "where", "remedy"),
    [
        ({"zero_optimzation": {"a": 1}}, "engine.extra.zero_optimzation", "zero_optimization"),
        (
            {"zero_optimization": {"reduce_bucketsize": 1}},
            "engine.extra.zero_optimization.reduce_bucketsize",
            "reduce_bucket_size",
        ),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            "engine.extra.zero_optimization.offload_param.devise",
            "device",
        ),
        ({"flops_profiler": {"enable": True}}, "engine.extra.flops_profiler.enable", "enabled"),
        ({"comms_logger": True}, "engine.extra.comms_logger", "enabled"),
        ({"checkpoint": {"tag_validation": "Warn"}}, "engine.extra.checkpoint", "valid names"),
        ({"dataloader_drop_last": True}, "engine.extra.dataloader_drop_last", ""),
    ],
)
def test_what_deepspeed_would_ignore_is_refused(extra, where, remedy):
    asked = tiny_config(1, "fp32", extra=extra)
    for made in (
        lambda: deepspeed_config(asked, device_type="cpu"),
        lambda: inference_config(Inference(extra=extra), precision="fp32", device_type="cpu"),
    ):
        with pytest.raises(ConfigError) as error:
            made()
        assert error.value.where == where
        assert remedy in error.value.remedy


@pytest.mark.slow  # imports DeepSpeed
def test_the_keys_are_deepspeeds_own():
    code = """
import json, sys
from hfscale.engine.ds_config import KNOWN
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as Zero
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig as Optimizer
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig as Param
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.comm.config import CommsLoggerConfig
theirs = {"zero_optimization": Zero, "zero_optimization.offload_optimizer": Optimizer,
          "zero_optimization.offload_param": Param, "bf16": DeepSpeedBF16Config,
          "fp16": DeepSpeedFP16Config, "comms_logger": CommsLoggerConfig}
for section, model in theirs.items():
    names = {field.alias or name for name, field in model.model_fields.items()}
    assert KNOWN[section] <= names, (section, KNOWN[section] - names)
"""
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
