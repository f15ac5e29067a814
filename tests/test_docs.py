"""What README, CONTRIBUTING and docs/ claim is there: files, verbs, configs, commands and their
keys, links; a page for each task.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from hfscale.config.corpus import CorpusConfig
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.inference import HarnessConfig, PredictConfig, ShardsConfig
from hfscale.config.load import load_config
from hfscale.config.schema import RunConfig
from hfscale.objectives.base import check_options
from hfscale.tasks.table import TASKS, task_class
from launch.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
TASK_PAGES = sorted((ROOT / "docs" / "tasks").glob("*.md"))
OVERVIEW = ROOT / "docs" / "tasks.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *TASK_PAGES])
KINDS = (RunConfig, FinetuneConfig, PredictConfig, HarnessConfig, ShardsConfig)


def pages() -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
    )


def blocks(page: Path, kind: str) -> list[str]:
    """Return the blocks of a kind (yaml, bash, python, json) of a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text("utf-8"), flags=re.S | re.M)


def linked_tasks() -> dict[str, Path]:
    """Return the page that the overview links for each task."""
    links = re.findall(r"\[((?:`\w+`(?:, )?)+)\]\((tasks/\w+\.md)\)", OVERVIEW.read_text("utf-8"))
    return {
        name: OVERVIEW.parent / target
        for names, target in links
        for name in re.findall(r"`(\w+)`", names)
    }


@pages()
def test_links_lead_somewhere(page: Path):
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", page.read_text()) if "://" not in t]
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pages()
def test_headings_that_are_linked_are_there(page: Path):
    wrong = []
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text("utf-8")):
        headings = re.findall(
            r"^#+ (.*)$", (page.parent / target if target else page).read_text("utf-8"), flags=re.M
        )
        if anchor not in {
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
        }:
            wrong.append(f"{target}#{anchor}")
    assert wrong == []


