"""DeepSpeed's config, derived from ours in this one place. Imports neither torch nor DeepSpeed, so
a login node can check it.
"""

from __future__ import annotations

from typing import Any

from hfscale.config.inference import Inference
from hfscale.config.schema import Engine, TrainConfig
from hfscale.config.unsafe import UNSAFE
from hfscale.errors import ConfigError, nearest

# What `engine.extra` may say: the keys of DeepSpeed that have an effect here, by section. It
# ignores any other key without a word, and its own checkpoints, data loaders, pipelines and
# schedules are not used.
KNOWN: dict[str, set[str] | None] = {
    "zero_optimization": {
        *("contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "overlap_comm"),
        *("use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size"),
        *("sub_group_size", "round_robin_gradients", "parameter_alignment", "leaf_module"),
        *("memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings"),
        *("enable_sanity_checks", "ignore_unused_parameters", "compute_grad_norm"),
        *("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"),
        *("zero_quantized_nontrainable_weights", "stage3_max_live_parameters"),
        *("stage3_max_reuse_distance", "stage3_prefetch_bucket_size"),
        *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
        *("stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params"),
        *("stage3_allgather_sequential", "offload_optimizer", "offload_param", "stage"),
    },
    "zero_optimization.offload_optimizer": {
        *("device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write"),
        *("fast_init", "ratio"),
    },
    "zero_optimization.offload_param": {
        *("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"),
    },
    "fp16": {
        *("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window"),
        *("hysteresis", "consecutive_hysteresis", "min_loss_scale"),
    },
    "bf16": {"enabled", "check_grad_overflow", "immediate_grad_update"},
    "timers": {"throughput"},
    "timers.throughput": {"enabled", "synchronized"},
    "comms_logger": {"enabled", "prof_all", "prof_ops", "verbose", "debug"},
    "flops_profiler": {
        *("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules"),
        *("detailed", "output_file"),
    },
    "aio": {
        *("block_size", "queue_depth", "intra_op_parallelism", "single_submit"),
        *("overlap_events", "use_gds"),
    },
    "tensorboard": {"enabled", "output_path", "job_name"},
    "wandb": {"enabled", "group", "team", "project"},
    "csv_monitor": {"enabled", "output_path", "job_name"},
} | dict.fromkeys(
    (
        *("steps_per_print", "dump_state", "disable_python_gc", "disable_allgather", "log_level"),
        *("prescale_gradients", "gradient_predivide_factor", "wall_clock_breakdown"),
        "memory_breakdown",
    )
)


def running_stage(engine: Engine) -> int:
    """Return the ZeRO stage that really runs: 16 bit at stage 0 runs as stage 1.

    DeepSpeed's optimizer for 16 bit without ZeRO rounds differently from all other stages
    (third-step loss 5.5696 for 5.5700 elsewhere) and takes no fp32 gradients. Stage 1 gives the
    same result in less memory.
    """
    return max(engine.zero_stage, 1) if engine.precision != "fp32" else engine.zero_stage


def deepspeed_config(config: TrainConfig, *, device_type: str) -> dict[str, Any]:
    """Return the dict for ``deepspeed.initialize``; ``engine.extra`` is merged last.

    Accumulation is not in it: with ``managed_gradient_accumulation`` off, every ``backward`` adds
    and ``step`` ends the step, and the loss arrives already divided by the step's global count.

    Raises:
        ConfigError: for what this device or stage cannot run, and where ``engine.extra`` repeats a
            derived key.
    """
    engine, stage = config.engine, running_stage(config.engine)
    _check_precision(engine.precision, device_type)
    if engine.offload != "none" and stage == 0:
        raise ConfigError(
            "there is nothing to offload without ZeRO",
            where="engine.offload",
            value=engine.offload,
            remedy="engine.zero_stage=1 (optimizer) or 3 (parameters)",
        )
    if engine.offload == "parameters" and stage != 3:
        raise ConfigError(
            "parameters can be offloaded at ZeRO stage 3 only",
            where="engine.offload",
            value=engine.offload,
            remedy="engine.zero_stage=3, or engine.offload=optimizer",
        )
    zero: dict[str, Any] = {"stage": stage}
    place = {"device": "cpu", "pin_memory": device_type == "cuda"}
    if engine.offload != "none":
        zero["offload_optimizer"] = place
    if engine.offload == "parameters":
        zero["offload_param"] = place
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0
        if stage == 0
        else config.optim.clip_norm,  # at stage 0 the engine itself clips
        "zero_optimization": zero,
        # torch's optimizers step on the CPU as well, without a compiler
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # tests/engine/test_optimizers.py tests them
        # the norm tells, without another pass
        "bf16": {
            "enabled": engine.precision == "bf16",
            "check_grad_overflow": False,
        },
        "fp16": {"enabled": engine.precision == "fp16"},
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the device
    }
    # gradients are made in 16 bit, but added up in 32: here and over ranks
    if engine.precision != "fp32":
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
        derived["communication_data_type"] = "fp32"
    _refuse_unknown(engine.extra, derived)
    return _merged(derived, engine.extra, where="engine.extra")


def inference_config(engine: Inference, *, precision: str, device_type: str) -> dict[str, Any]:
    """Return the dict for a model that only computes, at stage 3: the other stages partition what
    training adds to the weights.

    Raises:
        ConfigError: as ``deepspeed_config``.
    """
    _check_precision(precision, device_type)
    place = (
        {"offload_param": {"device": "cpu", "pin_memory": device_type == "cuda"}}
        if engine.offload == "parameters"
        else {}
    )
    derived = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **place},
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "timers": {"throughput": {"enabled": False}},
    }
    _refuse_unknown(engine.extra, derived)
    return _merged(derived, engine.extra, where="engine.extra")


def _check_precision(precision: str, device_type: str) -> None:
    if precision == "fp16" and device_type != "cuda":
        raise ConfigError(
            "fp16 needs a GPU",
            where="engine.precision",
            value="fp16",
            remedy="engine.precision=bf16 or fp32",
        )


def _refuse_unknown(extra: dict[str, Any], derived: dict[str, Any], section: str = "") -> None:
    """Return if DeepSpeed would not ignore a key of ``extra``.

    Raises:
        ConfigError: with the nearest one that it knows.
    """
    top = {name for name in KNOWN if "." not in name}
    known = (KNOWN[section] if section else top | derived.keys()) or set()
    for key, value in extra.items():
        name = f"{section}.{key}" if section else key
        if key not in known and name not in UNSAFE:  # whose own words say more
            raise ConfigError(
                "DeepSpeed would ignore this key here, or has none of that name",
                where=f"engine.extra.{name}",
                value=value,
                remedy=nearest(key, known),
            )
        if KNOWN.get(name) and not isinstance(value, dict) and name not in derived:
            raise ConfigError(
                "DeepSpeed has a section of that name",
                where=f"engine.extra.{name}",
                value=value,
                remedy=f"its keys: {', '.join(sorted(KNOWN[name] or ()))}",
            )
        if KNOWN.get(name) and isinstance(value, dict):
            _refuse_unknown(value, {}, name)


def _merged(derived: dict[str, Any], extra: dict[str, Any], *, where: str) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in extra.items():
        path = f"{where}.{key}"
        if key not in derived:
            merged[key] = value
        elif isinstance(derived[key], dict) and isinstance(value, dict):
            merged[key] = _merged(derived[key], value, where=path)
        else:
            raise ConfigError(
                "engine.extra repeats a value that hfscale derives itself",
                where=path,
                value=value,
                remedy=f"remove it (derived: {derived[key]!r}) and set the option of hfscale "
                "that it comes from",
            )
    return merged
