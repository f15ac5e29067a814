"""Which of DeepSpeed's own kernels this machine could compile and run."""

from __future__ import annotations


def compatible_ops() -> dict[str, bool]:
    """Return name -> whether DeepSpeed finds what the kernel needs here (compiler, CUDA,
    libraries). hfscale itself needs none of them.
    """
    from deepspeed.ops.op_builder.all_ops import ALL_OPS  # slow to import

    return {
        name: bool(builder.is_compatible(verbose=False))
        for name, builder in ALL_OPS.items()
        if "not_implemented" not in name
    }
