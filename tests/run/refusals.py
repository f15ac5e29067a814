"""Bad requests of every kind, asked one after another in this process: what is said to each, and
which slow libraries that took.

    python -m tests.run.refusals FOLDER < requests (one a line) > answers (JSON)
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from hfscale.log import logger
from launch.cli import main

SHORT = {"steps": 1, "global_batch": 4, "micro_batch": 4}
MANIFESTS: dict[str, dict[str, Any]] = {  # what is wrong with them
    "empty": {"shards": []},
    "wide": {"dtype": "uint32"},
    "other": {"tokenizer": {"digest": "f" * 64, "vocab_size": 512, "eod_id": 0}},
    "ends": {"tokenizer": {"digest": "f" * 64, "vocab_size": 512, "eod_id": 9}},
    "none": {"tokenizer": None},
    "newer": {"version": 7},
    "gone": {},
    "broken": {},
    "large": {},
}


def prepare(corpus: Path, folder: Path) -> None:
    """Fill ``folder`` with configs, and with data and models that no run can take."""
    from hfscale.shards.raw import index_tars
    from tests.helpers.corpus import run_values
    from tests.helpers.labelled import make_encoder, reviews, task_values, write_jsonl
    from tests.shards.test_verify import write_tar

    train, held_out = corpus / "shards" / "train", corpus / "shards" / "validation"
    two = [{"name": "big", "shards": str(train)}, {"name": "small", "shards": str(held_out)}]
    for name, values in {
        "run": run_values(corpus, folder / "runs", "run", train=SHORT),
        "done": run_values(corpus, folder / "runs", "done", train=SHORT),
        "two": run_values(corpus, folder / "runs", "run", train=SHORT, data={"sources": two}),
        "task": task_values(folder, "task"),
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(held_out, folder / "held")
    for name, changes in MANIFESTS.items():
        manifest = Path(shutil.copytree(held_out, folder / name)) / "manifest.json"
        values = json.loads(manifest.read_text()) | changes
        if name == "large":
            values["shards"][0]["max_id"] = 9999
        manifest.write_text("{" if name == "broken" else json.dumps(values))
    next(iter((folder / "gone").glob("*.tar"))).unlink()
    raw = {f"{number}.txt": b"a text " * 50 for number in range(8)}
    tar = write_tar(folder / "raw" / "a.tar", raw)
    index_tars([tar], folder=tar.parent, field=None, threads=1)
    file = Path(shutil.copytree(corpus / "tokenizer", folder / "prefixed")) / "tokenizer.json"
    text = file.read_text("utf-8")
    changed = text.replace('"add_prefix_space": false', '"add_prefix_space": true')
    file.write_text(changed, "utf-8")
    make_encoder(folder / "encoder")
    for name in ("weightless", "nothing", "runs/foreign"):
        (folder / name).mkdir(parents=True)
    shutil.copy(folder / "encoder" / "config.json", folder / "weightless")
    (folder / "runs" / "foreign" / "letter.txt").touch()
    (folder / "runs" / "file").touch()
    good = {"text": "good film", "label": "good"}
    write_jsonl(folder / "reviews.jsonl", reviews(60))
    write_jsonl(folder / "unlabelled.jsonl", [{"text": "good film"}])
    write_jsonl(folder / "twice.jsonl", [{"id": "a", **good}] * 2)
    write_jsonl(folder / "one.jsonl", [good] * 3)
    (folder / "blank.jsonl").touch()
    (folder / "bad.jsonl").write_text('{"text": "a"\n')
    (folder / "sheet.xlsx").touch()


def answer(request: str) -> str:
    """Return what the command says, from its error on, and its exit code."""
    sys.argv = ["hfscale", *shlex.split(request)]
    said = io.StringIO()
    code: Any = None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            code = end.code
    logger.handlers[:] = []
    text = said.getvalue()
    return f"{text[max(text.find('error: '), 0) :]}exit {code}"


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    answers = [answer(line) for line in sys.stdin.read().splitlines()]
    slow = sorted({"torch", "deepspeed"} & set(sys.modules))
    print(json.dumps({"answers": answers, "slow": slow}))
