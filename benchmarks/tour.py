"""The data of `launch/tour.sh`, made on this machine, its trivial baselines, and the table of scores that it ends with.

    python -m benchmarks.tour data FOLDER        # texts, labelled examples, configs
    python -m benchmarks.tour table FOLDER       # after training and evaluation

Texts are docstrings of Python's standard library and of packages that PyTorch brings along, and the messages of the machine's
programs with their translations (gettext). What is tested comes from files, templates and words that training has not seen: a file
is on one side by the hash of its name.

- topics        which part of the library a docstring is from                   baseline: the label most frequent there
- sentiment     sentences from templates, with words like careful and careless  baseline: the most frequent label
- ner           dotted names in docstrings                                       baseline: the tag that a word most often had, else O
- qa            what a docstring's function returns, raises, does when ...       baseline: the context's first words, as many as answers have
- summarization the first line of a docstring out of the rest and the name      baseline: lead, as many words as summaries have
- translation   messages of programs, English to Russian                         baseline: copy
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

LANGUAGE, LETTERS = "ru", "[\u0400-\u04ff]"  # Russian, the most translated language in another script
LIBRARIES = "numpy", "networkx", "sympy"
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

ASKED = {  # kind of answer -> how training asks for it, how the test does
    "return": ("What does {name} return?", "What is returned by {name}?", "What value is the return of {name}?"),
    "condition": ("When does this hold for {name}?", "In which case is it so?", "In which case does {name} do this, and when?"),
    "raise": ("Which error does {name} raise?", "What exception is raised?", "Which exception or error may {name} raise?"),
    "default": ("What is the default of {name}?", "Which value is the default?", "What does {name} take as the default?"),
    "use": ("What is {name} used for?", "What is the use of {name}?", "For what use is {name}?")}
END = r"(?=[.;:,](?:\s|$)|\s(?:if|when|unless|and|or|where|which|that)\s|$)"
ANSWERS = {kind: re.compile(pattern) for kind, pattern in {
    "return": r"\b[Rr]eturns?\s+(\S.{3,70}?)" + END,
    "condition": r"\b(?:[Ii]f|[Ww]hen|[Uu]nless)\s+(\S.{3,70}?)(?=[.;:,](?:\s|$)|\sthen\s|$)",
    "raise": r"\b[Rr]ais(?:es?|ed|ing)\s+(?:an?\s+|the\s+)?(\w*(?:Error|Exception|Warning|Exit|Interrupt)\w*)",
    "default": r"\b[Dd]efaults? (?:value )?(?:is|to)\s+(\S.{0,40}?)" + END,
    "use": r"\bused (?:to|for|as|by)\s+(\S.{3,70}?)" + END}.items()}


def is_test(name: str) -> bool:
    """Return whether a file is on the side that is tested: one in four."""
    return hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 4 == 0


# ------------------------------------------------------------------------------------------------ sources
def docstrings() -> Iterator[tuple[str, str, str]]:
    """Yield (file, name, docstring) of the modules, classes and functions of the standard library and of LIBRARIES."""
    standard, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    files = [(path, path.relative_to(root).as_posix()) for root, folder in (
        (standard, standard), *((packages, packages / name) for name in LIBRARIES)) for path in sorted(folder.rglob("*.py"))]
    for path, file in files:
        if re.search(r"(^|/)(site-packages|dist-packages|tests?|idle_test|lib2to3)/", file):
            continue
        with suppress(SyntaxError, UnicodeDecodeError, ValueError):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                    yield file, getattr(node, "name", path.stem), text


def messages() -> Iterator[tuple[str, str, str]]:
    """Yield (catalogue, English, Russian) of the programs installed here; names of countries and the like are left out."""
    for file in sorted(Path("/usr/share/locale").glob(f"{LANGUAGE}/LC_MESSAGES/*.mo")):
        with open(file, "rb") as catalogue, suppress(UnicodeDecodeError, OSError):
            if file.stem.startswith("iso_"):
                continue
            for source, target in gettext.GNUTranslations(catalogue)._catalog.items():  # type: ignore[attr-defined]
                if isinstance(source, str) and "\x04" not in source and re.search("[a-z]{3}", source) and re.search(LETTERS, target):
                    yield file.stem, one_line(source), one_line(target)


def made_up_messages() -> Iterator[tuple[str, str, str]]:
    """Yield what takes the place of ``messages``; numbers are of one side only."""
    rng = random.Random(0)
    for _ in range(6000):
        file = f"made up {rng.randrange(40)}"
        files, folders = (2 * rng.randint(1, 49) + is_test(file) for _ in range(2))
        yield file, f"{files} files in {folders} folders", f"в папках ({folders}) файлов: {files}"


def spoken(name: str) -> str:
    """Return the words of an identifier: ``getValue`` and ``get_value`` are "get value"."""
    return " ".join(re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name.replace("_", " ")).lower().split())


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


def qa(docs: list[tuple[str, str, str]]) -> Split:
    """Return questions about docstrings whose answers stand in them word for word."""
    made: Split = {"train": [], "test": []}
    for file, name, text in docs:
        context, side = one_line(text)[:350], "test" if is_test(file) else "train"
        found = {kind: match for kind, pattern in ANSWERS.items() if (match := pattern.search(context))}
        for kind, match in found.items() if len(context) > 60 else ():
            *trained, tested = ASKED[kind]
            made[side] += [{"question": form.format(name=name), "context": context, "answers": {
                "text": [match[1]], "answer_start": [match.start(1)]}} for form in ([tested] if side == "test" else trained)]
    return made


def summarization(docs: list[tuple[str, str, str]]) -> Split:
    """Return docstrings without their first line, but with the words of the name behind them; and that line."""
    made: Split = {"train": [], "test": []}
    for file, name, text in docs:
        first, _, rest = text.partition("\n\n")
        if 15 < len(first) < 120 and len(rest) > 60:
            source = f"{one_line(rest)[:300]} Name: {spoken(name)}."
            made["test" if is_test(file) else "train"].append({"source": source, "target": one_line(first)})
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
    if task in ("qa", "summarization"):
        text, said = ("context", lambda one: one["answers"]["text"][0]) if task == "qa" else ("source", lambda one: one["target"])
        words = round(sum(len(said(example).split()) for example in train) / len(train))
        return [{"id": example["id"], "prediction": " ".join(example[text].split()[:words])} for example in test]
    return [{"id": example["id"], "prediction": example["source"]} for example in test]


# ---------------------------------------------------------------------------------------------------- configs
SIZES: dict[str, dict[str, Any]] = {
    "encoder": {"model": {"architecture": "modernbert", "config": {
        "num_hidden_layers": 4, "hidden_size": 192, "num_attention_heads": 4, "intermediate_size": 288, "max_position_embeddings": 512}},
        "objective": {"name": "mlm", "options": {"units": "word", "select": 0.2}}},
    "decoder": {"model": {"architecture": "gpt2", "config": {
        "n_layer": 4, "n_embd": 192, "n_head": 4, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}},
        "objective": {"name": "clm"}},
    "encoder-decoder": {"model": {"architecture": "mbart", "config": {
        "d_model": 192, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "max_position_embeddings": 256, "dropout": 0.0, "attention_dropout": 0.0,
        "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}}, "objective": {"name": "seq2seq", "options": {"noise": "bart"}}}}
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {  # begins with, task, what differs, the metric that counts
    "topics": ("encoder", {"name": "sequence_classification"}, {"train": {"steps": 150}}, "accuracy"),
    "sentiment": ("encoder", {"name": "sequence_classification"}, {"train": {"steps": 150}}, "accuracy"),
    "ner": ("encoder", {"name": "token_classification"}, {"train": {"steps": 150}}, "f1"),
    "qa": ("encoder", {"name": "extractive_qa"}, {"train": {"steps": 300}}, "f1"),
    "summarization": ("decoder", {"name": "summarization", "options": {"prompt": "{source}\nIn one line: ", "max_target_length": 24,
                                                                       "generation": {"max_new_tokens": 24, "num_beams": 2}}},
                      {"data": {"max_length": 128}, "train": {"steps": 400}}, "rouge1"),
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
        print("    few programs here have a Russian translation: sentences about files and folders take their place")
        pairs = list(made_up_messages())
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for file in {file for file, _, _ in docs if not is_test(file)}:
        said = "\n\n".join(f"Name: {spoken(name)}.\n{text}" for of, name, text in docs if of == file)
        (folder / "text" / (file.replace("/", "-") + ".txt")).write_text(said, "utf-8")
    for file in {file for file, _, _ in pairs if not is_test(file)}:
        said = "\n".join(f"{source}\n{target}" for of, source, target in pairs if of == file)
        (folder / "text" / f"messages-{file.replace('/', '-')}.txt").write_text(said, "utf-8")
    made = {"topics": topics(docs), "sentiment": sentiment(), "ner": ner(docs), "qa": qa(docs), "summarization": summarization(docs),
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
    from hfscale.jobs.evaluate import score
    from hfscale.jobs.opening import settle

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
