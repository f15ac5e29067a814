"""How fast raw-text tars become batches, against `tokenizers` alone in as many processes on the
same text.

    python -m benchmarks.stream_text [--mb 64] [--turns 5] [--folder FOLDER]

The text is the Python source found on the machine, in tars of 16 MB that stock `webdataset` wrote,
once as `.txt` and once as `.json`. "tokenizers alone": n processes, each with its share of the
texts in memory, call encode_batch_fast and throw the result away; their start is not counted.
"Stream": one rank with n tokenizing processes, for as many tokens in batches of 256 x 1024 ids,
after 20 steps in which it gets ahead; checksums, JSON, packing, hand-over and the reader's own work
count, and all must fit on the cores there are. "First batch" is from nothing but a config:
manifest, processes that start, tokenizer, one step. About five minutes on 4 cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import interleaved, machine, ratio, record, spread, table, verdict

BATCH, SEQ, WARM_STEPS = 256, 1024, 20
FIELDS = {"txt": "txt", "json": "json.text"}
_peer: Any  # of a process of the peer: tokenizer and texts


def make_tars(folder: Path, texts: list[str]) -> None:
    """Return with an indexed folder of tars for each of FIELDS."""
    import webdataset

    from hfscale.shards.raw import index_tars

    for kind, field in FIELDS.items():
        (folder / kind).mkdir()
        with webdataset.ShardWriter(
            str(folder / kind / "raw-%06d.tar"), maxsize=16e6, verbose=0
        ) as tars:
            for k, text in enumerate(texts):
                content = text if kind == "txt" else {"url": "none", "text": text}
                tars.write({"__key__": f"{k:08}", kind: content})
        index_tars(
            sorted((folder / kind).glob("*.tar")), folder=folder / kind, field=field, threads=4
        )


def start_peer(tokenizer_json: str, shares: Any) -> None:
    """Make this process ready: tokenizer and texts in memory."""
    global _peer
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    share = shares.get()
    _peer = (
        Tokenizer.from_str(tokenizer_json),
        [share[k : k + 64] for k in range(0, len(share), 64)],
    )


def run_peer(barrier_s: float) -> tuple[int, float, float]:
    """Return tokens of this process's share of the texts, and when it began and ended."""
    tokenizer, batches = _peer
    time.sleep(max(0.0, barrier_s - time.time()))
    began = time.time()
    tokens = sum(
        len(encoding.ids)
        for batch in batches
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    )
    return tokens, began, time.time()


def alone(tokenizer_json: str, texts: list[str], procs: int) -> Callable[[], float]:
    """Return a measurement of M tokens/s of ``procs`` processes that only tokenize."""

    def measure() -> float:
        context = multiprocessing.get_context("spawn")
        shares = context.Queue()
        for k in range(procs):
            shares.put(texts[k::procs])
        with context.Pool(procs, start_peer, (tokenizer_json, shares)) as pool:
            pool.map(time.sleep, [1.0] * procs, chunksize=1)  # all have their texts
            done = pool.map(run_peer, [time.time() + 0.5] * procs, chunksize=1)
        seconds = max(end for *_, end in done) - min(began for _, began, _ in done)
        return sum(tokens for tokens, _, _ in done) / seconds / 1e6

    return measure


def open_stream(folder: Path, kind: str, tokenizer: Any, procs: int, state: Any = None) -> Any:
    """Return a stream of one rank over the tars of a kind."""
    from hfscale.checkpoint.state import CheckpointState
    from hfscale.config.schema import RunConfig
    from hfscale.dist.world import Place
    from hfscale.stream.loader import Stream
    from hfscale.stream.rows import TokenRows
    from hfscale.stream.sources import open_mixture
    from hfscale.stream.text import TextRows, open_encoders

    config = RunConfig.model_validate(
        {
            "run": {"name": "x"},
            "tokenizer": {"path": str(folder / "tokenizer")},
            "model": {"architecture": "gpt2"},
            "objective": {"name": "clm"},
            "train": {"steps": 10**6, "global_batch": BATCH, "micro_batch": 32},
            "data": {
                "seq_len": SEQ,
                "sources": [{"shards": str(folder / kind)}],
                "tokenize_procs": procs,
            },
        }
    )
    saved = CheckpointState(step=0, stream=state) if state else None
    rows, order = open_mixture(config, [TokenRows(folder / kind, seq_len=SEQ)], saved=saved)
    position = saved.position if saved else None
    rows = TextRows(
        rows, order, open_encoders(config, tokenizer), global_batch=BATCH, state=position
    )
    return Stream(rows, order, global_batch=BATCH, micro_batch=32, place=Place(), state=position)


