"""The data of `launch/tour.sh`, made on this machine, its trivial baselines, and the table of scores that it ends with.

    python -m benchmarks.tour data FOLDER        # texts, labelled examples, configs
    python -m benchmarks.tour table FOLDER       # after training and evaluation

Texts are docstrings of Python's standard library and the messages of the machine's programs with their translations (gettext).
What is tested comes from files, templates and words that training has not seen: a file is on one side by the hash of its name.

- topics        which part of the library a docstring is from                   baseline: the label most frequent there
- sentiment     sentences from templates, with words like careful and careless  baseline: the most frequent label
- ner           dotted names in docstrings                                       baseline: the tag that a word most often had, else O
- qa            what a function does, among others' first lines                  baseline: the first line in the context
- summarization the first line of a docstring out of the rest                    baseline: lead, as many words of the rest as summaries have
- translation   messages of programs, English to Chinese                         baseline: copy
"""
from __future__ import annotations

import ast
import builtins
import gettext
import hashlib
import json
import random
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

LANGUAGE, HAN = "zh_CN", "[\u4e00-\u9fff]"
LEAST_TESTED, MOST_TESTED = 200, 400
Split = dict[str, list[dict[str, Any]]]  # "train" and "test"

PAIRS = {  # positive, negative; a word is on one side only
    "train": ["careful careless", "useful useless", "helpful unhelpful", "thoughtful thoughtless", "pleasant unpleasant",
              "graceful graceless", "tasteful tasteless", "kind unkind", "reliable unreliable", "meaningful meaningless",
              "fruitful fruitless", "comfortable uncomfortable", "friendly unfriendly", "lawful lawless", "happy unhappy"],
    "test": ["hopeful hopeless", "cheerful cheerless", "merciful merciless", "faithful faithless", "fair unfair", "lucky unlucky",
             "worthy unworthy", "joyful joyless"]}
PLACES = {"train": ["hotel", "book", "film", "museum", "teacher", "dinner", "garden", "concert", "journey", "captain"],
          "test": ["train", "play", "doctor", "library", "kitchen", "guide"]}
FORMS = {"train": ["The {place} was {word}.", "What a {word} {place}!", "I found the {place} rather {word}.",
                   "They called the {place} {word}, and so do I.", "A {word} {place}, all in all.",
                   "My friends say the {place} is {word}."],
         "test": ["Nobody told me that the {place} would be so {word}.", "We left early, but the {place} seemed {word}.",
                  "In the end it is a {word} {place}, we thought.", "So {word} a {place} I have never seen."]}


def is_test(name: str) -> bool:
    """Return whether a file is on the side that is tested: one in four."""
    return hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 4 == 0


