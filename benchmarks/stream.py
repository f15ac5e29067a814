"""How fast rows become batches, and how long a resume takes, against np.memmap and other libraries'
readers.

    # two minutes
    python -m benchmarks.stream [--peers-env FOLDER] [--tokens 1e8] [--turns 5] [--folder FOLDER]

The corpus is synthetic: random uint16 ids in documents of 600 tokens on average, as shards of 64 MB
with chunks of 2 MB and as one flat file; peers make what they need of it
(`benchmarks/peers/streams.py`). Each reader runs in a process of its own, and a turn asks one after
the other for two epochs as batches of 32 x 1024 int64: the first with files opened anew (and our
checksums), the next by the same reader. All files were read once after they were written, so that
the page cache holds them and holds them alike. ``--peers-env`` names the virtual environment of
MosaicML Streaming and litdata, which pin old versions of other packages; where it is not there it
is made with pip, on top of this one (half a minute and 0.8 GB). Without it they are left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from benchmarks.common import interleaved, machine, ratio, record, spread, table, verdict
from benchmarks.peers.streams import (
    BATCH,
    OWN_ENVIRONMENT,
    READERS,
    SEQ,
    TOKENS,
    Batches,
    Reader,
    serve,
    tokens_of,
)
from hfscale.dist.world import Place
from hfscale.shards.manifest import Manifest, ShardEntry, TokenizerInfo
from hfscale.shards.writer import ShardWriter
from hfscale.stream.loader import SLAB_TOKENS, Stream
from hfscale.stream.rows import TokenRows
from hfscale.stream.state import StreamState
from tests.helpers.orders import order_of

PLOT = Path(__file__).parents[1] / "docs" / "resume.png"
PLACES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.99)  # of a resume, in epochs
FLAT, MOSAICML = "np.memmap", "MosaicML Streaming"


def make_corpus(folder: Path, tokens: int) -> None:
    """Return with ``folder/shards`` and ``folder/flat.bin`` holding the same random tokens, and
    ``ends.npy`` their documents.
    """
    if not (folder / "shards" / "manifest.json").exists():
        rng, entries = np.random.default_rng(0), list[ShardEntry]()
        stream = rng.integers(1, 50_000, tokens, dtype=np.uint16)
        ends = np.cumsum(1 + rng.exponential(600, tokens // 300).astype(int))
        writer = ShardWriter(
            folder / "shards",
            name="bench",
            dtype=np.dtype("<u2"),
            chunk_tokens=2**20,
            shard_chunks=32,
            committed=entries.append,
        )
        for document in np.split(stream, ends[ends < tokens]):
            writer.add(document)
        writer.close()
        Manifest(
            dtype="uint16",
            tokenizer=TokenizerInfo("none", 50_000, 0),
            source={},
            shards=tuple(entries),
        ).save(folder / "shards")
        stream.tofile(folder / "flat.bin")
        np.save(folder / "ends.npy", ends[ends < tokens])
    for path in (
        folder / "flat.bin",
        *(folder / "shards").glob("*.tar"),
    ):  # what was written may lie in larger pages
        drop(path)
        path.read_bytes()


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --------------------------------------------------------------------------------------------- ours
def open_stream(
    folder: Path,
    *,
    lanes: Literal["auto"] | int,
    block: int,
    with_documents: bool = False,
    state: dict[str, Any] | None = None,
) -> Stream:
    """Return the whole path: manifest, order, reader thread."""
    rows = TokenRows(folder / "shards", seq_len=SEQ)
    order = order_of(rows.shard_rows, seed=1, lanes=lanes, block=block)
    return Stream(
        rows,
        order,
        global_batch=BATCH,
        micro_batch=BATCH,
        place=Place(),
        with_documents=with_documents,
        state=StreamState.from_dict(state) if state else None,
    )


def ours(folder: Path, state: Any, epochs: int, **options: Any) -> Batches:
    """Yield its batches for ever."""
    stream = open_stream(folder, state=state or None, **options)
    try:
        while True:
            [batch] = stream.take()
            assert (batch.boundaries is not None) == options.get("with_documents", False)
            yield batch.ids_BL  # type: ignore[misc]
            stream.advance()
    finally:
        stream.close()


def our_state(folder: Path, batch: int, **options: Any) -> Any:
    """Return what a checkpoint holds after so many batches."""
    stream = open_stream(folder, **options)
    state = {**stream.state().to_dict(), "consumed_rows": batch * BATCH}
    stream.close()
    return state


def our_reader(**options: Any) -> Reader:
    """Return our stream with these options."""
    return Reader(partial(ours, **options), partial(our_state, **options))


IN_ORDER, SHUFFLED = (
    "ours, in order, with documents' boundaries",
    "ours, shuffled, with documents' boundaries",
)
OURS = {
    IN_ORDER: our_reader(lanes=1, block=1, with_documents=True),
    "ours, in order": our_reader(lanes=1, block=1),
    SHUFFLED: our_reader(lanes="auto", block=1024, with_documents=True),
    "ours, shuffled": our_reader(lanes="auto", block=1024),
}


# ------------------------------------------------------------------------------------ the processes
def peers_environment(folder: Path) -> Path:
    """Return the interpreter of the environment at ``folder``, made with pip unless it is there:
    what it lacks, this one has.
    """
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        pinned = folder / "constraints.txt"
        pinned.write_text(f"torch=={importlib.metadata.version('torch').split('+')[0]}\n")
        packages = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(packages) / "below.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run(
            [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "-c",
                pinned,
                "mosaicml-streaming",
                "litdata",
            ],
            check=True,
        )
        (folder / "ready").touch()
    return python


class Process:
    """A reader in a process of its own, which waits while it is not asked."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, what: str | float) -> dict[str, Any]:
        """Return its answer to ``"epochs"``, or to the place of a resume."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"it ended: {self._process.args}")
        return json.loads(line)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


# ---------------------------------------------------------------------------- ours, taken to pieces
def pieces(folder: Path, turns: int) -> dict[str, list[float]]:
    """Return the seconds that an epoch in order takes to write as int64 alone, to copy prepared
    rows, and to prepare them.
    """
    rows = TokenRows(folder / "shards", seq_len=SEQ)
    order = order_of(rows.shard_rows, seed=1, lanes=1, block=1)
    step = SLAB_TOKENS // SEQ
    slab, flat = np.empty((step, SEQ + 1), np.int64), np.asarray(tokens_of(folder))
    windows = np.lib.stride_tricks.as_strided(flat, (order.rows, SEQ + 1), (2 * SEQ, 2))
    plans: list[Any] = []

    def write() -> None:
        for first in range(0, len(windows) - step + 1, step):
            slab[:] = windows[first : first + step]

    def prepare() -> None:
        plans.clear()
        for first in range(0, order.rows, 2**15):
            places = order.locate(np.arange(first, min(order.rows, first + 2**15)))
            n = len(places.row) // BATCH * BATCH
            plans.append(rows.prepare(places.shard[:n], places.row[:n], documents_per=BATCH))

    def copy() -> None:
        for plan in plans:
            for first, last in pairwise([*range(0, len(plan.valid), step), len(plan.valid)]):
                plan.fill(slice(first, last), slab[: last - first])

    def seconds(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return interleaved(
        {work.__name__: partial(seconds, work) for work in (write, prepare, copy)},
        repeats=turns,
        warm=1,
    )


def cold_waits(folder: Path, *, step_s: float, ahead: bool) -> tuple[float, float, float]:
    """Return the seconds to the first batch, all that training waits for data after it, and the
    longest wait; nothing is in the page cache.

    Without ``ahead`` there is no reader thread: rows are prepared where they are asked for.
    """
    for path in (folder / "shards").glob("*.tar"):
        drop(path)
    stream, waits = open_stream(folder, lanes=8, block=1024), []
    if not ahead:
        stream.close()
        stream._closed = False
        stream._reader = SimpleNamespace(
            submit=lambda work, *what: SimpleNamespace(result=partial(work, *what)),
            shutdown=stream.close,
        )
        stream._next = stream._reader.submit(stream._prepare, 0, 1)
        for path in (folder / "shards").glob("*.tar"):
            drop(path)
    for _ in range(1000):
        asked = time.perf_counter()
        stream.take()
        waits.append(time.perf_counter() - asked)
        time.sleep(step_s)
        stream.advance()
    if ahead:
        stream.close()
    return waits[0], sum(waits[1:]), max(waits[1:])


def order_alone(turns: int) -> str:
    """Return what the order costs where the data is a trillion tokens in 100,000 shards: to start,
    and a row.
    """
    starts, each = [], []
    shard_rows = np.full(100_000, 9766)
    for _ in range(turns):
        began = time.perf_counter()
        order = order_of(shard_rows, seed=1, lanes="auto", block=1024)
        order.locate(order.steps(order.rows // 2, count=1, global_batch=4096, place=Place())[0])
        starts.append(time.perf_counter() - began)
        began = time.perf_counter()
        order.locate(
            order.steps(order.rows // 3, count=32, global_batch=BATCH, place=Place()).ravel()
        )
        each.append((time.perf_counter() - began) / 1024)
    return (
        f"The order of 1e12 tokens in 100,000 shards: {median(starts) * 1e3:.0f} ms to "
        f"start at 50 %, {median(each) * 1e6:.2f} us a row."
    )


def plot(resumes: dict[str, list[dict[str, float]]]) -> None:
    """Write the picture of the seconds of a resume over its position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name, points in resumes.items():
        axes.plot(
            [point["tokens"] / 1e6 for point in points],
            [point["seconds"] * 1e3 for point in points],
            marker="o",
            markersize=3,
            label=name,
            **({"color": "black", "linewidth": 2.5} if name == SHUFFLED else {"linewidth": 1}),
        )  # type: ignore[arg-type]
    axes.set(
        yscale="log",
        xlabel="position, M tokens",
        ylabel="from a state to the first batch, ms",
        title="Resume",
    )
    figure.legend(loc="outside right center", fontsize=7, frameon=False)
    figure.savefig(PLOT, dpi=130)


