"""What cannot be done is refused with exit code 2, in the same words, and as early as it can be
known: the first table without torch, the second once tokenizer, data and model were looked at.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfscale.config.load import load_config, to_yaml
from launch.job import Training
from launch.request import Request
from tests.helpers.cli import ROOT
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train
from tests.run.refusals import answer, prepare

pytestmark = pytest.mark.slow

# what all requests begin with -> how each goes on, and how what is said begins
LIGHT = {
    "pretrain run.yaml --dry-run --procs 1": """
        train.stepz=3 -> 1 error in the config run.yaml
        --launcher loca -> unknown launcher 'loca'
        engine.precision=fp16 -> fp16 needs a GPU
        run.name=a/b -> 1 error in the config run.yaml
        run.name=foreign -> this folder is not a run directory and not empty
        run.name=file -> the run directory is a file
        data.sources.0.shards=./nowhere -> there is no manifest of shards
        data.sources.0.shards=./corpus -> there is no manifest of shards
        data.sources.0.shards=./empty -> an empty source: it has no tokens
        data.sources.0.shards=./none
            -> the manifest is damaged: token shards name their tokenizer, raw text has none
        data.sources.0.shards=./newer -> a manifest of an unknown version
        data.sources.0.shards=./gone -> 1 files of the shards are missing
        data.sources.0.shards=./broken
            -> the manifest is damaged: not JSON: EOF while parsing an object at line 1 column 1
        'data.sources.0.shards=pipe:cat x' -> this source runs a command, which needs permission
        data.sources.0.shards=http://me:word@127.0.0.1:1/x
            -> a password stands in a URL: it would go into config.yaml and the logs
        data.sources.0.shards=nosuch://x/y
            -> this kind of URL cannot be opened: Protocol not known: nosuch
        data.sources.0.shards=http://127.0.0.1:1/x data.cache.retries=0 data.cache.folder=./kept
            -> cannot fetch, attempt 1: ClientConnectorError
        data.seq_len=1000000 -> no shard is as long as a row
        'data.validation={shards: ./nowhere, every_steps: 1}' -> there is no manifest of shards
        'data.validation={shards: ./empty, every_steps: 1}' -> an empty source: it has no tokens
        'data.validation={shards: ./gone, every_steps: 1}' -> 1 files of the shards are missing
        data.sources.0.shards=./raw train.epochs=1 train.steps=null
            -> how many rows raw text has is not known before it is tokenized
        data.sources.0.shards=./raw data.lanes=3
            -> raw text needs lanes that divide the global batch, and a sample of each source for ea
        tokenizer.path=./nowhere -> there is no tokenizer
        'model.lora={r: 2}' -> 1 error in the config run.yaml
    """,
    "pretrain two.yaml --dry-run --procs 1": """
        data.sources.0.weight=0 data.sources.1.weight=0 -> 1 error in the config two.yaml
        data.sources.1.name=big -> 1 error in the config two.yaml
        data.lanes=1000000 -> more lanes than rows of an epoch
        'data.stages=[{at: 3, weights: {bgi: 1}}]' -> 1 error in the config two.yaml
        'data.stages=[{at: 0.5, weights: {big: 2}}, {at: 0.5, weights: {big: 1}}]'
            -> a stage must begin after the one before it
        data.sources.1.weight=1e-9
            -> the weight of small is too small: it gives no row in a block of 1024
        data.sources.1.shards=./wide -> the sources have ids of unlike dtypes
        data.sources.0.max_epochs=0.01 data.sources.1.max_epochs=0.01 train.steps=1000
            -> every source has given its max_epochs
    """,
    "pretrain done.yaml --dry-run --procs 1": """
        run.seed=4 -> this run has trained with another config; a resume cannot change:
        data.sources.0.shards=./held -> source text of the checkpoint has other data
        tokenizer.path=./prefixed
            -> this run has trained with another config; a resume cannot change:
    """,
    "finetune task.yaml --dry-run --procs 1": """
        data.train=./nowhere.jsonl -> there is no such table
        data.validation=./nowhere.jsonl -> there is no such table
        data.test=./nowhere.jsonl -> there is no such table
        'tokenizer={path: ./nowhere}' -> there is no tokenizer
    """,
    "pretrain run.yaml --dry-run --launcher debug": """
        data.sources.0.shards=./nowhere -> there is no manifest of shards
    """,
    "finetune task.yaml --dry-run --launcher debug": """
        data.train=./nowhere.jsonl -> there is no such table
    """,
    "": """
        pretrain nowhere.yaml -> cannot read the config: No such file or directory
        pretrain nothing -> this folder is not a run directory
        pretrain nowhere -> there is no such run
        status nowhere -> there is no such run
        logs nothing -> this folder is not a run directory
        checkpoints nowhere -> there is no such run
        batch nowhere --step 1 -> there is no such run
        export nowhere out -> there is no such run
        export runs/done encoder -> this folder exists already; nothing was written
        evaluate nowhere --all -> there is no such run
        evaluate nowhere -> neither a folder here nor a model that the hub gives
        evaluate runs/done@7 -> this run has no such checkpoint
        evaluate runs/done --data nowhere.jsonl -> there is no such table
        evaluate --predictions nowhere.jsonl --task sequence_classification --data reviews.jsonl
            -> there is no such table
        predict nowhere --data reviews.jsonl --out x
            -> neither a folder here nor a model that the hub gives
        predict encoder --data nowhere.jsonl -> there is no such table
        predict encoder --data reviews.jsonl --out one.jsonl
            -> this file exists already; nothing was written
        predict encoder --task sequence_classification --out x -> say what to predict for
        predict encoder --prompt a --data reviews.jsonl -> say one thing to predict for
        predict encoder --prompt a --out x -> the answer to one text is printed
        finetune run.yaml --dry-run -> this config has an objective: it is for hfscale pretrain
        pretrain task.yaml --dry-run -> this config has a task: it is for hfscale finetune
        pretrain run.yaml --dry-run --procs 3
            -> global_batch 4 cannot be cut into micro-batches of 4 on 3 ranks
        show run.yaml run.name=a/b -> 1 error in the config run.yaml
    """,
}
PARTS = {
    "pretrain run.yaml --dry-run --procs 1": """
        data.sources.0.shards=./other -> these shards were made with another tokenizer
        data.sources.0.shards=./ends
            -> documents in these shards end with another token than this tokenizer's
        data.sources.0.shards=./large -> these shards hold ids that the tokenizer does not have
        'data.validation={shards: ./other, every_steps: 1}'
            -> these shards were made with another tokenizer
        tokenizer.path=no/such/tokenizer -> there is no tokenizer
        tokenizer.path=./nothing -> the tokenizer's folder is empty
        tokenizer.path=./prefixed -> these shards were made with another tokenizer
        model.architecture=gtp2 -> unknown architecture
        model.config.n_layers=2 -> gpt2 has no such config key
        model.config.n_positions=16 -> rows of 32 tokens need more than the model's 16 positions
        model.config.vocab_size=100 -> the model has 100 ids for a tokenizer of 512
        objective.name=cml -> unknown objective 'cml'
        objective.options.smoothing=1 -> smoothing: unknown option; there are none
        objective.name=mlm -> this tokenizer has no mask token, which stands for hidden tokens
        data.validation.shards=./held 'checkpoint.keep_best={metric: validation_x}'
            -> no validation gives this metric
        'model={pretrained: ./nowhere}' -> neither a folder here nor a model that the hub gives
        'model={pretrained: ./weightless}' -> no safetensors weights here
        'model={pretrained: ./encoder, lora: {r: 2, targets: [nosuch]}}' objective.name=clm
            -> no linear module has such a name
    """,
    "finetune task.yaml --dry-run --procs 1": """
        data.train=./sheet.xlsx -> the name of this file does not say how to read it
        data.train=./blank.jsonl -> there are no rows in it
        data.train=./bad.jsonl -> not a JSON line: Expecting ',' delimiter (character 13)
        data.train=./twice.jsonl -> an id occurs twice
        data.train=./one.jsonl data.validation=null
            -> all examples have one label, good: there is nothing to tell apart
        data.train=./unlabelled.jsonl
            -> there is no column 'label' (label: a label, a list of them, or a number)
        'data.columns={txt: text}' -> the task has no such role
        'data.columns={text: review}' -> there is no column 'review' (text: a text)
        task.name=sequence_clasification -> unknown task 'sequence_clasification'
        task.options.lables=3 -> lables: unknown option; did you mean labels?
        data.max_length=4 data.too_long=refuse -> 49 examples of train cannot be used
        data.max_length=128 -> rows of 128 tokens need more than the model's 64 positions
        'checkpoint.keep_best={metric: validation_acuracy}' -> no validation gives this metric
        model.pretrained=./weightless -> no safetensors weights here
        model.pretrained=./nowhere -> neither a folder here nor a model that the hub gives
        'tokenizer={path: ./nothing}' -> the tokenizer's folder is empty
    """,
    "pretrain run.yaml --dry-run --launcher debug": """
        model.architecture=gtp2 -> unknown architecture
    """,
    "": """
        evaluate runs/foreign -> no model here
        evaluate runs/done -> this run has no validation shards
        evaluate runs/done --data ./other -> these shards were made with another tokenizer
        evaluate runs/done --data ./large -> these shards hold ids that the tokenizer does not have
        evaluate encoder -> this task only predicts: there are no answers to score
        evaluate encoder --task nosuch --data reviews.jsonl -> unknown task 'nosuch'
    """,
}


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is asked about, a run that has trained among it."""
    folder = tmp_path_factory.mktemp("refusals")
    prepare(corpus, folder)
    run_ranks(train, 1, yaml.safe_load((folder / "done.yaml").read_text()))
    resolved = to_yaml(load_config(folder / "done.yaml").config)
    (folder / "runs" / "done" / "config.yaml").write_text(resolved)
    return folder