# ------------------------------------------------------------------------------------------------ sources
def docstrings() -> Iterator[tuple[str, str, str]]:
    """Yield (file, name, docstring) of the modules, classes and functions of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        if re.search(r"(^|/)(site-packages|dist-packages|tests?|idle_test|lib2to3)/", file):
            continue
        with suppress(SyntaxError, UnicodeDecodeError, ValueError):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                    yield file, getattr(node, "name", path.stem), text


def messages() -> Iterator[tuple[str, str, str]]:
    """Yield (catalogue, English, Chinese) of the programs installed here; sentences about files and days where there are none."""
    for file in sorted(Path("/usr/share/locale").glob(f"{LANGUAGE}/LC_MESSAGES/*.mo")):
        with open(file, "rb") as catalogue, suppress(UnicodeDecodeError, OSError):
            for source, target in gettext.GNUTranslations(catalogue)._catalog.items():  # type: ignore[attr-defined]
                if isinstance(source, str) and "\x04" not in source and re.search("[a-z]{3}", source) and re.search(HAN, target):
                    yield file.stem, one_line(source), one_line(target)


def made_up_messages() -> Iterator[tuple[str, str, str]]:
    """Yield what takes the place of ``messages``; numbers are of one side only."""
    rng = random.Random(0)
    for _ in range(6000):
        file = f"made up {rng.randrange(40)}"
        files, folders = (2 * rng.randint(1, 49) + is_test(file) for _ in range(2))
        yield file, f"{files} files in {folders} folders", f"{folders} 个文件夹中有 {files} 个文件"


def one_line(text: str) -> str:
    return " ".join(text.split())


# --------------------------------------------------------------------------------------------- labelled examples
def topics(docs: list[tuple[str, str, str]]) -> Split:
    """Return docstrings and the package that each is from; of a large file some."""
    packages = {"asyncio", "email", "tkinter", "unittest", "xml", "http", "multiprocessing", "importlib", "idlelib", "distutils"}
    made: Split = {"train": [], "test": []}
    taken: Counter[str] = Counter()
    for file, _, text in docs:
        if "/" in file and (label := file.split("/")[0]) in packages and len(text) > 40 and taken[file] < 60:
            taken[file] += 1
            made["test" if is_test(file) else "train"].append({"text": one_line(text)[:400], "label": label})
    trained = {example["label"] for example in made["train"]}
    return {"train": made["train"], "test": [example for example in made["test"] if example["label"] in trained]}


def sentiment() -> Split:
    """Return sentences of templates; no template, thing or word is on both sides."""
    return {side: [{"text": form.format(place=place, word=word), "label": label}
                   for form in FORMS[side] for place in PLACES[side] for pair in PAIRS[side]
                   for word, label in zip(pair.split(), ("positive", "negative"), strict=True)] for side in ("train", "test")}


def ner(docs: list[tuple[str, str, str]]) -> Split:
    """Return sentences of docstrings in which names of modules and builtins are entities."""
    kinds = {name: "MODULE" for name in sys.stdlib_module_names if len(name) > 2}
    kinds |= {name: "ERROR" if name.endswith(("Error", "Warning", "Exception")) else "BUILTIN" for name in dir(builtins) if name[0] != "_"}
    made: Split = {"train": [], "test": []}
    for file, _, text in docs:
        for sentence in re.split(r"(?<=[.!?])\s+|\n\n", text):
            words, tags = list[str](), list[str]()
            for name in re.findall(r"\w+(?:\.\w+)*|[^\w\s]", sentence):
                pieces = re.findall(r"\w+|[^\w\s]", name)
                kind = kinds.get(pieces[0])
                words += pieces
                tags += [f"B-{kind}", *[f"I-{kind}"] * (len(pieces) - 1)] if kind else ["O"] * len(pieces)
            if 4 < len(words) < 40 and set(tags) != {"O"}:
                made["test" if is_test(file) else "train"].append({"words": words, "tags": tags})
    return made


def qa(docs: list[tuple[str, str, str]], rng: random.Random) -> Split:
    """Return questions what a function does, and a context that tells it of several of a file."""
    by_file: dict[str, dict[str, str]] = defaultdict(dict)
    for file, name, text in docs:
        first = one_line(text.split("\n\n")[0])
        if 15 < len(first) < 90 and not name.startswith("_"):
            by_file[file][name] = first
    made: Split = {"train": [], "test": []}
    for file, found in by_file.items():
        for name in found if len(found) > 3 else ():
            for _ in range(1 if is_test(file) else 4):
                told = rng.sample(sorted(found.keys() - {name}), 3) + [name]
                rng.shuffle(told)
                context = " ".join(f"{other}: {found[other]}" for other in told)
                begins = context.index(f"{name}: {found[name]}") + len(name) + 2
                made["test" if is_test(file) else "train"].append({
                    "question": f"What does {name} do?", "context": context,
                    "answers": {"text": [found[name]], "answer_start": [begins]}})
    return made


def summarization(docs: list[tuple[str, str, str]]) -> Split:
    """Return docstrings without their first line, and that line."""
    made: Split = {"train": [], "test": []}
    for file, _, text in docs:
        first, _, rest = text.partition("\n\n")
        if 15 < len(first) < 120 and len(rest) > 60:
            made["test" if is_test(file) else "train"].append({"source": one_line(rest)[:500], "target": one_line(first)})
    return made


def translation(pairs: list[tuple[str, str, str]]) -> Split:
    """Return messages and their translation; a message that any trained catalogue has is not tested."""
    made: Split = {"train": [], "test": []}
    trained = {source for file, source, _ in pairs if not is_test(file)}
    for file, source, target in pairs:
        if 8 < len(source) < 80 and (not is_test(file) or source not in trained):
            made["test" if is_test(file) else "train"].append({"source": source, "target": target})
    return made


def unique(examples: Iterable[dict[str, Any]], rng: random.Random, limit: int | None) -> list[dict[str, Any]]:
    """Return distinct examples in an order of chance, at most ``limit`` of them, with ids."""
    found = list({json.dumps(example, sort_keys=True): example for example in examples}.values())
    rng.shuffle(found)
    return [{"id": str(number), **example} for number, example in enumerate(found[:limit])]


# --------------------------------------------------------------------------------------------------- baselines
def baseline(task: str, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return predictions that nobody had to train a model for."""
    if task in ("topics", "sentiment"):
        [(label, _)] = Counter(example["label"] for example in test).most_common(1)  # no constant is better
        return [{"id": example["id"], "prediction": label} for example in test]
    if task == "ner":
        tags: dict[str, Counter[str]] = defaultdict(Counter)
        for example in train:
            for word, tag in zip(example["words"], example["tags"], strict=True):
                tags[word][tag] += 1
        [(label, _)] = Counter(tag for example in train for tag in example["tags"]).most_common(1)
        return [{"id": example["id"], "prediction": [label] * len(example["words"])} for example in test]
    if task == "qa":
        return [{"id": example["id"], "prediction": re.split(r" (?=\w+: )", example["context"])[0].partition(": ")[2]} for example in test]
    if task == "summarization":
        words = round(sum(len(example["target"].split()) for example in train) / len(train))
        return [{"id": example["id"], "prediction": " ".join(example["source"].split()[:words])} for example in test]
    return [{"id": example["id"], "prediction": example["source"]} for example in test]


