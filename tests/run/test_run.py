"""A run in its stages: what each may import and ask of others, and that nothing is read twice."""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale import tokenizer
from launch.cli import main
from tests.helpers.cli import ROOT
from tests.helpers.corpus import run_values
from tests.helpers.labelled import make_encoder, reviews, task_values, write_jsonl
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

KINDS = ("/manifest.json", ".jsonl")
# a second rank, which would be waited for
STAGES = """
import json, re, sys
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.schema import RunConfig
from hfscale.dist.world import Place, World
from hfscale.run.run import Run

def waits(*arguments, **named):
    raise AssertionError("a collective before the run is live")

values = json.load(sys.stdin)
configs = [RunConfig.model_validate(values[0]), FinetuneConfig.model_validate(values[1])]
runs = [Run(config, World(Place(0, 2), 0, 2)) for config in configs]
for run in runs:
    run.read(device_type="cpu")
assert not {"torch", "transformers", "deepspeed"} & set(sys.modules)

import torch.distributed as dist
words = "all_|reduce|gather|scatter|broadcast|barrier|send|recv|new_|init_process"
for module in (dist, dist.distributed_c10d):
    for name, value in vars(module).items():
        if callable(value) and not isinstance(value, type) and re.search(words, name):
            setattr(module, name, waits)
dist.is_initialized, dist.get_world_size, dist.get_rank = lambda: True, lambda *_: 2, lambda *_: 0
for run in runs:
    run.check()
    assert run.shape.parameters > 0 and run.shape.flops_per_token > 0
assert "deepspeed" not in sys.modules
"""


@pytest.fixture
def values(corpus: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """Those of a run on two sources and of a fine-tuning, which validate."""
    shards = corpus / "shards"
    sources = [{"name": name, "shards": str(shards / name)} for name in ("train", "validation")]
    held_out = tmp_path / "held"
    held_out.symlink_to(shards / "validation")
    validation = {"shards": str(held_out), "every_steps": 1, "rows": 4}
    make_encoder(tmp_path / "encoder")
    write_jsonl(tmp_path / "reviews.jsonl", reviews(60))
    short = {"steps": 1}
    data = {"sources": sources, "validation": validation}
    return [
        run_values(corpus, tmp_path / "runs", "tokens", data=data, train=short),
        task_values(tmp_path, "task", train=short),
    ]


def test_no_stage_before_the_last_waits_for_a_rank(values: list[dict[str, Any]]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STAGES],
        cwd=ROOT,
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def files_read(values: dict[str, Any], command: list[str]) -> dict[str, int]:
    """Return how often each manifest and table was opened, and tokenizers loaded and digested, by a
    rank that trains; or by ``command``. For ``run_ranks``.
    """
    counts = Counter[str]()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str):
            return
        path, flags = arguments[0], arguments[2] or 0
        reads = flags & os.O_ACCMODE == os.O_RDONLY
        if reads and path.endswith(KINDS) and values["run"]["root"] not in path:
            counts["/".join(Path(path).parts[-2:])] += 1

    sys.addaudithook(note)
    profile = cProfile.Profile()
    profile.enable()
    if command:
        sys.argv = ["hfscale", *command]
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
    else:
        train(values)
    profile.disable()
    for (file, _, name), (calls, *_) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if file == tokenizer.__file__ and name in ("load_tokenizer", "tokenizer_digest"):
            counts[name] = calls
    return dict(counts)


@pytest.mark.slow
@pytest.mark.parametrize("dry", [True, False])
def test_what_a_process_reads_it_reads_once(
    tmp_path: Path, values: list[dict[str, Any]], dry: bool
) -> None:
    tokens, task = values
    once = dict.fromkeys(("load_tokenizer", "tokenizer_digest"), 1)
    manifests = {f"{side}/manifest.json": 1 for side in ("train", "validation", "held")}
    # for its digest, for its labels, and for the features of each split
    table = {f"{tmp_path.name}/reviews.jsonl": 4}
    wanted = {"pretrain": manifests | once, "finetune": table | once}
    for (verb, counts), asked in zip(wanted.items(), (tokens, task), strict=True):
        config = tmp_path / f"{verb}.yaml"
        config.write_text(yaml.safe_dump(asked))
        command = [verb, str(config), "--dry-run", "--procs", "1"] if dry else []
        [read] = run_ranks(files_read, 1, asked, command)
        assert read == counts
