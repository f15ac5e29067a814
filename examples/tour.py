"""Texts and labelled examples of `launch/tour.sh`, made of what is on this machine, and the trivial
baselines.

Texts are docstrings of Python's standard library and of packages that PyTorch brings along, and the
messages of the machine's programs with their translations (gettext). What is tested comes from
files, templates and words that training has not seen: a file is on one side by the hash of its
name, and what also stands in a trained file is not tested.
"""

from __future__ import annotations

import ast
import builtins
import gettext
import hashlib
import itertools
import random
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from examples.tour_words import (
    ANSWERS,
    ASKED,
    DOES,
    FORMS,
    MADE_UP,
    PAIRS,
    PLACES,
    THING,
    WHAT,
    WHEN,
    WHO,
)

# Russian, the most translated language in another script: copying scores little there
LANGUAGE, LETTERS = (
    "ru",
    "[\u0400-\u04ff]",
)
LIBRARIES = "numpy", "networkx", "sympy"
SEEN = 100  # characters of what a summary is of
Doc = tuple[str, str, str]  # file, name, docstring
Pair = tuple[str, str, str]  # catalogue, English, translation
Example = dict[str, Any]
Split = dict[str, list[Example]]  # "train" and "test"


def is_test(name: str) -> bool:
    """Return whether a file is on the side that is tested: one in four."""
    return hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 4 == 0


def side_of(name: str) -> str:
    return "test" if is_test(name) else "train"


# ------------------------------------------------------------------------------------------ sources
def docstrings() -> list[Doc]:
    """Return the docstrings of modules, classes and functions of the standard library and of
    LIBRARIES.
    """
    standard, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    files = [
        (path, path.relative_to(root).as_posix())
        for root, folder in (
            (standard, standard),
            *((packages, packages / name) for name in LIBRARIES),
        )
        for path in sorted(folder.rglob("*.py"))
    ]
    found = list[Doc]()
    for path, file in files:
        if re.search(r"(^|/)(site-packages|dist-packages|tests?|idle_test|lib2to3)/", file):
            continue
        with suppress(SyntaxError, UnicodeDecodeError, ValueError):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                    text := ast.get_docstring(node)
                ):
                    found.append((file, getattr(node, "name", path.stem), text))
    return found


def messages() -> list[Pair]:
    """Return messages of the programs installed here and their Russian; none of names alone
    (countries), nor tested ones that any trained catalogue has, in capitals or not.
    """
    found = list[Pair]()
    for file in sorted(Path("/usr/share/locale").glob(f"{LANGUAGE}/LC_MESSAGES/*.mo")):
        with open(file, "rb") as catalogue, suppress(UnicodeDecodeError, OSError):
            if file.stem.startswith("iso_"):
                continue
            translations: Any = gettext.GNUTranslations(catalogue)
            for source, target in translations._catalog.items():
                if (
                    isinstance(source, str)
                    and "\x04" not in source
                    and re.search("[a-z]{3}", source)
                    and re.search(LETTERS, target)
                ):
                    found.append((file.stem, one_line(source), one_line(target)))
    trained = {letters(source) for file, source, _ in found if not is_test(file)}
    return [pair for pair in found if not is_test(pair[0]) or letters(pair[1]) not in trained]


def made_up_messages() -> list[Pair]:
    """Return what takes the place of ``messages``: sentences of a few words in English and
    Russian.
    """
    rng, found = random.Random(0), list[Pair]()
    for number in range(8000):
        side = side_of(file := f"made up {number % 200}")
        words = {
            key: rng.choice(several).split()
            for key, several in (
                ("when", WHEN),
                ("what", WHAT),
                ("what2", WHAT),
                ("who", WHO),
                ("does", DOES),
                ("thing", THING),
            )
        }
        form = rng.choice(MADE_UP[side])
        english, russian = (
            form.format(**{key: word[language] for key, word in words.items()})
            for language in (0, 1)
        )
        found.append((file, english.capitalize(), russian.replace("the ", "").capitalize()))
    return found


