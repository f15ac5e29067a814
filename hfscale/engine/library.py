"""DeepSpeed, without what it loads at each start for things that nobody here uses: its one import.

mlflow  its autotuner imports it where it is installed: 3 s of a processor
Muon    each engine imports it, to see that the optimizer is another one, and compiles it with
        that, for which torch loads its compiler: 2 s
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def load() -> Any:
    """Return the module ``deepspeed``."""
    with _without("mlflow"):
        deepspeed = import_module("deepspeed")
    compiler: Any = import_module("deepspeed.runtime.compiler")
    compiled = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiled
    return deepspeed


def op_builders() -> dict[str, Any]:
    """Return the builders of its own kernels, by name."""
    builders: dict[str, Any] = import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
    return builders


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Have an import of ``package`` find nothing, unless it is loaded already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


deepspeed = load()