def main() -> None:
    """Measure, print, write the section ``stream`` of RESULTS.md, and draw ``docs/resume.png``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=float, default=1e8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keeps the corpus for another run")
    parser.add_argument(
        "--peers-env",
        type=Path,
        help="where the environment of MosaicML Streaming and litdata is, or is to be",
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(OURS[arguments.serve], arguments.folder)
        return
    where = machine("numpy", "torch", "webdataset", "datasets")
    python = peers_environment(arguments.peers_env.absolute()) if arguments.peers_env else None
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_corpus(folder, int(arguments.tokens))
        script, here = str(Path(__file__).parent / "peers" / "streams.py"), Path(sys.executable)
        interpreters = {name: python if name in OWN_ENVIRONMENT else here for name in READERS}
        peers = {
            name: [str(interpreter), script, str(folder), name]
            for name, interpreter in interpreters.items()
            if interpreter
        }
        commands = {
            name: [
                sys.executable,
                "-m",
                "benchmarks.stream",
                "--folder",
                str(folder),
                "--serve",
                name,
            ]
            for name in OURS
        }
        commands = {FLAT: peers.pop(FLAT), **commands, **peers}
        readers = {
            name: stack.enter_context(Process(command)) for name, command in commands.items()
        }
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in readers}

        def epochs(name: str) -> float:
            answers[name].append(readers[name].ask("epochs"))
            return answers[name][-1]["speeds"][1]

        interleaved(
            {name: partial(epochs, name) for name in readers}, repeats=arguments.turns, warm=1
        )
        resumes: dict[str, list[dict[str, float]]] = {}
        for name in [name for name in readers if name not in OURS or name == SHUFFLED]:
            taken = [
                [readers[name].ask(place) for place in PLACES]
                for _ in range(10 if name == SHUFFLED else 4)
            ][1:]
            resumes[name] = [
                {key: median(answer[key] for answer in point) for key in point[0]}
                for point in zip(*taken, strict=True)
            ]
        far = median(readers[SHUFFLED].ask(1000.5)["seconds"] for _ in range(5))
        parts = {name: median(seconds) for name, seconds in pieces(folder, arguments.turns).items()}
        cold = {ahead: cold_waits(folder, step_s=0.003, ahead=ahead) for ahead in (True, False)}

    plot(resumes)
    first, later = (
        {name: [answer["speeds"][epoch] for answer in given[1:]] for name, given in answers.items()}
        for epoch in (0, 1)
    )
    lines = []
    for name in readers:
        reached, memory, form = (
            ratio(later[name], later[FLAT]),
            answers[name][-1]["memory"],
            "{:.0f}" if later[name][0] > 50 else "{:.1f}",
        )
        lines.append(
            [
                name,
                spread(first[name], form=form),
                f"{ratio(first[name], first[FLAT]):.3f}",
                spread(later[name], form=form),
                f"{reached:.3f}",
                verdict(reached, at_least=0.7) if name == IN_ORDER else "",
                f"{resumes[name][3]['seconds'] * 1e3:.1f}" if name in resumes else "",
                f"{memory[0]:.1f} - {memory[-1]:.1f}",
            ]
        )
    against = ""
    if MOSAICML in readers:
        times = {name: ratio(later[name], later[MOSAICML]) for name in (IN_ORDER, SHUFFLED)}
        against = (
            f"Against {MOSAICML}'s iterator: {times[IN_ORDER]:.0f} x in order, "
            f"{times[SHUFFLED]:.0f} x shuffled, "
            f"{verdict(times[SHUFFLED], at_least=20)}."
        )
    per_batch = {
        name: seconds / (arguments.tokens / TOKENS) * 1e6 for name, seconds in parts.items()
    }
    whole = TOKENS / median(later[IN_ORDER])
    grown = max(
        max(answer["memory"]) - min(answer["memory"])
        for name in OURS
        for answer in answers[name][1:]
    )
    flat_ms = [point["seconds"] * 1e3 for point in resumes[SHUFFLED]]
    record(
        "stream",
        "\n\n".join(
            filter(
                None,
                [
                    f"{where} {arguments.tokens:.3g} tokens (peers that need seconds for it: a "
                    f"tenth), batches of {BATCH} x {SEQ} int64, one process "
                    f"each. M tokens/s, median (quartiles) of {arguments.turns} turns; ratios "
                    "to np.memmap in the same turn. First: with files "
                    "opened anew, and our checksums. Later: the next epoch of the same reader. "
                    "Resume: from a state at 50 % to the first batch.",
                    table(
                        [
                            "reader",
                            "first",
                            "ratio",
                            "later",
                            "ratio",
                            "target (later)",
                            "resume, ms",
                            "anonymous MiB through an epoch",
                        ],
                        lines,
                    ),
                    against,
                    "Resume of ours, checksums of what the first batch touches included: "
                    + ", ".join(
                        f"{ms:.1f} ms at {place:g}"
                        for place, ms in zip(PLACES, flat_ms, strict=True)
                    )
                    + f" and {far * 1e3:.1f} ms at 1000.5 epochs; longest over shortest "
                    f"{max(flat_ms) / min(flat_ms):.2f}. All: docs/resume.png.",
                    "Anonymous memory of our reader (RssAnon; mapped pages of the shards are "
                    f"not in it) grows by at most {grown:.2f} MiB "
                    "through an epoch.",
                    f"A batch in order with boundaries takes {whole:.1f} us: "
                    f"{per_batch['write']:.1f} us to read uint16 and write int64 (a bare loop "
                    f"of slices; {per_batch['write'] / whole:.0%}), "
                    f"{per_batch['copy'] - per_batch['write']:.1f} us more to copy prepared "
                    "rows out "
                    f"of tars, {whole - per_batch['copy']:.1f} us for take(), advance(), views "
                    "and what the reader thread, which prepares beside it "
                    f"({per_batch['prepare']:.1f} us a batch), takes of the interpreter and of "
                    "the memory.",
                    "Out of the page cache, in 8 lanes, steps of 3 ms: the first batch after "
                    f"{cold[True][0] * 1e3:.0f} ms; in the 999 steps after it "
                    f"training waits {cold[True][1] * 1e3:.0f} ms in all and "
                    f"{cold[True][2] * 1e3:.0f} ms at most, without the reader thread "
                    f"{cold[False][1] * 1e3:.0f} ms and {cold[False][2] * 1e3:.0f} ms.",
                    order_alone(arguments.turns),
                ],
            )
        ),
    )


if __name__ == "__main__":
    main()
