"""How much memory do an export and a start from other weights need? Peaks over what the imports
take, as shares of the model.

A GPT-2 of two sizes is trained for one step at ZeRO 3 on two ranks, exported, and the larger one
loaded by a new run. Anonymous memory is what the process must have; mapped pages of files, which
the kernel takes back when it needs them, are counted apart.

    python -m benchmarks.export_memory        # 2 minutes; 4 GB in the temporary folder
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks.common import machine, record, table, verdict
from tests.helpers.cli import hfscale
from tests.helpers.corpus import make_corpus, run_values

CASES = [("bf16", 512), ("bf16", 1024), ("fp32", 1024)]  # precision, width
BYTES = {"fp32": 4, "bf16": 2}
MOST_MIB = 64  # of its own, whatever the size


class Peak:
    """The largest anonymous and file-backed memory of this process inside a with-block, in bytes
    over that at its start.
    """

    def __enter__(self) -> Peak:
        gc.collect()
        self.anonymous = self.files = 0
        self._begin, self._over = self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            anonymous, files = self._now()
            self.anonymous = max(self.anonymous, anonymous - self._begin[0])
            self.files = max(self.files, files - self._begin[1])
            time.sleep(0.002)

    @staticmethod
    def _now() -> tuple[int, int]:
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        return int(status["RssAnon"].split()[0]) * 1024, int(status["RssFile"].split()[0]) * 1024


def export_phases(run: str, out: str) -> dict[str, tuple[int, int]]:
    """Return phase -> (anonymous, mapped) peak bytes of an export to ``out``. In a process of its
    own.
    """
    import deepspeed  # noqa: F401  (an import is not the export's memory)

    from hfscale.checkpoint.export import write_weights
    from hfscale.jobs import export
    from hfscale.run.model import RunModel, find

    phases, folder = {}, Path(out)
    folder.mkdir()

    def phase(name: str, work: Callable[[], object]) -> None:
        with Peak() as peak:
            work()
        phases[name] = (peak.anonymous, peak.files)

    source = find(run)
    assert isinstance(source, RunModel)
    shapes = source.skeleton
    phase("writing", lambda: write_weights(source.weights, shapes, folder))
    shapes.config.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    phase(
        "the gate (transformers loads it)",
        lambda: export.prove(
            folder,
            source.trained,
            skeleton=shapes,
            checkpoint=source.checkpoint,
            config=source.run,
        ),
    )
    return phases


def load_peak(values: dict, stage: int) -> dict[str, float]:
    """Return this rank's peak bytes of the loading alone, from ``model.pretrained`` into an engine
    that is there, and what it holds.
    """
    import torch

    from hfscale.checkpoint.pretrained import load_pretrained
    from hfscale.checkpoint.weights import open_weights
    from hfscale.config.schema import RunConfig
    from hfscale.engine.engine import Engine
    from hfscale.run.live import model_of
    from hfscale.run.run import Run

    config = RunConfig.model_validate(
        {**values, "engine": {"zero_stage": stage, "precision": "bf16"}}
    )
    folder = Path(str(config.model.pretrained))
    device = torch.device("cpu")
    engine = Engine.create(model_of(Run(config), device), config=config, device=device)
    engine.fragments(owned=False)  # makes the moments, which the first step would
    largest = (
        max(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters())
        * 4
    )
    with Peak() as peak:
        load_pretrained(engine, open_weights(folder))
    engine.close()
    return {"anonymous": peak.anonymous, "files": peak.files, "largest": largest}


def bytes_of(model: Path) -> int:
    """Return the size of the weights of an exported model."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


PHASES = (
    "import json, sys; from benchmarks.export_memory import export_phases; "
    "print(json.dumps(export_phases(*sys.argv[1:])))"
)
ONE_STEP = {"steps": 1, "global_batch": 2, "micro_batch": 1}


def export_rows(corpus: Path, folder: Path, *, precision: str, width: int) -> list[list[str]]:
    """Return the peaks of an export, a row for each phase.

    The model is trained for a step and lies in ``folder``, as its export does afterwards.
    """
    name, size = f"{precision}-{width}", BYTES[precision]
    model = {
        "architecture": "gpt2",
        "config": {"n_layer": 12, "n_embd": width, "n_head": 16, "n_positions": 64},
    }
    engine = {"zero_stage": 3, "precision": precision}
    values = run_values(corpus, folder, name, model=model, engine=engine, train=ONE_STEP)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    hfscale("pretrain", folder / "run.yaml", "--procs", 2)
    out = folder / f"out-{name}"
    command = [sys.executable, "-c", PHASES, str(folder / name), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole, rows = bytes_of(out), []
    about = f"{precision} ({whole / size / 1e6:.0f}M parameters, {whole / 2**20:.0f} MiB)"
    for phase, (anonymous, files) in json.loads(done.stdout.splitlines()[-1]).items():
        shares = [anonymous / whole, files / whole, (anonymous + files) / whole]
        rows.append(
            [about, phase, f"{anonymous / 2**20:.0f}", *(f"{share:.2f}" for share in shares)]
        )
    return rows


def start_rows(corpus: Path, folder: Path) -> list[list[str]]:
    """Return the peaks of a start from the export in fp32, a row for each ZeRO stage."""
    from benchmarks import export_memory
    from tests.helpers.ranks import run_ranks

    model = folder / "out-fp32-1024"
    source = {"pretrained": str(model), "architecture": None, "config": {}}
    values = run_values(corpus, folder, "second", model=source, train=ONE_STEP)
    whole, rows = bytes_of(model), []
    for stage in (1, 3):
        ranks = run_ranks(export_memory.load_peak, 2, values, stage, fresh=True)
        most, largest = max(rank["anonymous"] for rank in ranks), ranks[0]["largest"]
        rows.append(
            [
                f"ZeRO {stage}, 2 ranks",
                f"{most / 2**20:.0f}",
                f"{most / whole:.3f}",
                f"{largest / 2**20:.0f}",
            ]
        )
    return rows


def main() -> None:
    """Measure and record."""
    about = machine("torch", "transformers", "safetensors")
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        corpus, rows = make_corpus(folder / "corpus"), list[list[str]]()
        for precision, width in CASES:
            rows += export_rows(corpus, folder, precision=precision, width=width)
        starts = start_rows(corpus, folder)
    worst = max(float(row[2]) for row in rows)
    record(
        "export_memory",
        f"""{about}

An export: its peaks over what is there before, as shares of the exported weights. While writing,
pages of the checkpoint (fp32) are mapped, in the gate pages of the export (and of libraries): the
system takes them back where memory is short.

{table(["precision", "phase", "anonymous, MiB", "anonymous", "mapped", "both, at most"], rows)}

Anonymous memory in MiB, at any size and in both phases: {worst:.0f},
{verdict(worst, at_most=MOST_MIB)}.

A start from other weights (fp32 into bf16): what the loading adds to a rank's anonymous memory. At
ZeRO 1 that is DeepSpeed's own gathering of the 16-bit weights, as at the end of each step.

{table(["", "MiB", "of the fp32 model", "largest parameter, MiB"], starts)}""",
    )


if __name__ == "__main__":
    main()
