"""What a name of a model or tokenizer stands for on this machine: a folder, or the hub's snapshot of it."""

from __future__ import annotations

from pathlib import Path

from hfscale.errors import ConfigError

SMALL, WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja"], ["*.safetensors"]


def foreign_code(error: Exception) -> bool:
    """Return whether transformers refused a folder because it brings code of its own."""
    return "trust_remote_code" in str(error)


def local_folder(
    name: str | Path, *, where: str, weights: bool = False, remedy: str = "give a folder"
) -> Path:
    """Return the folder ``name``; if there is none, the hub's snapshot, from the cache or (once) from the hub.

    Only JSON, text and, with ``weights``, safetensors are fetched: nothing pickled.

    Raises:
        ConfigError: if it is neither a folder here nor a name that the hub gives; ``where`` says which setting named it.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import HfApi, snapshot_download

    patterns = SMALL + WEIGHTS if weights else SMALL
    try:
        try:
            return Path(
                snapshot_download(str(name), allow_patterns=patterns, local_files_only=True)
            )
        except FileNotFoundError:
            HfApi().model_info(
                str(name), timeout=10
            )  # one question, because a download that cannot work is retried for a minute
            return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its own, its transport's and the system's
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "neither a folder here nor a model that the hub gives",
            where=where,
            value=str(name),
            remedy=f"{remedy}, or a hub name that can be fetched or is in the cache ({reason})",
        ) from error