def one_line(text: str) -> str:
    return " ".join(text.split())


def letters(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def spoken(name: str) -> str:
    """Return the words of an identifier: ``getValue`` and ``get_value`` are "get value"."""
    return " ".join(re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name.replace("_", " ")).lower().split())


# ----------------------------------------------------------------------------- texts to pretrain on
def texts(docs: list[Doc], pairs: list[Pair]) -> dict[str, dict[str, str]]:
    """Return kind -> name -> text; nothing is in it of the files that are tested."""
    trained, rng = [doc for doc in docs if not is_test(doc[0])], random.Random(0)
    made: dict[str, dict[str, str]] = {
        kind: defaultdict(str) for kind in ("docstrings", "summaries", "copying", "messages")
    }
    for file, name, text in trained:
        first, _, rest = text.partition("\n\n")
        made["docstrings"][file] += f"{text}\n\n"
        made["summaries"][file] += (
            f"{one_line(rest)[:SEEN]}\n{spoken(name)}: {one_line(first)[:120]}\n\n"
        )
    words = [word for _, name, _ in trained for word in spoken(name).split()]
    # words of chance, each row of them six times: what follows can only be copied
    for number in range(40):
        rows = [" ".join(rng.choices(words, k=rng.randint(2, 8))) for _ in range(230)]
        made["copying"][str(number)] = "".join(f"{row}: " * 6 + "\n" for row in rows)
    for file, source, target in pairs:
        if not is_test(file):
            made["messages"][file] += f"{source}\n{target}\n"
    return made


# -------------------------------------------------------------------------------- labelled examples
def topics(docs: list[Doc]) -> Split:
    """Return docstrings and the package that each is from; of a large file some."""
    packages = {
        "asyncio",
        "email",
        "tkinter",
        "unittest",
        "xml",
        "http",
        "multiprocessing",
        "importlib",
        "idlelib",
        "distutils",
    }
    made: Split = {"train": [], "test": []}
    taken: Counter[str] = Counter()
    for file, _, text in docs:
        if (
            "/" in file
            and (label := file.split("/")[0]) in packages
            and len(text) > 40
            and taken[file] < 60
        ):
            taken[file] += 1
            made[side_of(file)].append({"text": one_line(text)[:400], "label": label})
    trained = {example["label"] for example in made["train"]}
    return {
        "train": made["train"],
        "test": [example for example in made["test"] if example["label"] in trained],
    }


def sentiment() -> Split:
    """Return sentences of templates; no template, thing or word is on both sides."""
    return {
        side: [
            {"text": form.format(place=place, word=word), "label": label}
            for form in FORMS[side]
            for place in PLACES[side]
            for pair in PAIRS[side]
            for word, label in zip(pair.split(), ("positive", "negative"), strict=True)
        ]
        for side in ("train", "test")
    }


def ner(docs: list[Doc]) -> Split:
    """Return sentences of docstrings in which names of modules and builtins are entities where they
    stand as code, not as English words (a list, random, all): with a dot or a capital, in quotes,
    before a parenthesis. A name is an entity on one side only.
    """
    kinds = {name: "MODULE" for name in sys.stdlib_module_names if len(name) > 2}
    kinds |= {
        name: "ERROR" if name.endswith(("Error", "Warning", "Exception")) else "BUILTIN"
        for name in dir(builtins)
        if name[0] != "_"
    }
    made: Split = {"train": [], "test": []}
    for file, _, text in docs:
        for sentence in re.split(r"(?<=[.!?])\s+|\n\n", text):
            words, tags, sides = list[str](), list[str](), set[str]()
            for match in re.finditer(r"\w+(?:\.\w+)*|[^\w\s]", sentence):
                pieces = re.findall(r"\w+|[^\w\s]", match[0])
                before, after = (
                    f" {sentence}"[match.start()],
                    sentence[match.end() : match.end() + 1],
                )
                as_code = pieces[1:] or pieces[0][0].isupper() or before in "`'\"" or after == "("
                kind = kinds.get(pieces[0]) if as_code else None
                words += pieces
                tags += (
                    [f"B-{kind}", *[f"I-{kind}"] * (len(pieces) - 1)]
                    if kind
                    else ["O"] * len(pieces)
                )
                sides |= {side_of(pieces[0])} if kind else set()
            if 4 < len(words) < 40 and sides == {side_of(file)}:
                made[side_of(file)].append({"words": words, "tags": tags})
    return made


