"""Checkpoints, exported models and what a run says of itself, changed."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from benchmarks.fuzz.act import Act, Random, command, read_run, weights_of
from benchmarks.fuzz.bend import (
    bend_header,
    bend_json,
    bend_lines,
    bent,
    damage,
    replaced,
    reseal,
    sealed,
)


def checkpoints_of(home: Path) -> list[Path]:
    """Return the checkpoints of the run, the newest last."""
    return sorted((home / "runs" / "r" / "checkpoints").glob("step-*"))


def on_state(rng: Random, home: Path) -> Act:
    """What checkpoints say, changed on purpose: their manifests are made again."""
    checkpoints = checkpoints_of(home)
    names = ["state.json", "state.json", "config.json", "generation_config.json", "manifest.json"]
    name = rng.choice(names)
    for checkpoint in checkpoints[-rng.choice([1, 2]) :]:
        bend_json(rng, checkpoint / name)
        if name != "manifest.json":
            sealed(checkpoint)
        elif rng.random() < 0.7 and (checkpoint / name).is_file():
            reseal(checkpoint / name)
    return read_run(rng)


def on_fragments(rng: Random, home: Path) -> Act:
    """Headers of safetensors in checkpoints, changed on purpose."""
    checkpoint = checkpoints_of(home)[-1]
    [file] = (checkpoint / "engine").glob("*.safetensors")
    bend_header(rng, file)
    sealed(checkpoint)
    return read_run(rng)


def on_checkpoint_bytes(rng: Random, home: Path) -> Act:
    """Accidents to a checkpoint, read as a job reads it."""
    checkpoint = checkpoints_of(home)[-1]
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    file = rng.choice(files)
    file.write_bytes(damage(rng, file.read_bytes()))
    return lambda: weights_of(checkpoint)


EXPORTED = ["config.json", "config.json", "tokenizer.json", "tokenizer.json"]
EXPORTED += ["tokenizer_config.json", "generation_config.json", "model.safetensors"]
SIZES = ["n_layer", "n_head", "vocab_size", "n_positions", "num_labels", "n_embd"]
PREDICT = ("predict", "export", "--prompt", "def", "generation.max_new_tokens=2")
DRY_RUN = ("pretrain", "run.yaml", "--dry-run", "--procs", "1")
USES = [
    PREDICT,
    PREDICT,
    ("evaluate", "export", "--data", "shards/validation", "evaluate.rows=4"),
    (*DRY_RUN, "model.pretrained=export", "model.architecture=null"),
    (*DRY_RUN, "tokenizer.path=export"),
    ("tokenizer", "add", "export", "out", "mask=<m>"),
]


def on_export(rng: Random, home: Path) -> Act:
    """A model's folder by a stranger."""
    file = home / "export" / rng.choice(EXPORTED)
    if file.name == "config.json" and rng.random() < 0.2:
        config = json.loads(file.read_text())
        config[rng.choice(SIZES)] = 10**9
        file.write_text(json.dumps(config))
    elif file.suffix == ".json":
        bend_json(rng, file)
    elif rng.random() < 0.2:
        replaced(rng, file)
    else:
        bend_header(rng, file)
    return command(*rng.choice(USES))


RECORDS = ["metrics.jsonl", "environment.json", "attempts/1/ended", "scores", "config.yaml"]
RECORDS += ["plan.json", "doctor.json"]
PLANS = [("plan", "runs/r", "--gpu", "cpu"), ("plan", "runs/r", "--check")]
HISTORY = ["incidents.jsonl", "goodput.jsonl", "details.jsonl"]
STATUS, COMPARE, SHOW = ("status", "runs/r"), ("compare", "runs/r"), ("show", "runs/r")
LOOKS = [STATUS, ("incident", "runs/r"), ("incident", "runs/r", "1"), ("goodput", "runs/r")]


def on_records(rng: Random, home: Path) -> Act:
    """What a run has written of itself: metrics, environment, scores, its config, its history."""
    run = home / "runs" / "r"
    which = rng.choice(RECORDS + HISTORY)
    if which in HISTORY:
        bend_lines(rng, run / which)
        return command(*rng.choice([*LOOKS, ("report", "runs/r", "out.html")]))
    if which == "metrics.jsonl":
        bend_lines(rng, run / which)
        if rng.random() < 0.1:
            replaced(rng, run / which)
        return command(*rng.choice([STATUS, COMPARE, PLANS[1], ("batch", "runs/r", "--step", "2")]))
    if which == "plan.json":
        bend_json(rng, run / which)
        return command(*rng.choice(PLANS))
    if which == "doctor.json":
        bend_json(rng, run / which)
        return command(*rng.choice(PLANS), "--doctor", "runs/r/doctor.json")
    if which == "scores":
        [file] = run.glob("evaluations/*/*/scores.json")
        bend_json(rng, file)
        return command(*rng.choice([COMPARE, ("evaluate", "runs/r"), ("compare", file)]))
    if which == "config.yaml":
        values = bent(rng, yaml.safe_load((run / which).read_text()))
        (run / which).write_text(json.dumps(values), "utf-8", "surrogatepass")
        return read_run(rng)
    bend_json(rng, run / which)
    again = ("pretrain", "runs/r", "--dry-run", "--procs", "1")
    return command(*rng.choice([STATUS, again, SHOW]))
