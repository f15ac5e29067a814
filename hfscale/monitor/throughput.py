"""How fast a run goes: seconds a step, of which waiting for data, tokens a second, and model FLOPs
utilisation.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Throughput:
    """Averages over the steps since the last ``report``; what happens between steps (validation,
    logging) is not counted.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``peak_flops`` is that of all ranks together, per second; None (CPU) gives an ``mfu`` of
        None.
        """
        self.flops_per_token, self._peak, self._clock = flops_per_token, peak_flops, clock
        self._steps, self._tokens, self._step_s, self._wait_s = 0, 0, 0.0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one optimizer step."""
        start = self._clock()
        yield
        self._step_s += self._clock() - start
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the part of a step that waits for data."""
        start = self._clock()
        yield
        self._wait_s += self._clock() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave out of the time of the step under way what is done inside."""
        start = self._clock()
        yield
        self._step_s -= self._clock() - start

    def count(self, tokens: int) -> None:
        """Add the tokens of all ranks in the step under way."""
        self._tokens += tokens

    def report(self) -> dict[str, float | None]:
        """Return the averages since the last report, and start anew."""
        steps, step_s = max(self._steps, 1), max(self._step_s, 1e-9)
        tokens_per_s = self._tokens / step_s
        figures = {
            "step_s": step_s / steps,
            "data_wait_s": self._wait_s / steps,
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * self.flops_per_token / self._peak if self._peak else None,
        }
        self._steps, self._tokens, self._step_s, self._wait_s = 0, 0, 0.0, 0.0
        return figures


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this rank has held: allocated on its GPU, or resident on the
    CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux gives KiB


def memory_now_gib(device: torch.device) -> tuple[float, float, float]:
    """Return what this rank holds: tensors on its GPU, what torch keeps of that GPU (0 on the CPU),
    and memory of its machine.
    """
    on_gpu = device.type == "cuda"
    allocated = torch.cuda.memory_allocated(device) if on_gpu else 0
    reserved = torch.cuda.memory_reserved(device) if on_gpu else 0
    with open("/proc/self/statm", "rb") as file:
        host = int(file.read().split()[1]) * resource.getpagesize()
    return allocated / 2**30, reserved / 2**30, host / 2**30
