"""The data and configs of `launch/tour.sh`, made on this machine, and the table of scores that it
ends with.

    python -m benchmarks.tour data FOLDER        # texts, labelled examples, configs
    python -m benchmarks.tour table FOLDER       # after training and evaluation

- topics        which part of the library a docstring is from                   baseline: the label
                most frequent there
- sentiment     sentences from templates, with words like careful and careless  baseline: the most
                frequent label
- ner           names of modules, errors and builtins in docstrings             baseline: the tag
                that a word most often had, else O
- qa            what a docstring's function returns, raises, does when ...      baseline: the
                context's first words, as many as answers have
- summarization the first line of a docstring out of what follows and the name  baseline: lead, as
  many words as summaries have
- translation   messages of programs, English to Russian                        baseline: copy

The decoder first learns to copy, from rows of words that are said six times: a summary says again
what it is given, and without that lesson a model of this size takes far longer to find out. For the
same reason the encoder-decoder sees short rows of which little is hidden: that is where its decoder
learns to look at the encoder, and until it does, a translation has nothing to do with its source.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.tour import (
    Split,
    baseline,
    docstrings,
    made_up_messages,
    messages,
    ner,
    qa,
    sentiment,
    summarization,
    texts,
    topics,
    translation,
    untold,
)
from hfscale.metrics.kept import Scores

LEAST_TESTED, MOST_TESTED = 200, 1000


def unique(examples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return distinct examples in an order of chance, with ids."""
    found = list({json.dumps(example, sort_keys=True): example for example in examples}.values())
    random.Random(0).shuffle(found)
    return [{"id": str(number), **example} for number, example in enumerate(found)]


# ------------------------------------------------------------------------------------------ configs
SIZES: dict[str, dict[str, Any]] = {
    "encoder": {
        "model": {
            "architecture": "modernbert",
            "config": {
                "num_hidden_layers": 4,
                "hidden_size": 192,
                "num_attention_heads": 4,
                "intermediate_size": 288,
                "max_position_embeddings": 512,
            },
        },
        "objective": {"name": "mlm", "options": {"units": "word", "select": 0.2}},
        "train": {"steps": 700, "global_batch": 32, "micro_batch": 16},
    },
    "decoder": {
        "model": {
            "architecture": "lfm2",
            "config": {  # its short convolutions are half of what copying takes
                "num_hidden_layers": 4,
                "hidden_size": 192,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "intermediate_size": 512,
                "block_auto_adjust_ff_dim": False,
                "layer_types": ["conv", "full_attention", "conv", "full_attention"],
                "max_position_embeddings": 512,
                "tie_word_embeddings": True,
            },
        },
        "objective": {"name": "clm"},
        "optim": {"lr": 3e-3},
        "train": {"steps": 2000, "global_batch": 8, "micro_batch": 4},
    },
    "encoder-decoder": {
        "model": {
            "architecture": "mbart",
            "config": {
                "d_model": 192,
                "encoder_layers": 3,
                "decoder_layers": 3,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 512,
                "decoder_ffn_dim": 512,
                "max_position_embeddings": 256,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "encoder_layerdrop": 0.0,
                "decoder_layerdrop": 0.0,
            },
        },
        "objective": {"name": "seq2seq", "options": {"noise": "bart", "hidden": 0.1, "span": 1.0}},
        "optim": {"lr": 1e-3},
        "schedule": {"name": "constant", "warmup_steps": 50},
        "train": {"steps": 800, "global_batch": 32, "micro_batch": 16},
    },
}
# begins with, the kind of text, tokenizer, its size; small ones where letters matter more than
# meaning
TEXTS = {
    "encoder": ("docstrings", "wordpiece", 6144),
    "decoder": ("summaries", "bpe", 1024),
    "encoder-decoder": ("messages", "bpe", 2048),
}
LESSON_STEPS = 600  # of the decoder's
TASKS: dict[
    str, tuple[str, dict[str, Any], dict[str, Any], str]
] = {  # begins with, task, what differs, the metric that counts
    "topics": (
        "encoder",
        {"name": "sequence_classification"},
        {"train": {"steps": 150}},
        "accuracy",
    ),
    "sentiment": (
        "encoder",
        {"name": "sequence_classification"},
        {"train": {"steps": 150}},
        "accuracy",
    ),
    "ner": ("encoder", {"name": "token_classification"}, {"train": {"steps": 150}}, "f1"),
    "qa": ("encoder", {"name": "extractive_qa"}, {"train": {"steps": 300}}, "f1"),
    "summarization": (
        "decoder",
        {
            "name": "summarization",
            "options": {
                "prompt": "{source}:",
                "max_target_length": 48,
                "generation": {"max_new_tokens": 32, "num_beams": 2, "no_repeat_ngram_size": 10},
            },
        },
        {
            "data": {"max_length": 160},
            "train": {"steps": 600, "global_batch": 16, "micro_batch": 8},
        },
        "rouge1",
    ),
    "translation": (
        "encoder-decoder",
        {
            "name": "translation",
            "options": {
                "max_target_length": 64,
                "generation": {"max_new_tokens": 48, "num_beams": 2},
            },
        },
        {"data": {"max_length": 64}, "train": {"steps": 1600}},
        "chrf",
    ),
}


