"""Loading a tokenizer, and the digest by which shards, runs and exports know that they mean the
same one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from pydantic import Field

from hfscale.errors import DataError
from hfscale.hub import local_folder
from hfscale.records import Record, load, parse, read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE_NAME = "tokenizer.json"
REMEDY = "give a folder with tokenizer.json (`hfscale tokenizer train CONFIG` makes one)"


class AddedToken(Record):
    """A token beside the vocabulary, as ``tokenizer.json`` has it."""

    id: Annotated[int, Field(ge=0, lt=2**32)]
    content: str
    special: bool


class TokenizerFile(Record):
    """``tokenizer.json``, as far as it is looked at here; the rest is for ``tokenizers``."""

    model: dict[str, object]
    added_tokens: list[AddedToken] = []


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers log errors alone inside."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer in a folder, or of a name on the hub.

    Raises:
        DataError: if there is none, or only a slow (pure Python) one.
    """
    from transformers import AutoTokenizer

    remedy = REMEDY
    folder = local_folder(path, where="tokenizer.path", remedy=remedy)
    if not any(folder.iterdir()):
        raise DataError("the tokenizer's folder is empty", where=path, remedy=remedy)
    if (folder / FILE_NAME).exists():
        load(folder / FILE_NAME, TokenizerFile, what="the tokenizer", remedy=remedy)
    try:
        with quiet():  # its advice about other models' configs is not about the tokenizer
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (
        BaseException
    ) as error:  # transformers raises OSError, KeyError, TypeError, ... for the same thing
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        first_line = str(error).strip().split("\n")[0]
        raise DataError(
            f"cannot load a tokenizer: {first_line}", where=path, remedy=remedy
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "this tokenizer has no fast version",
            where=path,
            value=type(tokenizer).__name__,
            remedy=remedy,
        )
    return cast("PreTrainedTokenizerFast", tokenizer)


def save_files(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer`` into ``folder``.

    Raises:
        OSError: if it cannot be written; the library in Rust has an error of its own for a full
            disk.
    """
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error
        raise


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer`` as both transformers 5 and 4 read it: of 5's own class the name, and
    lists of special tokens, are not known to 4.
    """
    save_files(tokenizer, folder)
    file = folder / "tokenizer_config.json"
    settings = parse(dict[str, object], read_file(file))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = tokenizer.model_input_names
    if isinstance(more := settings.get("extra_special_tokens"), list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = more
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast | str | Path) -> str:
    """Return the SHA-256 (hex) of what turns text into ids, of a tokenizer or of the folder or hub
    name it is in.

    Saving, loading and using a tokenizer (padding, truncation) do not change it, nor do special
    tokens that are added (the ids of text stay what they are), nor fields that newer versions of
    ``tokenizers`` add with a false or null default.
    """
    if isinstance(tokenizer, (str, Path)) and (Path(tokenizer) / FILE_NAME).is_file():
        file = load(Path(tokenizer) / FILE_NAME, TokenizerFile, what=FILE_NAME, remedy=REMEDY)
    else:
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer)
        file = parse(TokenizerFile, tokenizer.backend_tokenizer.to_str())
    model = dict(file.model)
    merges = model.get("merges")
    if isinstance(merges, list) and merges and isinstance(merges[0], str):  # as in older files
        model["merges"] = [merge.split(" ") for merge in merges]
    ordinary = [token.as_dict() for token in file.added_tokens if not token.special]
    canonical = _prune(
        {
            **file.as_dict(),
            "model": model,
            "padding": None,
            "truncation": None,
            "post_processor": None,
            "added_tokens": ordinary,
        }
    )
    return hashlib.sha256(
        json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def framed(
    tokenizer: PreTrainedTokenizerFast,
    frame: tuple[str | None, ...] | None,
    config: object,
) -> PreTrainedTokenizerFast:
    """Return the tokenizer, giving what such a model was trained on: tokens of the roles ``frame``
    before a text and after it.

    Where there is no ``eos_token`` documents end with the ``sep_token``. Without any role nothing
    is put, as shards are made: a prompt that ends in [SEP] would be a document's end. None: what
    the tokenizer puts itself.
    """
    if not getattr(config, "type_vocab_size", 0):
        tokenizer.model_input_names = [
            name for name in tokenizer.model_input_names if name != "token_type_ids"
        ]
    if frame is None:
        return tokenizer
    from tokenizers import processors

    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ends = {"eos_token": tokenizer.eos_token or tokenizer.sep_token}
    has = [role and ends.get(role, getattr(tokenizer, role)) for role in frame]
    puts, own = tokenizer("a")["input_ids"], tokenizer.backend_tokenizer.post_processor
    ends_itself = bool(frame) and frame[-1] is None and puts[-1:] != bare[-1:]
    if not frame and puts != bare:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    elif any(has) and (puts == bare or ends_itself):
        before, after = (f"{token} " if token else "" for token in has)
        around = processors.TemplateProcessing(
            single=f"{before}$A {after}".strip(),
            pair=f"{before}$A {after}$B {after}".strip(),
            special_tokens=[
                (token, tokenizer.convert_tokens_to_ids(token)) for token in has if token
            ],
        )
        tokenizer.backend_tokenizer.post_processor = (
            processors.Sequence([own, around]) if own and not ends_itself else around
        )
    return tokenizer


def is_panic(error: BaseException) -> bool:
    """Return whether ``error`` is the end of Rust code, which is no ``Exception`` to Python."""
    return type(error).__name__ == "PanicException"


def extended(
    path: str | Path, *, roles: Mapping[str, str], sentinels: int = 0
) -> PreTrainedTokenizerFast:
    """Return the tokenizer at ``path`` with special tokens added: ``roles`` such as
    ``{"mask_token": "<mask>"}``, and ``<extra_id_K>``.

    Raises:
        DataError: if it has another token in one of the roles.
    """
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(path)
    in_use = [*tokenizer.special_tokens_map.values()]
    for (
        role,
        token,
        # what has two roles (the end of a text that pads too) may give one to a token of its own
    ) in roles.items():
        if (there := getattr(tokenizer, role)) not in (None, token) and in_use.count(there) == 1:
            raise DataError(
                f"this tokenizer has a {role.replace('_', ' ')} already",
                where=path,
                value=there,
                remedy="leave it out",
            )
    tokenizer.add_special_tokens({**roles})  # type: ignore[arg-type]
    tokenizer.add_tokens(
        [AddedToken(f"<extra_id_{number}>", special=True) for number in range(sentinels)],
        special_tokens=True,
    )
    return tokenizer


def end_of_document_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that follows each document in shards: the tokenizer's end of sequence, or else
    its separator.
    """
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token_id is not None:
            return int(token_id)
    raise DataError(
        "this tokenizer has neither an eos_token nor a sep_token, so documents cannot be told "
        "apart",
        where=tokenizer.name_or_path,
        remedy="add one, e.g. tokenizer.add_special_tokens({'eos_token': '</s>'}), and save it",
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return one more than the largest id that the tokenizer can give, added tokens included."""
    return int(max(tokenizer.get_vocab().values(), default=-1)) + 1


def _prune(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: _prune(item)
            for key, item in value.items()
            if item is not None and item is not False
        }
    return [_prune(item) for item in value] if isinstance(value, list) else value
