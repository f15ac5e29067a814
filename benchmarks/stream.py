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
import subprocess
import sys
import sysconfig
import tempfile
import venv
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import interleaved, machine, record
from benchmarks.peers.streams import OWN_ENVIRONMENT, READERS, serve
from benchmarks.stream_ours import OURS, SHUFFLED, cold_waits, make_corpus, order_alone, pieces
from benchmarks.stream_report import FLAT, PLACES, Found, plot, report


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


def commands_of(folder: Path, peers_python: Path | None) -> dict[str, list[str]]:
    """Return how each reader is started: the peer that all are compared to, ours, the others."""
    script = str(Path(__file__).parent / "peers" / "streams.py")
    peers: dict[str, list[str]] = {}
    for name in READERS:
        python = peers_python if name in OWN_ENVIRONMENT else Path(sys.executable)
        if python is not None:
            peers[name] = [str(python), script, str(folder), name]
    itself = [sys.executable, "-m", "benchmarks.stream", "--folder", str(folder), "--serve"]
    return {FLAT: peers.pop(FLAT), **{name: [*itself, name] for name in OURS}, **peers}


def measure(folder: Path, readers: dict[str, Process], *, turns: int) -> Found:
    """Return what the readers answered, and what ours costs without a process of its own."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in readers}

    def epochs(name: str) -> float:
        answers[name].append(readers[name].ask("epochs"))
        return answers[name][-1]["speeds"][1]

    interleaved({name: partial(epochs, name) for name in readers}, repeats=turns, warm=1)
    resumes: dict[str, list[dict[str, float]]] = {}
    for name, reader in readers.items():
        if name not in OURS:
            resumes[name] = resume(reader, times=4)
        elif name == SHUFFLED:
            resumes[name] = resume(reader, times=10)
    far_s = median(readers[SHUFFLED].ask(1000.5)["seconds"] for _ in range(5))
    parts_s = {name: median(seconds) for name, seconds in pieces(folder, turns).items()}
    cold_s = {ahead: cold_waits(folder, step_s=0.003, ahead=ahead) for ahead in (True, False)}
    return Found(answers, resumes, far_s, parts_s, cold_s)


def resume(reader: Process, *, times: int) -> list[dict[str, float]]:
    """Return the medians of its resumes at each place, without the first time."""
    taken = [[reader.ask(place) for place in PLACES] for _ in range(times)]
    medians = []
    for point in zip(*taken[1:], strict=True):
        medians.append({key: median(answer[key] for answer in point) for key in point[0]})
    return medians


def options() -> argparse.Namespace:
    """Return what the command line asks for."""
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
    return parser.parse_args()


def main() -> None:
    """Measure, print, write the section ``stream`` of RESULTS.md, and draw ``docs/resume.png``."""
    asked = options()
    if asked.serve:
        serve(OURS[asked.serve], asked.folder)
        return
    where = machine("numpy", "torch", "webdataset", "datasets")
    python = peers_environment(asked.peers_env.absolute()) if asked.peers_env else None
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_corpus(folder, int(asked.tokens))
        readers = {
            name: stack.enter_context(Process(command))
            for name, command in commands_of(folder, python).items()
        }
        found = measure(folder, readers, turns=asked.turns)
    plot(found.resumes)
    body = report(
        found,
        where=where,
        tokens=asked.tokens,
        turns=asked.turns,
        order=order_alone(asked.turns),
    )
    record("stream", body)


if __name__ == "__main__":
    main()
