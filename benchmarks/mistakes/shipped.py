"""The configs that hfscale ships, each rehearsed: whatever fails is a false alarm.

    python -m benchmarks.mistakes.shipped [--only PART_OF_A_NAME] [--home FOLDER] [--whole]

Their data are not here: stand-ins lie in a folder of its own at the paths that the configs name,
of Python's own source and, for labelled tables, of the scripts in ``docs/tasks``. Of a pretrained
model there is one of the same architecture and width with weights drawn by chance. Nothing else is
said on the command line but ``model.pretrained``, and which parts are left out (--whole: none).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

from benchmarks.common import machine, record, table, verdict
from tests.helpers.cli import ROOT, hfscale

CORPUS, MIB = "data/corpus", 2**20
PAGES = {  # of docs/tasks, whose script writes the table of a config
    "embedding": "embedding",
    "instruction": "instruction",
    "ner": "token_classification",
    "qa": "extractive_qa",
    "sentiment": "sequence_classification",
    "summarization": "summarization",
    "translation": "translation",
}
FASTER = ("signal", "one rank stopped", "another world size")  # alike for every run
# like those that the configs name; of Qwen fewer layers, which all are alike
BERT = (BertConfig(), "tokenizer-bert")
QWEN = Qwen2Config(
    hidden_size=896,
    num_hidden_layers=4,
    num_attention_heads=14,
    num_key_value_heads=2,
    intermediate_size=4864,
    layer_types=None,
)
ROBERTA = RobertaConfig(num_hidden_layers=6, max_position_embeddings=514, type_vocab_size=1)
PRETRAINED: dict[str, tuple[PretrainedConfig, str]] = {
    "google-bert/bert-base-uncased": BERT,
    "google-bert/bert-base-cased": BERT,
    "distilbert/distilroberta-base": (ROBERTA, "tokenizer-bert"),
    "openai-community/gpt2": (GPT2Config(), "tokenizer"),
    "Qwen/Qwen2.5-0.5B": (QWEN, "tokenizer"),
    "google-t5/t5-small": (T5Config(), "tokenizer-t5"),
}


@dataclass
class Outcome:
    """Of one config: the stages that speak against it, or what the command said instead."""

    config: str
    code: int
    wrong: list[str]
    warned: list[str]
    left_out: list[str]
    seconds: float


def make_text(home: Path) -> None:
    """Write the text, tokenizers and shards that pretraining configs name."""
    folder = home / "data" / "text"
    folder.mkdir(parents=True)
    size = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        shutil.copy(file, folder / f"{file.stem}.txt")
        size += file.stat().st_size
        if size > 6 * MIB:
            break
    corpus = ROOT / "configs/pretrain/corpus.yaml"
    some = ["tokenizer.vocab_size=8192", "split.validation=0.05"]
    hfscale("tokenizer", "train", corpus, *some, cwd=home)
    hfscale("shards", "build", corpus, *some, cwd=home)
    plain = f"{CORPUS}/tokenizer"
    for name in ("bert", "bart"):
        words = ["mask=<mask>", "cls=<s>", "pad=<pad>"]
        hfscale("tokenizer", "add", plain, f"{plain}-{name}", *words, cwd=home)
    hfscale("tokenizer", "add", plain, f"{plain}-t5", "pad=<pad>", "sentinels=100", cwd=home)
    for name in ("web", "code", "books", "quickstart"):  # they are told apart by their names
        shutil.copytree(home / CORPUS, home / "data" / name)


def make_tables(home: Path) -> None:
    """Write the labelled tables, as the pages of the tasks do."""
    for page in PAGES.values():
        text = (ROOT / "docs" / "tasks" / f"{page}.md").read_text()
        scripts = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        [script] = [one for one in scripts if '"w", encoding="utf-8"' in one]
        subprocess.run([sys.executable, "-c", script], cwd=home, check=True, capture_output=True)


def make_models(home: Path) -> None:
    """Write the pretrained models: of the sizes, not of the weights."""
    for name, (config, tokenizer_name) in PRETRAINED.items():
        tokenizer = AutoTokenizer.from_pretrained(home / CORPUS / tokenizer_name)
        config.vocab_size = len(tokenizer)
        for token in ("bos", "eos", "pad"):
            setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
        if config.model_type == "roberta":  # its positions begin behind the id of its padding
            config.max_position_embeddings += tokenizer.pad_token_id
        if config.model_type == "t5":
            config.decoder_start_token_id = tokenizer.pad_token_id
        folder = home / "models" / name
        AutoModel.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def rehearse(config: Path, home: Path, *, left_out: tuple[str, ...]) -> Outcome:
    """Return what a rehearsal of a shipped config says."""
    words = [word for name in left_out for word in ("--skip", name)]
    named = re.search(r"pretrained: ([\w./-]+)", config.read_text())
    if named:
        words.append(f"model.pretrained={home / 'models' / named[1]}")
    began = time.monotonic()
    done = hfscale(
        "rehearse", config, "--procs", 2, "--json", *words, cwd=home, check=False, timeout_s=1800
    )
    seconds = time.monotonic() - began
    name = f"{config.parent.name}/{config.stem}"
    if not done.stdout.startswith("{"):
        return Outcome(name, done.returncode, [done.stderr[-1500:]], [], [], seconds)
    stages = json.loads(done.stdout)["stages"]

    def of(*states: str) -> list[str]:
        return [f"{one['name']}: {one['words']}" for one in stages if one["state"] in states]

    wrong = of("fail", "missed")
    return Outcome(name, done.returncode, wrong, of("warn"), of("left out"), seconds)


def report(outcomes: list[Outcome], *, on: str, left_out: tuple[str, ...]) -> str:
    """Return the section of RESULTS.md."""
    rows = [
        [
            one.config,
            "false alarm" if one.code else "passed",
            "; ".join([*one.wrong, *one.warned]).replace("\n", " ")[:300] or "none",
            f"{one.seconds:.0f}",
        ]
        for one in outcomes
    ]
    alarms = sum(one.code != 0 for one in outcomes)
    parts = f" The parts `{'`, `'.join(left_out)}` were left out." if left_out else ""
    return "\n\n".join(
        [
            f"{on} `hfscale rehearse CONFIG --procs 2` "
            "of each config that is shipped, on the CPU, with stand-ins for data and pretrained "
            f"weights.{parts}",
            table(["config", "verdict", "what failed or was warned of", "s"], rows),
            f"{len(outcomes)} configs, {alarms} false alarms, {verdict(alarms, at_most=0)}.",
        ]
    )


def main() -> None:
    """Make the stand-ins, rehearse, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="configs whose name has this")
    parser.add_argument("--home", type=Path, help="the folder of the stand-ins, kept")
    parser.add_argument("--whole", action="store_true", help="leave nothing out")
    options = parser.parse_args()
    home = options.home or Path(tempfile.mkdtemp(prefix="hfscale-shipped-"))
    if not (home / "models").is_dir():
        make_text(home)
        make_tables(home)
        make_models(home)
    files = [*(ROOT / "configs").glob("[dfp]*/*.yaml")]  # debug, finetune, pretrain
    chosen = [one for one in sorted(files) if one.stem != "corpus" and options.only in str(one)]
    left_out = () if options.whole else FASTER
    on, outcomes = machine("torch", "deepspeed", "transformers"), []
    for config in chosen:
        outcomes.append(rehearse(config, home, left_out=left_out))
        one = outcomes[-1]
        print(
            f"{one.seconds:6.1f} s  {one.code}  {one.config}  {one.wrong}{one.warned}", flush=True
        )
    if not options.home:
        shutil.rmtree(home)
    text = report(outcomes, on=on, left_out=left_out)
    if options.only:
        print(text)
    else:
        record("shipped", text)


if __name__ == "__main__":
    main()
