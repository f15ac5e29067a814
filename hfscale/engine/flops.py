"""DeepSpeed's flops profiler over one step of an engine: operations, time and parameters of each
module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfscale.engine.library import deepspeed


@contextmanager
def flops_profiled(module: Any, ds: Any, *, step: int, file: Path) -> Iterator[None]:
    """Count what ``module`` computes inside, for the engine ``ds``, and write it to ``file``."""
    profiler = deepspeed.profiling.flops_profiler.FlopsProfiler(module, ds)
    profiler.start_profile()
    try:
        yield
        profiler.stop_profile()
        profiler.print_model_profile(profile_step=step, output_file=str(file))
    finally:
        profiler.end_profile()
