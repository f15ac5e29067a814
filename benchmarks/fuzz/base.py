"""What is damaged: a small run, its shards, its export, its scores, tables and a tar."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import yaml

from hfscale.monitor.incidents import GRADIENT, LOSS, Incident
from hfscale.monitor.lines import Lines
from hfscale.run_files import INCIDENTS
from tests.helpers.cli import hfscale
from tests.helpers.corpus import make_corpus, run_values

# of what `hfscale doctor --json` prints
DOCTOR = {
    "nodes": ["n1"],
    "findings": [
        {"check": "GPU", "said": "torch sees none", "value": None, "unit": ""},
        {"check": "writing", "said": "", "value": 300.0, "unit": "MB/s a node"},
        {"check": "memory speed", "said": "", "value": 9.0, "unit": "GB/s a rank"},
        {"check": "matrix products", "said": "", "value": 0.2, "unit": "TFLOP/s a rank, fp32"},
    ],
}


def make_base(home: Path) -> Path:
    """Return a folder with shards, raw tars, tables, a run of four steps, its export and its
    scores.
    """
    base = make_corpus(home / "base")
    add_files(base)
    hfscale("pretrain", "run.yaml", "--procs", 1, cwd=base)
    add_incidents(base / "runs" / "r")
    hfscale("export", "runs/r", "export", cwd=base)
    hfscale("evaluate", "runs/r", cwd=base)
    hfscale("plan", "runs/r", "--check", cwd=base)
    (base / "runs" / "r" / "doctor.json").write_text(json.dumps(DOCTOR))
    return base


def add_incidents(run: Path) -> None:
    """Have two steps of a run be out of the ordinary, one of which was gone back from."""
    lines = Lines(run / INCIDENTS, fence=None)
    spike = Incident(step=2, kind=GRADIENT, decision="warn", text="grad_norm 9", rows=(4, 8))
    rewound = Incident(
        step=4,
        kind=LOSS,
        decision="rewind",
        text="loss 9",
        scores={"loss": 9.0},
        rows=(12, 16),
        back_to=2,
        left_out=((12, 13),),
    )
    for incident in (spike, rewound):
        lines.append(incident.stamped(1).model_dump(mode="json"))
    lines.close()


def add_files(base: Path) -> None:
    """Put a config of a run, tables and a tar of raw text beside a corpus."""
    values = run_values(base, base / "runs", "r")
    values["checkpoint"] = {"every_steps": 2, "keep_last": 2}
    values["train"] = {"steps": 4, "global_batch": 4, "micro_batch": 4}
    values["engine"] = {"precision": "fp32", "zero_stage": 1}
    values["data"]["validation"] = {
        "shards": str(base / "shards" / "validation"),
        "every_steps": 2,
        "rows": 4,
    }
    (base / "run.yaml").write_text(yaml.safe_dump(values))
    rows = [
        {
            "id": str(n),
            "prompt": f"def f{n}",
            "text": f"x = {n}",
            "label": f"l{n % 2}",
            "prediction": f"l{n % 2}",
        }
        for n in range(4)
    ]
    (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base / "rows.csv").write_text("id,prompt\n" + "".join(f"{n},def f{n}\n" for n in range(4)))
    with tarfile.open(base / "raw.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for n in range(4):
            for name, data in ((f"{n}.txt", b"text %d" % n), (f"{n}.json", b'{"prompt": "a"}')):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
