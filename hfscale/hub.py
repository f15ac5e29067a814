"""What a name of a model or tokenizer stands for on this machine: a folder, or the hub's snapshot
of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from hfscale.errors import ConfigError
from hfscale.records import Count, Record, is_name, load, open_file

JSON = re.compile(r"config\.json$|^tokenizer|tokens|^vocab|index\.json$|^chat_template")
SMALL, WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja"], ["*.safetensors"]

COUNTED = re.compile(r"(^|_)(n|num)_|layers?$|_(layers|blocks|experts|heads|labels)(_|$)")
OTHERS = re.compile(r"position|ctx|embd|inner|vocab|window|bins|frames|samples|tokens|buckets")
MOST = {"layer": 2_000, "block": 2_000, "label": 1_000_000}  # DeepNet has 1,000 layers
MOST_OF_ANY = 65_536


class Task(Record):
    """What an export of ours is for."""

    name: str
    options: dict[str, object]


class Made(Record):
    """What an export of ours says beside what transformers reads."""

    task: Task
    max_length: Annotated[int, Field(gt=0, lt=2**31)]


Id = Annotated[int, Field(ge=-1, lt=2**32)]  # -1: there is none, in some published configs
Ids = Id | list[Id] | None


class GenerationFile(Record):
    """``generation_config.json``, as far as a wrong type would be met within transformers only."""

    bos_token_id: Ids = None
    eos_token_id: Ids = None
    pad_token_id: Ids = None
    decoder_start_token_id: Ids = None
    max_length: Count | None = None
    max_new_tokens: Count | None = None
    min_length: Count | None = None
    num_beams: Count | None = None
    top_k: Count | None = None
    top_p: float | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None


class ModelConfig(Record):
    """``config.json``, as far as it is looked at here; the rest is for transformers."""

    model_type: str | None = None
    architectures: list[str] | None = None
    vocab_size: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    id2label: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], object] | None = None
    hfscale: Made | None = None
    bos_token_id: Ids = None
    eos_token_id: Ids = None
    pad_token_id: Ids = None


def foreign_code(error: Exception) -> bool:
    """Return whether transformers refused a folder because it brings code of its own."""
    return "trust_remote_code" in str(error)


def local_folder(
    name: str | Path, *, where: str, weights: bool = False, remedy: str = "give a folder"
) -> Path:
    """Return the folder ``name``; if there is none, the hub's snapshot, from the cache or (once)
    from the hub.

    Only JSON, text and, with ``weights``, safetensors are fetched: nothing pickled.

    Raises:
        ConfigError: if it is neither a folder here nor a name that the hub gives; ``where`` says
            which setting named it.
    """
    if is_name(name) and Path(name).is_dir():
        return checked_files(Path(name))
    from huggingface_hub import HfApi, snapshot_download

    patterns = SMALL + WEIGHTS if weights else SMALL
    try:
        try:
            return Path(
                snapshot_download(str(name), allow_patterns=patterns, local_files_only=True)
            )
        except FileNotFoundError:
            # one question, because a download that cannot work is retried for a minute
            HfApi().model_info(str(name), timeout=10)
            return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its own, its transport's and the system's
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "neither a folder here nor a model that the hub gives",
            where=where,
            value=str(name),
            remedy=f"{remedy}, or a hub name that can be fetched or is in the cache ({reason})",
        ) from error


@contextmanager
def asked_once(name: str) -> Iterator[None]:
    """Ask the hub for the data set ``name``, for ten seconds; where it does not answer, only the
    cache is looked at inside.

    A client that is not told so asks for minutes on a network that swallows packets.

    Raises:
        Exception: of the hub, if it answers that there is no such thing.
    """
    import datasets.config as data
    import huggingface_hub.constants as hub
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    silent = hub.HF_HUB_OFFLINE
    if not silent:
        try:
            HfApi().dataset_info(name, timeout=10)
        except HfHubHTTPError:
            raise
        except Exception:  # of the transport
            silent = True
    before = hub.HF_HUB_OFFLINE, data.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = data.HF_HUB_OFFLINE = silent
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, data.HF_HUB_OFFLINE = before


def checked_files(folder: Path) -> Path:
    """Return ``folder`` if the files in it that make a model are files, and its JSON is of bounded
    size, depth and shape.

    Raises:
        UserError: naming the file. Nothing is read of the weights.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model", ".safetensors"):
            _check_file(file)
    return folder


def _check_file(file: Path) -> None:
    try:
        with open_file(file) as opened:
            status = os.fstat(opened.fileno())
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=file) from None
    if file.suffix == ".json" and JSON.search(file.name):
        _check_json(file, status.st_size, status.st_mtime_ns)


KINDS = {"config.json": ModelConfig, "generation_config.json": GenerationFile}


@lru_cache  # a folder is opened several times in a job
def _check_json(file: Path, _size: int, _time: int) -> None:
    kind: type[object] = KINDS.get(file.name, object)
    read = load(file, kind, what="this file of a model", error=ConfigError)
    if isinstance(read, ModelConfig):
        refuse_huge(read.as_dict(), where=file)


def refuse_huge(values: Mapping[str, object], *, where: object) -> None:
    """Return if no count of parts (layers, experts, heads, labels) is one that no model has: each
    is made, one after the other.

    Raises:
        ConfigError: naming the key.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            refuse_huge(value, where=where)
        if type(value) is not int or not COUNTED.search(key) or OTHERS.search(key):
            continue
        most = next((most for part, most in MOST.items() if part in key), MOST_OF_ANY)
        if abs(value) > most:
            raise ConfigError(
                f"no model has so many: {key}",
                where=where,
                value=value,
                remedy=f"at most {most:,} are taken",
            )
