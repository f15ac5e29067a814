"""Which of DeepSpeed's own kernels this machine could compile and run."""

from __future__ import annotations


def compatible_ops() -> dict[str, bool]:
    """Return name -> whether DeepSpeed finds what the kernel needs here (compiler, CUDA,
    libraries). hfscale itself needs none of them.
    """
    from hfscale.engine import library  # slow to import

    return {
        name: bool(builder.is_compatible(verbose=False))
        for name, builder in library.op_builders().items()
        if "not_implemented" not in name
    }
