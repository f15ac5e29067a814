"""What ``engine.extra`` may not say: options of DeepSpeed with which it trains wrongly without a
word, cannot train here, or does nothing. Seen with ``benchmarks.options`` and
``benchmarks.parity``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

EVERY = (0, 1, 2, 3)


@dataclass(frozen=True)
class Unsafe:
    """Why an option is refused, and at which stages (``engine.zero_stage``)."""

    why: str
    stages: tuple[int, ...] = EVERY


UNSAFE: dict[str, Unsafe] = {
    "communication_data_type": Unsafe(
        "gradients would be summed in fewer bits: losses move by 4e-4 within 10 steps"
    ),
    "torch_autocast": Unsafe(
        "the model would compute in other precisions than engine.precision says: losses move by "
        "2e-3 within 10 steps"
    ),
    "amp": Unsafe("engine.precision says in which precision the model computes"),
    "data_types": Unsafe(
        "gradients would be accumulated in fewer bits: losses move by 5e-3 within 10 steps"
    ),
    "optimizer": Unsafe("DeepSpeed ignores it: `optim` is the optimizer"),
    "scheduler": Unsafe(
        "`schedule` sets the learning rate of each step, whatever DeepSpeed's scheduler says"
    ),
    "sequence_parallel_size": Unsafe("DeepSpeed ignores it here: every rank has rows of its own"),
    "tensor_parallel": Unsafe(
        "its cuts are no ranges of a parameter, so that no checkpoint could be read on another "
        "number of ranks (docs/sizing.md)"
    ),
    "autotp_size": Unsafe("hfscale has no tensor parallelism (docs/sizing.md)"),
    "compile": Unsafe(
        "DeepCompile does not go with gradients that are reduced once a step; engine.compile "
        "compiles with torch"
    ),
    "prescale_gradients": Unsafe("DeepSpeed has it below ZeRO 2 only", (2, 3)),
    "gradient_predivide_factor": Unsafe("DeepSpeed has it below ZeRO 2 only", (2, 3)),
    "zero_optimization.overlap_comm": Unsafe(
        "below ZeRO 2 gradients are reduced after the whole backward pass: there is nothing to "
        "overlap",
        (0, 1),
    ),
    "zero_optimization.round_robin_gradients": Unsafe(
        "it deals parameters out of order, so that DeepSpeed's own map of its fp32 partitions, by "
        "which checkpoints are saved and loaded, is wrong",
        (0, 1, 2),
    ),
    "zero_optimization.stage3_module_granularity_threshold": Unsafe(
        "gradients of the modules that it fuses are lost (seen by the proof of the gradient)"
    ),
    "zero_optimization.zero_quantized_gradients": Unsafe(
        "gradients would be sent between nodes in 4 bits"
    ),
    "zero_optimization.zero_quantized_weights": Unsafe("weights would be gathered in 8 bits"),
    "zero_optimization.zero_quantized_nontrainable_weights": Unsafe(
        "weights would be gathered in 8 bits"
    ),
    "zero_optimization.mics_shard_size": Unsafe(
        "DeepSpeed has no MiCS any more: zero_hpz_partition_size keeps a second copy in each node"
    ),
    "zero_optimization.zenflow": Unsafe("ZenFlow wants an AdamW of DeepSpeed's own"),
}
# whose absence is what would be unsafe
NEEDED: dict[str, Unsafe] = {
    "zero_optimization.compute_grad_norm": Unsafe(
        "the norm of the gradient is what clips, and what says that a run is healthy"
    ),
}


def unsafe(extra: Mapping[str, object], *, stage: int) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with ``engine.extra`` at a ZeRO stage: a key, and why. What is switched
    off (false, null, 0, nothing) does no harm.
    """
    for name, value in _values(extra):
        known = NEEDED.get(name) if not value else UNSAFE.get(name)
        if known and stage in known.stages:
            yield f"engine.extra.{name}", f"{known.why}; take it out"


def _values(extra: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield the options with their full names, sections too."""
    for key, value in extra.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