@pages()
def test_files_that_are_named_are_there(page: Path):
    named = re.findall(
        r"\b(?:hfscale|launch|configs|tests|benchmarks|docs|slurm)/[\w./-]*\w\.(?:py|yaml|sh|md|png)",
        page.read_text(),
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pages()
def test_verbs_exist(page: Path):
    used = re.findall(
        r"^(?:\s*\$ |\s*)hfscale ([a-z]+)|`hfscale ([a-z]+)", page.read_text(), flags=re.M
    )
    assert {a or b for a, b in used} <= set(VERBS)


@pages()
def test_config_keys_exist(page: Path):
    """`section.key` in back quotes, or as an override in a command, is in the schema."""
    wrong = []
    for section, key in re.findall(r"[`\s](\w+)\.(\w+)(?=[=`: ])", page.read_text()):
        kinds = [getattr(kind.model_fields.get(section), "annotation", None) for kind in KINDS]
        known = {
            field.alias or name
            for kind in kinds
            for name, field in getattr(kind, "model_fields", {}).items()
        }
        if known and key not in {"jsonl", "py"} | known:
            wrong.append(f"{section}.{key}")
    assert wrong == []


def commands(page: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield (words of a command after ``hfscale``, its overrides) of a page's bash blocks."""
    for line in "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["hfscale"]:
            plain = [
                word
                for before, word in pairwise(words)
                if not f"{before} {word}".startswith("--") and not word.startswith("--")
            ]
            yield plain, [word for word in plain if re.match(r"[\w.]+=", word)]


@pages()
def test_commands_are_understood(page: Path):
    """Overrides of a config go through its schema; those of evaluate and predict are of a section,
    or options of the page's tasks.
    """
    tasks = [name for name, place in linked_tasks().items() if place == page] or [*TASKS]
    for (verb, *words), overrides in commands(page):
        file = next((ROOT / word for word in words if word.startswith("configs/")), None)
        if file is not None:
            corpus = verb in ("tokenizer", "shards")
            config = (
                load_config(file, overrides, schema=CorpusConfig)
                if corpus
                else load_config(file, overrides).config
            )
            if isinstance(config, FinetuneConfig):
                check_options(
                    task_class(config.task.name).Options, config.task.options, where="task.options"
                )
        elif verb in ("evaluate", "predict"):
            known = {
                *PredictConfig.model_fields,
                *(field for name in tasks for field in task_class(name).Options.model_fields),
            }
            assert {override.split("=")[0].split(".")[0] for override in overrides} <= known | {
                *RunConfig.model_fields
            }, overrides


@pytest.mark.parametrize("page", [OVERVIEW, *TASK_PAGES], ids=lambda page: page.name)
def test_configs_of_tasks_are_valid(page: Path, tmp_path: Path):
    """A whole config loads as it is, a part of one on top of a shipped one."""
    file = tmp_path / "config.yaml"
    for block in blocks(page, "yaml"):
        part = "task" not in yaml.safe_load(block)
        base = f"extends: [{ROOT}/configs/finetune/sentiment.yaml]\n" if part else ""
        file.write_text(base + block.replace("../", f"{ROOT}/configs/"), "utf-8")
        config = load_config(file, schema=FinetuneConfig).config
        check_options(
            task_class(config.task.name).Options, config.task.options, where="task.options"
        )


def test_each_task_has_a_page():
    assert {*linked_tasks()} == {*TASKS}
    assert {*linked_tasks().values()} == {*TASK_PAGES}


@pytest.mark.parametrize("page", TASK_PAGES, ids=lambda page: page.name)
def test_a_page_of_a_task_is_complete(page: Path):
    """Mathematics with a source, the shipped config, rows, a script that makes data, commands, and
    how the export is used.
    """
    text, names = (
        page.read_text("utf-8"),
        [name for name, place in linked_tasks().items() if place == page],
    )
    assert re.search(r"\d{4},\s\[.*\]\(https://", text) and re.search(
        r"^ {4}\w.* = ", text, flags=re.M
    )
    assert (
        blocks(page, "json")
        and len(blocks(page, "python")) >= 2
        and "from transformers import pipeline" in blocks(page, "python")[-1]
    )
    verbs = {words[0] for words, _ in commands(page)}
    if names == [page.stem]:
        [name] = re.findall(r"^`(configs/finetune/\w+\.yaml)`:$", text, flags=re.M)
        file = ROOT / name
        assert blocks(page, "yaml") == [re.sub(r"\A(#.*\n)+", "", file.read_text("utf-8"))]
        assert load_config(file).config.task.name == page.stem and verbs >= {
            "finetune",
            "evaluate",
            "predict",
            "export",
        }
        assert all(f"`{role}`" in text for role in task_class(page.stem).columns)
    told = text + (ROOT / "docs" / "tasks" / "translation.md").read_text("utf-8") * (
        "(translation.md#options)" in text
    )
    assert all(
        f"`{option}`" in told for name in names for option in task_class(name).Options.model_fields
    )
    assert verbs >= {"predict", "export"}


def test_messages_of_the_faq_are_still_said():
    """Word by word as in the code; what is in braces there may be any word here, and ``...`` leaves
    some out.
    """
    files = [path for top in ("hfscale", "launch") for path in (ROOT / top).rglob("*.py")]
    # a message over two lines is one
    code = " ".join(re.sub(r'["\']\s*\n\s*f?["\']', "", path.read_text("utf-8")) for path in files)
    code = re.sub(r"\{[^{}]*\}", "{}", code)
    rows = re.findall(r"^\| (`.*?) \| ", (ROOT / "docs" / "faq.md").read_text("utf-8"), flags=re.M)
    messages = [message for row in rows for message in re.findall(r"`([^`]+ [^`]+)`", row)]
    assert len(messages) > 45

    def said(message: str) -> bool:
        words = [
            ".{0,200}?" if word == "..." else rf"(?:{re.escape(word)}|[^\s{{}}]*{{}}[^\s{{}}]*)"
            for word in message.split()
        ]
        return re.search(r"\s+".join(words), code) is not None

    assert [message for message in messages if not said(message)] == []


def test_the_corpus_yaml_in_the_docs_is_valid():
    block = re.search(
        r"```yaml\n(source:.*?)```", (ROOT / "docs" / "data.md").read_text(), flags=re.S
    )
    assert block is not None
    assert CorpusConfig(**yaml.safe_load(block[1])).shards.name == "shard"


def test_scripts_parse():
    for script in [
        *ROOT.glob("launch/*.sh"),
        *ROOT.glob("tests/*.sh"),
        *ROOT.glob("slurm/*.sbatch"),
        ROOT / ".ci" / "run",
    ]:
        done = subprocess.run(
            ["bash", "-n", str(script)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_quickstart_knows_its_usage():
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "quickstart.sh [FOLDER]" in done.stdout
    assert "set -e" not in done.stdout  # the comment only, no code


def test_the_quickstart_refuses_a_folder_that_is_not_there(tmp_path: Path):
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", str(tmp_path / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert str(tmp_path / "none") in done.stderr
