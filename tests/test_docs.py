"""What README, CONTRIBUTING and docs/ claim is there: files, verbs, config keys and links."""
from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from hfscale.config.finetune import FinetuneConfig
from hfscale.config.inference import HarnessConfig, PredictConfig, ShardsConfig
from hfscale.config.schema import CorpusConfig, RunConfig
from launch.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
KINDS = (RunConfig, FinetuneConfig, PredictConfig, HarnessConfig, ShardsConfig)


def pages() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages()
def test_links_lead_somewhere(page: Path):
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", page.read_text()) if "://" not in t]
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pages()
def test_files_that_are_named_are_there(page: Path):
    named = re.findall(r"\b(?:hfscale|launch|configs|tests|benchmarks|docs|slurm)/[\w./-]*\w\.(?:py|yaml|sh|md|png)", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pages()
def test_verbs_exist(page: Path):
    used = re.findall(r"^(?:\s*\$ |\s*)hfscale ([a-z]+)|`hfscale ([a-z]+)", page.read_text(), flags=re.M)
    assert {a or b for a, b in used} <= set(VERBS)


@pages()
def test_config_keys_exist(page: Path):
    """`section.key` in back quotes, or as an override in a command, is in the schema."""
    wrong = []
    for section, key in re.findall(r"[`\s](\w+)\.(\w+)(?=[=`: ])", page.read_text()):
        kinds = [getattr(kind.model_fields.get(section), "annotation", None) for kind in KINDS]
        known = {field.alias or name for kind in kinds for name, field in getattr(kind, "model_fields", {}).items()}
        if known and key not in {"jsonl", "py"} | known:
            wrong.append(f"{section}.{key}")
    assert wrong == []


def test_the_corpus_yaml_in_the_docs_is_valid():
    block = re.search(r"```yaml\n(source:.*?)```", (ROOT / "docs" / "data.md").read_text(), flags=re.S)
    assert block is not None
    assert CorpusConfig(**yaml.safe_load(block[1])).shards.name == "shard"


def test_scripts_parse():
    for script in [*ROOT.glob("launch/*.sh"), *ROOT.glob("tests/*.sh"), *ROOT.glob("slurm/*.sbatch"), ROOT / ".ci" / "run"]:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_quickstart_knows_its_usage():
    done = subprocess.run(["bash", "launch/quickstart.sh", "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "quickstart.sh [FOLDER]" in done.stdout
    assert "set -e" not in done.stdout  # the comment only, no code


def test_the_quickstart_refuses_a_folder_that_is_not_there(tmp_path: Path):
    done = subprocess.run(["bash", "launch/quickstart.sh", str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(tmp_path / "none") in done.stderr
