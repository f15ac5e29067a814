"""A progress bar in bytes of text, silent where there is no terminal."""
from __future__ import annotations

from types import TracebackType


class Progress:
    """A bar on standard error; ``total_bytes`` 0 means unknown."""

    def __init__(self, title: str, total_bytes: int) -> None:
        from tqdm import tqdm

        self._tokens = 0
        self._bar = tqdm(total=total_bytes or None, desc=title, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)

    def advance(self, size: int, *, tokens: int = 0) -> None:
        """Return with ``size`` bytes of text, which gave ``tokens``, counted."""
        self._tokens += tokens
        if tokens and not self._bar.disable:
            self._bar.set_postfix_str(f"{self._tokens / 1e6:.1f} M tokens", refresh=False)
        self._bar.update(size)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