def qa(docs: list[Doc]) -> Split:
    """Return questions about docstrings whose answers stand in them word for word; at least two of
    each docstring.
    """
    made: Split = {"train": [], "test": []}
    for file, name, text in docs:
        context, side = one_line(text)[:350], side_of(file)
        found = {
            kind: match
            for kind, pattern in ANSWERS.items()
            if (match := pattern.search(context)) and letters(match[1])
        }
        for kind, match in found.items() if len(found) > 1 else ():
            *trained, tested = ASKED[kind]
            made[side] += [
                {
                    "question": form.format(name=name),
                    "context": context,
                    "answers": {"text": [match[1]], "answer_start": [match.start(1)]},
                }
                for form in ([tested] if side == "test" else trained)
            ]
    return made


def summarization(docs: list[Doc]) -> Split:
    """Return how docstrings go on after their first line, with the words of the name behind; and
    that line.
    """
    made: Split = {"train": [], "test": []}
    for file, name, text in docs:
        first, _, rest = text.partition("\n\n")
        if 15 < len(first) < 120 and len(rest) > 60:
            made[side_of(file)].append(
                {"source": f"{one_line(rest)[:SEEN]}\n{spoken(name)}", "target": one_line(first)}
            )
    return made


def translation(pairs: list[Pair]) -> Split:
    """Return short messages without options and their translations; the tested ones have no gaps to
    fill either, just words.
    """
    made: Split = {"train": [], "test": []}
    for file, source, target in pairs:
        if 8 < len(source) < 60 and re.fullmatch(
            r"[A-Z]?[a-z ,.']+" if is_test(file) else r"[A-Za-z ,.:;'\"%()]+", source
        ):
            made[side_of(file)].append({"source": source, "target": target})
    return made


def untold(examples: list[Example], docs: list[Doc]) -> list[Example]:
    """Return the examples whose text stands in no docstring of a trained file."""
    known = letters(" ".join(text for file, _, text in docs if not is_test(file)))
    shown = (
        example.get("context")
        or example.get("text")
        or example.get("source")
        or " ".join(example["words"])
        for example in examples
    )
    return [
        example
        for example, text in zip(examples, shown, strict=True)
        if letters(text.split("\n")[0]) not in known
    ]


# ---------------------------------------------------------------------------------------- baselines
def baseline(task: str, train: list[Example], test: list[Example]) -> list[Example]:
    """Return predictions that nobody had to train a model for."""
    if task in ("topics", "sentiment"):
        # no constant is better
        [(label, _)] = Counter(example["label"] for example in test).most_common(1)
        return [{"id": example["id"], "prediction": label} for example in test]
    if task == "ner":
        tags: dict[str, Counter[str]] = defaultdict(Counter)
        for word, tag in itertools.chain.from_iterable(
            zip(example["words"], example["tags"], strict=True) for example in train
        ):
            tags[word][tag] += 1
        usual = {word: found.most_common(1)[0][0] for word, found in tags.items()}
        return [
            {"id": example["id"], "prediction": [usual.get(word, "O") for word in example["words"]]}
            for example in test
        ]
    if task in ("qa", "summarization"):
        text, said = (
            ("context", lambda one: one["answers"]["text"][0])
            if task == "qa"
            else ("source", lambda one: one["target"])
        )
        words = round(sum(len(said(example).split()) for example in train) / len(train))
        return [
            {"id": example["id"], "prediction": " ".join(example[text].split()[:words])}
            for example in test
        ]
    return [{"id": example["id"], "prediction": example["source"]} for example in test]
