"""Options of DeepSpeed that people paste into ``engine.extra``: which leave the numbers as they
are, which change them, which fail, and what hfscale says of each.

    python -m benchmarks.options [--stage 2]

GPT-2 trains for 4 steps of two micro-batches on 2 ranks with each option, at ZeRO 1, 2 and 3 in
fp32 (those of bf16 in bf16), and the losses and gradient norms are held against those of a run
without it. About 10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, record, table
from hfscale.config.schema import RunConfig
from hfscale.config.unsafe import unsafe
from hfscale.engine.ds_config import deepspeed_config
from hfscale.errors import UserError
from tests.helpers.corpus import make_corpus
from tests.helpers.pretraining import pretraining
from tests.helpers.ranks import RankFailure, run_ranks
from tests.helpers.training import train

EQUAL = 1e-6  # of a loss, relative
ZERO: tuple[tuple[str, object], ...] = (
    ("overlap_comm", True),
    ("contiguous_gradients", False),
    ("reduce_scatter", False),
    ("reduce_bucket_size", 1000),
    ("use_multi_rank_bucket_allreduce", False),
    ("allgather_partitions", False),
    ("allgather_bucket_size", 1000),
    ("sub_group_size", 1000),
    ("round_robin_gradients", True),
    ("parameter_alignment", True),
    ("memory_efficient_linear", False),
    ("override_module_apply", False),
    ("ignore_unused_parameters", False),
    ("compute_grad_norm", False),
    ("enable_sanity_checks", True),
    ("zero_hpz_partition_size", 2),
    ("zero_quantized_weights", True),
    ("zero_quantized_nontrainable_weights", True),
    ("zero_quantized_gradients", True),
    ("stage3_max_live_parameters", 1000),
    ("stage3_max_reuse_distance", 1000),
    ("stage3_prefetch_bucket_size", 0),
    ("stage3_param_persistence_threshold", 0),
    ("stage3_model_persistence_threshold", 0),
    ("stage3_module_granularity_threshold", 100000),
    ("stage3_use_all_reduce_for_fetch_params", True),
    ("stage3_allgather_sequential", True),
    ("mics_shard_size", 2),
    ("zenflow", {"topk_ratio": 0.1}),
    ("legacy_stage1", True),
    ("stage3_gather_16bit_weights_on_model_save", True),
)
TOP: tuple[tuple[str, object], ...] = (
    ("prescale_gradients", True),
    ("gradient_predivide_factor", 2.0),
    ("disable_allgather", True),
    ("sparse_gradients", True),
    ("zero_allow_untested_optimizer", True),
    ("wall_clock_breakdown", True),
    ("disable_python_gc", True),
    ("compile", {"deepcompile": True}),
    ("tensor_parallel", {"autotp_size": 2}),
    ("amp", {"enabled": True}),
)
SIXTEEN: tuple[tuple[str, object], ...] = (
    ("bf16", {"immediate_grad_update": True}),
    ("bf16", {"check_grad_overflow": True}),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="only this one")
    args = parser.parse_args()
    stages = [args.stage] if args.stage else [1, 2, 3]
    began, where = time.perf_counter(), machine("torch", "deepspeed", "transformers")
    extras: list[tuple[dict[str, Any], str]] = [
        *(({"zero_optimization": {key: value}}, "fp32") for key, value in ZERO),
        *(({key: value}, "fp32") for key, value in TOP),
        *(({key: value}, "bf16") for key, value in SIXTEEN),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        for extra, precision in extras:
            seen = [trial.of(extra, stage, precision) for stage in stages]
            rows.append([f"`{json.dumps(extra)}`", *seen])
            print(*rows[-1], sep="  ", flush=True)
    header = ["`engine.extra`", *(f"ZeRO {stage}" for stage in stages)]
    record(
        "options",
        f"{where}\n\n{table(header, rows)}\n\n"
        "The largest relative difference of a loss or gradient norm of 4 steps from a run without "
        "the option (2 ranks, two micro-batches each); `refused`: hfscale says so before anything "
        "starts, and what would have come of it stands behind. "
        f"{time.perf_counter() - began:.0f} s.",
    )


class Trial:
    """Short runs in ``folder``, with options and without."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._corpus = make_corpus(folder / "corpus")
        self._plain: dict[tuple[int, str], list[float]] = {}
        self._runs = 0

    def of(self, extra: dict[str, Any], stage: int, precision: str) -> str:
        """Return what an option does at a stage, in words."""
        key = (stage, precision)
        if key not in self._plain:
            self._plain[key] = self._train(stage, precision, {})
        refused = "refused; " if self._refused(stage, precision, extra) else ""
        try:
            seen = self._train(stage, precision, extra)
        except RankFailure as error:
            return refused + f"fails: {_last_line(error)}"
        off = max(abs(a / b - 1) for a, b in zip(seen, self._plain[key], strict=True))
        return refused + ("equal" if off <= EQUAL else f"{off:.1e} off")

    def _values(self, stage: int, precision: str, extra: dict[str, Any]) -> dict[str, Any]:
        self._runs += 1
        return pretraining(
            self._corpus,
            self._folder,
            f"run-{self._runs}",
            "gpt2",
            engine={
                "zero_stage": stage,
                "precision": precision,
                "extra": extra,
                "prove": False,  # which would refuse what is wrong
            },
            optim={"clip_norm": 0.3},
            train={"steps": 4, "global_batch": 16, "micro_batch": 4},
        )

    def _refused(self, stage: int, precision: str, extra: dict[str, Any]) -> bool:
        config = RunConfig.model_validate(self._values(stage, precision, extra))
        try:
            deepspeed_config(config, device_type="cpu")
        except UserError:
            return True
        return bool([*unsafe(extra, stage=stage)])

    def _train(self, stage: int, precision: str, extra: dict[str, Any]) -> list[float]:
        steps = run_ranks(train, 2, self._values(stage, precision, extra))[0]
        return [step[name] for step in steps for name in ("loss", "grad_norm")]


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if "Error" in line or "Exception" in line]
    return (lines[-1] if lines else type(error).__name__).strip()[:160].replace("|", "/")


if __name__ == "__main__":
    main()