def precision() -> str:
    """Return bf16 where the processor has matrix instructions for it: there a step takes half as
    long, elsewhere longer.
    """
    return "bf16" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else "fp32"


def pretraining(name: str, folder: Path) -> dict[str, Any]:
    """Return the config in which one of SIZES is pretrained."""
    data: dict[str, Any] = {
        "seq_len": 32 if name == "encoder-decoder" else 128,
        "sources": [{"name": "text", "shards": str(folder / name / "shards" / "train")}],
        "validation": {
            "shards": str(folder / name / "shards" / "validation"),
            "every_steps": 200,
            "rows": 64,
        },
    }
    if name == "decoder":
        data["sources"] += [
            {"name": "copying", "shards": str(folder / name / "lesson" / "train"), "weight": 1.0}
        ]
        data["sources"][0]["weight"] = 0.0
        data["stages"] = [{"at": LESSON_STEPS, "weights": {"text": 0.9, "copying": 0.1}}]
    return {
        "run": {"name": f"tour-{name}"},
        "tokenizer": {"path": str(folder / name / "tokenizer")},
        "data": data,
        "optim": {"lr": 2e-3},
        "schedule": {"warmup_steps": 50},
        "engine": {"precision": precision()},
        "checkpoint": {"keep_last": 1},
        "metrics": {"every_steps": 100},
        **SIZES[name],
    }


def finetuning(name: str, folder: Path) -> dict[str, Any]:
    """Return the config in which one of TASKS is trained."""
    begin, task, more, _ = TASKS[name]
    return {
        "run": {"name": f"tour-{name}"},
        "model": {"pretrained": f"runs/tour-{begin}"},
        "task": task,
        "data": {
            "train": str(folder / name / "train.jsonl"),
            "test": str(folder / name / "test.jsonl"),
            "max_length": 128,
            "on_error": "skip",
            **more.get("data", {}),
        },
        "optim": more.get("optim", {"lr": 1e-3}),
        "schedule": {"name": "linear", "warmup_steps": 50, "min_ratio": 0.0},
        "train": {"global_batch": 32, "micro_batch": 16, **more["train"]},
        "engine": {"precision": precision()},
        "checkpoint": {"keep_last": 1},
        "metrics": {"every_steps": 100},
    }


def corpus(name: str, folder: Path, *, shards: str, text: str) -> dict[str, Any]:
    """Return the config of one of TEXTS' tokenizers and of shards of a kind of text."""
    _, kind, size = TEXTS[name]
    return {
        "source": {"path": str(folder / "texts" / text), "document_mb": 0.02},
        "split": {"validation": 0.05},
        "tokenizer": {"kind": kind, "vocab_size": size, "path": str(folder / name / "plain")},
        "shards": {"path": str(folder / name / shards), "shard_mb": 4, "chunk_mb": 0.5},
    }


