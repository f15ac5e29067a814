"""Models of strangers: none of their code runs, no pickle is opened, and one folder is one model
however it is opened.
"""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hfscale.checkpoint.weights import open_weights
from hfscale.config.inference import Inference
from hfscale.config.permission import ALLOWED
from hfscale.config.schema import RunConfig
from hfscale.errors import CheckpointError, ConfigError, DataError, UserError
from hfscale.jobs.asked import settle
from hfscale.jobs.export import _block, _cell, usage
from hfscale.objectives.base import Setting
from hfscale.objectives.mlm import MaskedLM
from hfscale.run.model import find
from hfscale.run.run import Run
from hfscale.tokenizer import load_tokenizer
from tests.helpers.corpus import run_values
from tests.test_house import MODULES, TREES, relative

CAUSAL = "AutoModelForCausalLM"


@pytest.fixture(scope="module")
def good(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    torch.manual_seed(0)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to do harm to, before a user who answers every question with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv(ALLOWED, "")
    shutil.copytree(good, tmp_path / "model")
    return tmp_path / "model"


def brings_code(folder: Path, file: str, names: dict[str, str]) -> Path:
    """Let ``folder`` bring code that leaves a mark; return the mark."""
    mark = folder.parent / "ran"
    code = f"open({str(mark)!r}, 'w')\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code)
    said = json.loads((folder / file).read_text())
    said |= {"auto_map": {name: f"evil.{kind}" for name, kind in names.items()}}
    said |= (
        {"model_type": "evil"} if file == "config.json" else {"tokenizer_class": "EvilTokenizer"}
    )
    (folder / file).write_text(json.dumps(said))
    return mark


def test_code_that_a_model_brings_is_neither_run_nor_asked_about(corpus: Path, model: Path):
    mark = brings_code(model, "config.json", {"AutoConfig": "Evil", CAUSAL: "Evil"})
    values = run_values(
        corpus,
        model.parent,
        "run",
        model={"architecture": None, "config": {}, "pretrained": str(model)},
        tokenizer={"path": str(corpus / "tokenizer")},
    )
    for look in (
        lambda: find(model).read(),
        lambda: settle(find(model), task=None, data="-", out=Path("-"), overrides=[]),
        lambda: find(model).engine(CAUSAL, Inference()),
        lambda: find(model).engine(CAUSAL, Inference(zero_stage=3)),
        lambda: Run(RunConfig.model_validate(values)).check(),
    ):
        with pytest.raises((CheckpointError, ConfigError), match="brings code of its own"):
            look()
    assert not mark.exists()
    assert sys.stdin.read(1) == "y"  # nobody was asked


def test_code_that_a_tokenizer_brings_is_not_run(model: Path):
    mark = brings_code(model, "tokenizer_config.json", {"AutoTokenizer": "Evil"})
    with suppress(DataError):  # transformers may know what tokenizer.json is without that code
        load_tokenizer(model)
    assert not mark.exists()
    assert sys.stdin.read(1) == "y"


def test_no_pickle_is_opened(model: Path):
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    for stage in (0, 3):
        with pytest.raises(CheckpointError, match="safetensors"):
            find(model).engine(CAUSAL, Inference(zero_stage=stage))


def test_an_adapter_beside_whole_weights_is_refused_however_it_is_opened(model: Path):
    """transformers would add it, and our reader would not: one MODEL, two losses."""
    (model / "adapter_config.json").write_text("{}")
    said = set()
    for look in (
        lambda: find(model).engine(CAUSAL, Inference()),
        lambda: find(model).engine(CAUSAL, Inference(zero_stage=3)),
        lambda: open_weights(model),
    ):
        with pytest.raises(CheckpointError) as error:
            look()
        said.add(str(error.value))
    assert len(said) == 1 and "holds an adapter" in said.pop()


def test_every_loader_says_what_it_trusts():
    """transformers asks on stdin where nothing is said, and opens pickles where there are no
    safetensors.
    """
    wrong = []
    for path in MODULES:
        for node in ast.walk(TREES[path]):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner, said = ast.unparse(node.func.value), {word.arg for word in node.keywords}
            place = f"{relative(path)}:{node.lineno}"
            auto = owner.startswith(("Auto", "getattr(transformers")) or owner == "kind"
            if node.func.attr in ("from_pretrained", "from_config") and auto:
                of_ours = "use_safetensors" in said  # just written: its class is known
                if "trust_remote_code" not in said and not of_ours:
                    wrong.append(f"{place}: trust_remote_code")
            weightless = owner in ("AutoConfig", "AutoTokenizer", "GenerationConfig", "PeftModel")
            loads = node.func.attr == "from_pretrained" and not weightless
            if loads and "use_safetensors" not in said:
                wrong.append(f"{place}: use_safetensors")
    assert not wrong, "\n".join(wrong)


EVIL = '" if open("ran", "w") else "'


def test_lines_that_use_a_model_do_what_they_say_whatever_it_is_called(corpus: Path):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    tokenizer.add_special_tokens({"mask_token": EVIL, "cls_token": "<c>", "sep_token": "<s>"})
    objective = MaskedLM(MaskedLM.Options(), Setting(seq_len=8, tokenizer=tokenizer))
    lines = usage(objective, f"o{EVIL}")
    texts = [node.value for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Constant)]
    assert f"o{EVIL}" in texts and f"Once upon a {EVIL}" in texts
    calls = [node for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Call)]
    assert {ast.unparse(call.func) for call in calls} == {"pipeline", "use", "print"}


def test_names_neither_leave_their_cell_nor_their_block():
    cell = _cell("a |\n\n<script>`x` [y](z) ![i](http://b:c@d)\x1b")
    plain = r"a \|\\n\\n&lt;script>\`x\` \[y\](z) !\[i\](http://\*\*\*@d)\\x1b"
    assert cell == plain
    assert _block("yaml", "a: 1\n````\nb").startswith("`````yaml\n")
    assert issubclass(CheckpointError, UserError)