class Ours:
    """A stream over tars, measured for as many tokens as the peer makes of their texts."""

    def __init__(self, folder: Path, tokenizer: Any, texts: list[str], *, cores: int) -> None:
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        self.tokens = sum(len(encoding.ids) for encoding in encodings)
        self.firsts_s: list[float] = []  # from a config to the first batch
        self.memory_mib: list[float] = []  # of a tokenizing process
        self._folder, self._tokenizer, self._cores = folder, tokenizer, cores

    def speed(self, kind: str, procs: int) -> float:
        """Return M tokens/s, and note the rest."""
        began = time.perf_counter()
        stream = open_stream(self._folder, kind, self._tokenizer, procs)
        stream.take()
        self.firsts_s.append(time.perf_counter() - began)
        for _ in range(WARM_STEPS):
            stream.advance()
            stream.take()
        steps, began = self.tokens // (BATCH * SEQ), time.perf_counter()
        for _ in range(steps):
            stream.advance()
            stream.take()
        speed = steps * BATCH * SEQ / (time.perf_counter() - began) / 1e6
        self.memory_mib.append(mib_of_a_child())
        stream.close()
        return speed

    def resume_s(self, epochs: float) -> float:
        """Return the seconds from a state at so many epochs to the first batch."""
        stream = open_stream(self._folder, "txt", self._tokenizer, self._cores)
        while stream.epochs()["epoch"] < epochs:
            stream.take()
            stream.advance()
        state = json.loads(json.dumps(stream.state().to_dict()))
        stream.close()
        time.sleep(1)
        began = time.perf_counter()
        stream = open_stream(self._folder, "txt", self._tokenizer, self._cores, state)
        stream.take()
        seconds = time.perf_counter() - began
        stream.close()
        return seconds


def mib_of_a_child() -> float:
    """Return the memory of a process that this one started, on average."""
    import psutil

    children = psutil.Process().children(recursive=True)
    return sum(child.memory_info().rss for child in children) / max(1, len(children)) / 2**20


def make_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of ``folder/tokenizer``, trained on ``folder/text``."""
    from hfscale.config.corpus import CorpusConfig
    from hfscale.corpus.tokenizer_training import train_tokenizer
    from hfscale.tokenizer import load_tokenizer

    config = CorpusConfig.model_validate(
        {
            "source": {"path": str(folder / "text")},
            "shards": {"path": str(folder / "none")},
            "tokenizer": {
                "path": str(folder / "tokenizer"),
                "vocab_size": 32768,
                "max_documents": 1500,
            },
        }
    )
    train_tokenizer(config)
    return load_tokenizer(folder / "tokenizer")


def main() -> None:
    """Measure, print, and write the section ``stream_text`` of RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=float, default=64)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    # not at the top: every tokenizing process imports this module
    from benchmarks.shards_build import make_text

    about, cores = machine("tokenizers", "webdataset"), len(os.sched_getaffinity(0))
    counts = sorted({max(1, cores // 2), cores})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = make_text(folder / "text", int(options.mb * 1e6))
        tokenizer = make_tokenizer(folder)
        make_tars(folder, texts)
        tokenizer_json = tokenizer.backend_tokenizer.to_str()
        ours = Ours(folder, tokenizer, texts, cores=cores)
        candidates: dict[str, Callable[[], float]] = {}
        for procs in counts:
            candidates[f"alone {procs}"] = alone(tokenizer_json, texts, procs)
            for kind in FIELDS:
                candidates[f"{kind} {procs}"] = partial(ours.speed, kind, procs)
        speeds = interleaved(candidates, repeats=options.turns, warm=1)
        places = {f"{place:g}": partial(ours.resume_s, place) for place in (0.1, 0.9)}
        resumes_s = interleaved(places, repeats=3)
    paragraphs = [
        f"{about} {ours.tokens / 1e6:.0f} M tokens of Python source a turn. M tokens/s, "
        f"median (quartiles) of {options.turns} turns.",
        beside_the_peer(speeds, counts),
        to_the_first_batch(ours, resumes_s),
    ]
    record("stream_text", "\n\n".join(paragraphs))


def beside_the_peer(speeds: dict[str, list[float]], counts: list[int]) -> str:
    """Return the table of speeds, for each of ``counts`` of processes, and their ratio to that of
    tokenizers alone.
    """
    lines = []
    for procs in counts:
        peer = speeds[f"alone {procs}"]
        lines.append([procs, "tokenizers alone", spread(peer, form="{:.2f}"), "1", ""])
        for kind in FIELDS:
            reached = ratio(speeds[f"{kind} {procs}"], peer)
            lines.append(
                [
                    procs,
                    f"Stream, .{FIELDS[kind]}",
                    spread(speeds[f"{kind} {procs}"], form="{:.2f}"),
                    f"{reached:.2f}",
                    verdict(reached, at_least=0.8),
                ]
            )
    return table(["processes", "", "M tokens/s", "ratio", "target"], lines)


def to_the_first_batch(ours: Ours, resumes_s: dict[str, list[float]]) -> str:
    """Return how long it takes, from a config and from a state, and what the processes hold."""
    resumes = ", ".join(
        f"{median(seconds):.2f} s at {place} epochs" for place, seconds in resumes_s.items()
    )
    return (
        f"From a config to the first batch of {BATCH} x {SEQ}: "
        f"{spread(ours.firsts_s, form='{:.2f}')} s; from a checkpoint's state {resumes}"
        f". A tokenizing process holds {median(ours.memory_mib):.0f} MiB."
    )


if __name__ == "__main__":
    main()