# ----------------------------------------------------------------------------------------- commands
def make(folder: Path) -> None:
    """Write texts, examples, baselines and configs. What is tested is not among the texts."""
    docs, pairs = docstrings(), messages()
    if len(unique(translation(pairs)["test"])) < LEAST_TESTED:
        print(
            "    few programs here have a Russian translation: made-up sentences take their place"
        )
        pairs = made_up_messages()
    for kind, told in texts(docs, pairs).items():
        (folder / "texts" / kind).mkdir(parents=True, exist_ok=True)
        for name, text in told.items():
            (folder / "texts" / kind / (name.replace("/", "-") + ".txt")).write_text(text, "utf-8")
    made: dict[str, Split] = {
        "topics": topics(docs),
        "sentiment": sentiment(),
        "ner": ner(docs),
        "qa": qa(docs),
        "summarization": summarization(docs),
        "translation": translation(pairs),
    }
    for task, sides in made.items():
        (folder / task).mkdir(exist_ok=True)
        train, test = (unique(sides[side]) for side in ("train", "test"))
        if task not in ("sentiment", "translation"):  # whose texts are no docstrings
            test = untold(test[: 2 * MOST_TESTED], docs)
        test = test[:MOST_TESTED]
        if len(test) < LEAST_TESTED:
            raise SystemExit(
                f"{task}: only {len(test)} examples to test on; this machine's Python has too "
                "few docstrings"
            )
        for name, lines in (
            ("train", train),
            ("test", test),
            ("baseline", baseline(task, train, test)),
        ):
            (folder / task / f"{name}.jsonl").write_text(
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8"
            )
        print(f"    {task:<14}{len(train):>7,} to train on, {len(test)} to test on")
    for name in SIZES:
        (folder / name).mkdir(exist_ok=True)
        configs = {
            "corpus": corpus(name, folder, shards="shards", text=TEXTS[name][0]),
            "run": pretraining(name, folder),
        }
        if name == "decoder":
            configs["lesson"] = corpus(name, folder, shards="lesson", text="copying")
        for of, config in configs.items():
            (folder / name / f"{of}.yaml").write_text(json.dumps(config), "utf-8")  # JSON is YAML
    for name in TASKS:
        (folder / name / "run.yaml").write_text(json.dumps(finetuning(name, folder)), "utf-8")


def ends(found: Scores, metric: str) -> tuple[float, float]:
    """Return the ends of a score's interval; twice the score, where no draw moved it."""
    value = found.scores[metric]
    return found.intervals.get(metric, (value, value))


def cell(found: Scores, metric: str) -> str:
    """Return a score with its interval, if it has one."""
    value = f"{found.scores[metric]:.3f}"
    if metric not in found.intervals:
        return value
    low, high = found.intervals[metric]
    return f"{value} ({low:.3f} - {high:.3f})"


def table(folder: Path) -> None:
    """Print model and baseline of each task with 95 % intervals, and a few outputs; exit with 1 if
    one does not beat its baseline.
    """
    from hfscale.jobs.asked import settle
    from hfscale.jobs.evaluate import score
    from hfscale.run.model import find

    beaten = True
    print(f"{'task':<15}{'metric':<10}{'tested':>7}   {'model (95 %)':<26}{'baseline (95 %)':<26}")
    samples = []
    for name, (_, _, _, metric) in TASKS.items():
        run = Path("runs") / f"tour-{name}"
        model = find(run)
        config = settle(model, task=None, data=None, out=Path("-"), overrides=[], answers=True)
        home = max(
            (run / "evaluations").glob("*-test/*/predictions.jsonl"),
            key=lambda file: file.stat().st_mtime,
        )
        ours, trivial = (
            score(config, file, model=model) for file in (home, folder / name / "baseline.jsonl")
        )
        low, high = ends(ours, metric)[0], ends(trivial, metric)[1]
        better = low > high
        beaten &= better
        shown = [cell(ours, metric), cell(trivial, metric)]
        print(
            f"{name:<15}{metric:<10}{ours['examples']:>7}   "
            f"{shown[0]:<26}{shown[1]:<26}{'' if better else 'NOT beaten'}"
        )
        references = {
            line["id"]: line
            for line in map(
                json.loads, (folder / name / "test.jsonl").read_text("utf-8").splitlines()
            )
        }
        said = json.loads(home.read_text("utf-8").splitlines()[0])
        question = {key: value for key, value in references[said["id"]].items() if key != "id"}
        asked, answer = (
            json.dumps(thing, ensure_ascii=False) for thing in (question, said["prediction"])
        )
        samples += [name, f"  {asked[:300]}", f"  -> {answer[:200]}"]
    print("\nOne output of each\n" + "\n".join(samples))
    sys.exit(0 if beaten else 1)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("data", "table"):
        sys.exit(__doc__)
    {"data": make, "table": table}[sys.argv[1]](Path(sys.argv[2]))
