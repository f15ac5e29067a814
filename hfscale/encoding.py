"""Texts to token ids in processes of their own, for builds of shards and for runs on raw text.

The processes end with the one that started them, however that ends, and are deaf to the signals
that ask it to stop: it still needs them for the step under way. What comes out does not depend on
how many there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from hfscale.control_tokens import ControlTokens
from hfscale.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

BATCH_BYTES = 1 << 19  # of text that a process takes at once
VERSION = 2  # of what text becomes: until 1, text that spelled a control token became one
AHEAD = 4  # batches a process that may wait: bounds the memory
# to Ctrl-C, a launcher, Slurm: they mean our parent, and reach us too
DEAF = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
)


class Document(Protocol):
    """A text, and how many bytes it has."""

    @property
    def text(self) -> str: ...
    @property
    def size(self) -> int: ...


Encode = Callable[[list[str]], list[np.ndarray]]
D = TypeVar("D", bound=Document)
R = TypeVar("R")
_encode: Encode  # of a worker process


def encoder(tokenizer_json: str, *, eod_id: int, dtype: str, forged: bool = False) -> Encode:
    """Return a function from texts to ids, each text's ids followed by ``eod_id``; one thread,
    nothing else added.

    Text that spells a control token stays text, unless it may be ``forged`` as it was before: runs
    on raw text that began then go on so.
    """
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # our processes are the parallelism
    from tokenizers import Tokenizer

    tokenizer: Tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = not forged
    control = None if forged else ControlTokens(tokenizer)

    def ids_of(encoding: Encoding) -> np.ndarray:
        numbers = array("I", [*encoding.ids, eod_id])  # 5 ns an id; numpy takes 25 for a list
        return np.frombuffer(numbers, np.uint32).astype(dtype)

    def encode(texts: list[str]) -> list[np.ndarray]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [ids_of(encoding) for encoding in encodings]
        for number, text in enumerate(texts) if control else ():
            if control and control.within(ids[number][:-1], text):
                with control.kept_out(tokenizer):
                    ids[number] = ids_of(tokenizer.encode(text, add_special_tokens=False))
                if token := control.within(ids[number][:-1], ""):
                    raise DataError(
                        "this tokenizer makes a control token of text that spells it",
                        where=f"a document of {len(text):,} characters",
                        value=token,
                        remedy="take the documents that hold it out, or use another tokenizer",
                    )
        return ids

    return encode


class Encoders:
    """``procs`` processes that have loaded the tokenizer. ``setting`` is the config key that says
    how many, for an error's remedy.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        eod_id: int,
        dtype: str,
        procs: int,
        setting: str,
        forged: bool = False,
    ) -> None:
        self.procs, self._setting = procs, setting
        if "PYTHONWARNINGS" not in os.environ:
            # that semaphores are left: a rank that fails leaves at once
            os.putenv("PYTHONWARNINGS", "ignore:resource_tracker")
        # forking a process that has threads is not safe
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            procs,
            mp_context=context,
            initializer=_start_worker,
            initargs=(tokenizer_json, eod_id, dtype, forged),
        )

    def submit(self, task: Callable[..., R], *args: object) -> Callable[[], R]:
        """Return what waits for ``task(encode, *args)``, a function of a module that is quick to
        import, run in one of the processes.

        Raises:
            DataError: there or here, if a process was killed (as a rule, for want of memory).
        """
        waiting = self._unbroken(self._pool.submit, _work, task, *args)
        return lambda: self._unbroken(waiting.result)

    def close(self) -> None:
        """Return with the processes told to end; what they have not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _unbroken(self, call: Callable[..., R], *args: object) -> R:
        try:
            return call(*args)
        except BrokenProcessPool as error:
            # they have no public name
            processes = getattr(self._pool, "_processes", None) or {}
            for process in list(processes.values()):
                # else the pool would wait for them: it asks them to end with a signal that they do
                # not hear
                process.kill()
            raise DataError(
                "a tokenizing process was killed",
                remedy=f"most often memory ran out: set {self._setting} lower and run the "
                "same command again, it continues",
            ) from error


def encode_documents(
    documents: Iterable[D],
    tokenizer_json: str,
    *,
    eod_id: int,
    dtype: str,
    procs: int,
    setting: str,
) -> Iterator[tuple[D, np.ndarray]]:
    """Yield each document (it has a ``text``, and its ``size`` in bytes) with its ids,
    end-of-document id included, in their order.

    Raises:
        DataError: if a worker process is killed.
    """
    if procs == 1:
        encode = encoder(tokenizer_json, eod_id=eod_id, dtype=dtype)
        for batch in _batches(documents):
            yield from zip(batch, encode([document.text for document in batch]), strict=True)
        return
    encoders = Encoders(tokenizer_json, eod_id=eod_id, dtype=dtype, procs=procs, setting=setting)
    waiting: deque[tuple[list[D], Callable[[], list[np.ndarray]]]] = deque()
    try:
        for batch in _batches(documents):
            waiting.append(
                (batch, encoders.submit(_encode_texts, [document.text for document in batch]))
            )
            if len(waiting) >= procs * AHEAD:
                yield from _finish(*waiting.popleft())
        while waiting:
            yield from _finish(*waiting.popleft())
    finally:
        encoders.close()


def _finish(
    batch: list[D], encoded: Callable[[], list[np.ndarray]]
) -> Iterator[tuple[D, np.ndarray]]:
    return zip(batch, encoded(), strict=True)


def _batches(documents: Iterable[D]) -> Iterator[list[D]]:
    batch: list[D] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_texts(encode: Encode, texts: list[str]) -> list[np.ndarray]:
    return encode(texts)


def _work(task: Callable[..., R], *args: object) -> R:
    return task(_encode, *args)


def _start_worker(tokenizer_json: str, eod_id: int, dtype: str, forged: bool) -> None:
    global _encode
    for number in DEAF:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # a parent that was killed cannot tell us

    threading.Thread(target=follow, daemon=True).start()
    _encode = encoder(tokenizer_json, eod_id=eod_id, dtype=dtype, forged=forged)
