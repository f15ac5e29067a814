"""What a user says, bent: configs, overrides, names, and the variables of torchrun and Slurm."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import yaml

from benchmarks.fuzz.act import Act, Random, command
from benchmarks.fuzz.bend import bent, damage, replaced


def hard_yaml() -> list[str]:
    """Return texts that are hard on a parser."""
    fields = [f"k{n}: {{a: {n}}}" for n in range(60_000)]
    return [
        aliases(),
        "a: &a {b: *a}\n",
        "[" * 5000,
        "{a: " * 3000,
        "- " * 20_000 + "x",
        "x: " + "[1, " * 40 + "]" * 40,
        "\n".join(fields),
        "x: 1\n" * 800_000,
        "extends: [run2.yaml]",
        "extends: ~nosuchuser/x",
        f"extends: {'a' * 300}",
        "!!python/object/apply:os.system [id]",
        "? [a, b]\n: c",
        "%YAML 9.9\n---\na: 1",
        "a: \x00",
        "run: {name: 'a\\0b'}",
        'run: {name: "\\ud800"}',
    ]


def aliases() -> str:
    """Return lists of aliases of lists of aliases, which are 9^10 words when all are followed."""
    text = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for below, name in zip("abcdefghi", "bcdefghij", strict=True):
        nine = ", ".join([f"*{below}"] * 9)
        text += f"{name}: &{name} [{nine}]\n"
    return text


def on_yaml(rng: Random, home: Path) -> Act:
    """A config by hand: bent values, and text that is hard on a parser."""
    name = rng.choice(["run.yaml", "corpus.yaml"])
    file, way = home / name, rng.random()
    text = file.read_text()
    if way < 0.7:
        values = bent(rng, yaml.safe_load(text))
        text = json.dumps(values) if rng.random() < 0.5 else yaml.safe_dump(values)
    elif way < 0.8:
        text = damage(rng, text.encode()).decode("utf-8", "replace")
    else:
        text = rng.choice(hard_yaml())
    file.unlink()
    file.write_text(text, "utf-8", "surrogatepass")
    if rng.random() < 0.06:
        replaced(rng, file)
    if name == "corpus.yaml":
        return command("shards", "build", name, "shards.path=new", "shards.procs=1")
    return command(*rng.choice([("show", name), ("pretrain", name, "--dry-run", "--procs", "1")]))


KEYS = ["run.name", "run.root", "train.epochs", "train.steps", "data.sources", "tokenizer.path"]
KEYS += ["model.config.n_layer", "model.config", "model.pretrained", "optim.lr", "data.seq_len"]
KEYS += ["optim.betas", "schedule.warmup_steps", "model.freeze", "data.sources.0.shards", "x.y"]
TEXTS = ["1e308", "true", "-1", "0", "[", "{", "{a: &a [*a]}", "~nosuchuser/x", "a" * 300]
TEXTS += ["1e-400", "9" * 5000, "[" * 300, "null", "x", "1000000000", "é" * 200, "[(]"]
TEXTS += ["\udcff", "http://x/ y"]


def on_overrides(rng: Random, home: Path) -> Act:
    """Values on the command line."""
    words = [f"{rng.choice(KEYS)}={rng.choice(TEXTS)}" for _ in range(rng.choice([1, 1, 2]))]
    verb, *flags = rng.choice([("show",), ("pretrain", "--dry-run", "--procs", "1")])
    return command(verb, "run.yaml", *words, *flags)


NAMES = ["~nosuchuser/x", "a" * 300, "x/" * 3000, "\udcff", "runs/r@x", "runs/r@99", "", ".", "/"]
NAMES += ["/dev/zero", "/dev/null", "rows.jsonl", "rows.jsonl/x", "export/config.json", "runs"]
NAMES += ["-", "é" * 150]
PREDICT_ROWS = ("predict", "export", "--data", "rows.jsonl", "data.columns.prompt=prompt")


def on_names(rng: Random, home: Path) -> Act:
    """Names of runs, models, tables and folders that are none."""
    name = rng.choice(NAMES)
    commands = [
        ("status", name),
        ("logs", name),
        ("show", name),
        ("checkpoints", name),
        ("export", name, "out"),
        ("export", "runs/r", name),
        ("predict", name, "--prompt", "a"),
        ("predict", "export", "--data", name),
        (*PREDICT_ROWS, "--out", name),
        ("evaluate", name, "--data", "shards/validation"),
        ("compare", name),
        ("batch", name, "--step", "2"),
        ("shards", "stats", name),
        ("shards", "cat", name),
        ("shards", "index", name),
        ("tokenizer", "add", name, "out", "mask=<m>"),
        ("pretrain", name, "--dry-run", "--procs", "1"),
        ("finetune", name, "--dry-run", "--procs", "1"),
    ]
    return command(*rng.choice(commands))


VARIABLES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"]
VARIABLES += ["SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"]
VARIABLES += ["SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE", "SLURM_GPUS_ON_NODE"]
VARIABLES += ["SLURM_RESTART_COUNT", "SLURM_GPUS_PER_NODE"]
NUMBERS = ["", "x", "-1", "1.5", "9" * 30, "0", "1", "2", "4(x2)", "gpu:a100:4", "١", " 3"]
NUMBERS += ["\udcff"]


def on_environment(rng: Random, home: Path) -> Act:
    """Variables of torchrun and Slurm that are no numbers."""
    changed = {rng.choice(VARIABLES): rng.choice(NUMBERS) for _ in range(rng.choice([1, 2, 4]))}
    if rng.random() < 0.6:
        changed.setdefault("SLURM_JOB_ID", "7")

    def read() -> None:
        from hfscale.dist.world import World, allocation
        from hfscale.errors import exit_code

        os.environ.update(changed)
        try:
            World.from_environment()
            allocation()
        except Exception as error:
            if (code := exit_code(error)) is None:
                raise
            sys.exit(code)

    def start() -> None:
        os.environ.update(changed)
        command("pretrain", "run.yaml", "--dry-run", "--procs", "1")()

    return start if rng.random() < 0.3 else read