# ---------------------------------------------------------------------------------------------------- configs
SIZES: dict[str, dict[str, Any]] = {
    "encoder": {"model": {"architecture": "modernbert", "config": {
        "num_hidden_layers": 4, "hidden_size": 192, "num_attention_heads": 4, "intermediate_size": 288, "max_position_embeddings": 512}},
        "objective": {"name": "mlm", "options": {"units": "word", "select": 0.2}}},
    "decoder": {"model": {"architecture": "gpt2", "config": {
        "n_layer": 4, "n_embd": 192, "n_head": 4, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}},
        "objective": {"name": "clm"}},
    "encoder-decoder": {"model": {"architecture": "t5", "config": {
        "d_model": 192, "d_kv": 48, "d_ff": 512, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"}},
        "objective": {"name": "seq2seq"}}}
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {  # begins with, task, what differs, the metric that counts
    "topics": ("encoder", {"name": "sequence_classification"}, {"train": {"steps": 150}}, "accuracy"),
    "sentiment": ("encoder", {"name": "sequence_classification"}, {"train": {"steps": 150}}, "accuracy"),
    "ner": ("encoder", {"name": "token_classification"}, {"train": {"steps": 150}}, "f1"),
    "qa": ("encoder", {"name": "extractive_qa"}, {"train": {"steps": 500}}, "f1"),
    "summarization": ("decoder", {"name": "summarization", "options": {"prompt": "{source}\n\nIn one line: ", "max_target_length": 32,
                                                                       "generation": {"max_new_tokens": 32, "num_beams": 2}}},
                      {"data": {"max_length": 160}, "train": {"steps": 250}}, "rouge1"),
    "translation": ("encoder-decoder", {"name": "translation", "options": {"max_target_length": 64,
                                                                            "generation": {"max_new_tokens": 48, "num_beams": 2}}},
                    {"data": {"max_length": 64}, "train": {"steps": 600}}, "chrf")}


def pretraining(name: str, folder: Path) -> dict[str, Any]:
    """Return the config in which one of SIZES is pretrained."""
    return {**SIZES[name], "run": {"name": f"tour-{name}"}, "tokenizer": {"path": str(folder / name / "tokenizer")},
            "data": {"seq_len": 128, "sources": [{"shards": str(folder / name / "shards" / "train")}],
                     "validation": {"shards": str(folder / name / "shards" / "validation"), "every_steps": 100, "rows": 64}},
            "optim": {"lr": 2e-3}, "schedule": {"warmup_steps": 30}, "train": {"steps": 300, "global_batch": 32, "micro_batch": 16},
            "engine": {"precision": "fp32"}, "checkpoint": {"keep_last": 1}, "metrics": {"every_steps": 20}}


def finetuning(name: str, folder: Path) -> dict[str, Any]:
    """Return the config in which one of TASKS is trained."""
    begin, task, more, _ = TASKS[name]
    return {"run": {"name": f"tour-{name}"}, "model": {"pretrained": f"runs/tour-{begin}"}, "task": task,
            "data": {"train": str(folder / name / "train.jsonl"), "test": str(folder / name / "test.jsonl"), "max_length": 128,
                     "on_error": "skip", **more.get("data", {})},
            "optim": {"lr": 1e-3}, "schedule": {"name": "linear", "warmup_steps": 20, "min_ratio": 0.0},
            "train": {"global_batch": 32, "micro_batch": 16, **more["train"]},
            "engine": {"precision": "fp32"}, "checkpoint": {"keep_last": 1}, "metrics": {"every_steps": 20}}


def corpus(name: str, folder: Path) -> dict[str, Any]:
    """Return the config of tokenizer and shards."""
    kind = "wordpiece" if name == "encoder" else "bpe"
    return {"source": {"path": str(folder / "text"), "document_mb": 0.02}, "split": {"validation": 0.03},
            "tokenizer": {"kind": kind, "vocab_size": 6144, "path": str(folder / name / "plain")},
            "shards": {"path": str(folder / name / "shards"), "shard_mb": 4, "chunk_mb": 0.5}}


# ------------------------------------------------------------------------------------------------------ commands
def make(folder: Path) -> None:
    """Write texts, examples, baselines and configs. What is tested is not among the texts."""
    rng, docs, pairs = random.Random(0), list(docstrings()), list(messages())
    if len({source for file, source, _ in pairs if is_test(file)}) < LEAST_TESTED:
        print("    few programs here have a Chinese translation: sentences about files and folders take their place")
        pairs = list(made_up_messages())
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for file in {file for file, _, _ in docs if not is_test(file)}:
        said = "\n\n".join(f"{name}\n{text}" for of, name, text in docs if of == file)
        (folder / "text" / (file.replace("/", "-") + ".txt")).write_text(said, "utf-8")
    for file in {file for file, _, _ in pairs if not is_test(file)}:
        said = "\n".join(f"{source}\n{target}" for of, source, target in pairs if of == file)
        (folder / "text" / f"messages-{file.replace('/', '-')}.txt").write_text(said, "utf-8")
    made = {"topics": topics(docs), "sentiment": sentiment(), "ner": ner(docs), "qa": qa(docs, rng), "summarization": summarization(docs),
            "translation": translation(pairs)}
    for task, sides in made.items():
        (folder / task).mkdir(exist_ok=True)
        train, test = (unique(sides[side], rng, limit) for side, limit in (("train", None), ("test", MOST_TESTED)))
        if len(test) < LEAST_TESTED:
            raise SystemExit(f"{task}: only {len(test)} examples to test on; this machine's Python has too few docstrings")
        for name, lines in (("train", train), ("test", test), ("baseline", baseline(task, train, test))):
            (folder / task / f"{name}.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
        print(f"    {task:<14}{len(train):>7,} to train on, {len(test)} to test on")
    for name in SIZES:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "corpus.yaml").write_text(json.dumps(corpus(name, folder)), "utf-8")  # JSON is YAML
        (folder / name / "run.yaml").write_text(json.dumps(pretraining(name, folder)), "utf-8")
    for name in TASKS:
        (folder / name / "run.yaml").write_text(json.dumps(finetuning(name, folder)), "utf-8")


def table(folder: Path) -> None:
    """Print model and baseline of each task with 95 % intervals, and a few outputs; exit with 1 if one does not beat its baseline."""
    from hfscale.jobs.asked import settle
    from hfscale.jobs.evaluate import score

    beaten = True
    print(f"{'task':<15}{'metric':<10}{'tested':>7}   {'model (95 %)':<24}{'baseline (95 %)':<24}")
    samples = []
    for name, (_, _, _, metric) in TASKS.items():
        run = Path("runs") / f"tour-{name}"
        config = settle(str(run), task=None, data=None, out=Path("-"), overrides=[], answers=True)
        home = max((run / "evaluations").glob("*/*/predictions.jsonl"), key=lambda file: file.stat().st_mtime)
        ours, trivial = (score(config, file) for file in (home, folder / name / "baseline.jsonl"))
        cells = [(found["scores"][metric], *found["intervals"][metric]) for found in (ours, trivial)]
        better = cells[0][1] > cells[1][2]
        beaten &= better
        shown = [f"{value:.3f} ({low:.3f} - {high:.3f})" for value, low, high in cells]
        print(f"{name:<15}{metric:<10}{ours['examples']:>7}   {shown[0]:<24}{shown[1]:<24}{'' if better else 'NOT beaten'}")
        references = {line["id"]: line for line in map(json.loads, (folder / name / "test.jsonl").read_text("utf-8").splitlines())}
        said = json.loads(home.read_text("utf-8").splitlines()[0])
        question = {key: value for key, value in references[said["id"]].items() if key != "id"}
        asked, answer = (json.dumps(thing, ensure_ascii=False) for thing in (question, said["prediction"]))
        samples += [name, f"  {asked[:300]}", f"  -> {answer[:200]}"]
    print("\nOne output of each\n" + "\n".join(samples))
    sys.exit(0 if beaten else 1)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("data", "table"):
        sys.exit(__doc__)
    {"data": make, "table": table}[sys.argv[1]](Path(sys.argv[2]))