def requests(table: dict[str, str]) -> dict[str, str]:
    """Return the words that each request is refused with."""
    pairs = {}
    for start, lines in table.items():
        joined = lines.replace("\n            ->", " ->").strip().splitlines()
        for line in joined:
            request, _, words = line.strip().partition(" -> ")
            pairs[f"{start} {request}".strip()] = words
    return pairs


def differences(wanted: dict[str, str], answers: list[str]) -> dict[str, Any]:
    """Return the requests that were answered otherwise."""
    return {
        request: answer
        for (request, words), answer in zip(wanted.items(), answers, strict=True)
        if not answer.startswith(f"error: {words}") or not answer.endswith("exit 2")
    }


def test_what_files_alone_can_tell_is_refused_without_torch(folder: Path) -> None:
    wanted = requests(LIGHT)
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.refusals", str(folder)],
        cwd=ROOT,
        input="\n".join(wanted),
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout)
    assert differences(wanted, said["answers"]) == {}
    assert said["slow"] == []


def test_a_run_that_has_come_as_far_as_it_is_to_go_is_told(folder: Path) -> None:
    done = str(folder / "runs" / "done")
    notices = Training(Request(done)).check(1, device_type="cpu")
    assert [line for line in notices if "nothing is left to do" in line]
    notices = Training(Request(done, ("train.steps=2",))).check(1, device_type="cpu")
    assert not [line for line in notices if "nothing is left to do" in line]


def test_what_does_not_fit_together_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    wanted = requests(PARTS)
    assert differences(wanted, [answer(request) for request in wanted]) == {}
