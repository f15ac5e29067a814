"""Documents to token ids in several processes, in order: what comes out does not depend on how many there are."""
from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

import numpy as np

from hfscale.corpus.split import Document
from hfscale.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH_BYTES = 1 << 19  # of text that a process takes at once
AHEAD = 4  # batches a process that may wait: bounds the memory

_encode: Callable[[list[str]], list[np.ndarray]]  # of a worker process


def encoder(tokenizer_json: str, *, eod_id: int, dtype: str) -> Callable[[list[str]], list[np.ndarray]]:
    """Return a function from texts to ids, each text's ids followed by ``eod_id``; one thread, nothing else added."""
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # our processes are the parallelism
    from tokenizers import Tokenizer

    tokenizer: Tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def encode(texts: list[str]) -> list[np.ndarray]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, eod_id], dtype) for encoding in encodings]

    return encode


def encode_documents(documents: Iterable[Document], tokenizer_json: str, *, eod_id: int, dtype: str,
                     procs: int) -> Iterator[tuple[Document, np.ndarray]]:
    """Yield each document with its ids, end-of-document id included, in the order of ``documents``.

    Raises:
        DataError: if a worker process is killed (as a rule, for want of memory).
    """
    if procs == 1:
        encode = encoder(tokenizer_json, eod_id=eod_id, dtype=dtype)
        for batch in _batches(documents):
            yield from zip(batch, encode([document.text for document in batch]), strict=True)
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has threads is not safe
    pool = ProcessPoolExecutor(procs, mp_context=context, initializer=_start_worker, initargs=(tokenizer_json, eod_id, dtype))
    waiting: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
    try:
        for batch in _batches(documents):
            waiting.append((batch, pool.submit(_work, [document.text for document in batch])))
            if len(waiting) >= procs * AHEAD:
                yield from _finish(*waiting.popleft())
        while waiting:
            yield from _finish(*waiting.popleft())
    except BrokenProcessPool as error:
        raise DataError("a tokenizing process was killed", remedy="most often memory ran out: set shards.procs lower and run the same "
                        "command again, it continues") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _finish(batch: list[Document], future: Future[list[np.ndarray]]) -> Iterator[tuple[Document, np.ndarray]]:
    return zip(batch, future.result(), strict=True)


def _work(texts: list[str]) -> list[np.ndarray]:
    return _encode(texts)


def _start_worker(tokenizer_json: str, eod_id: int, dtype: str) -> None:
    global _encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # a parent that was killed cannot tell us

    threading.Thread(target=follow, daemon=True).start()
    _encode = encoder(tokenizer_json, eod_id=eod_id, dtype=dtype)
