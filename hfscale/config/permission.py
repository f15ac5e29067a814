"""Who may permit that code of others runs: the command line, never the file that brings the code.

``data.allow_pipe`` and ``model.trust_remote_code`` count where the command line of this very
command says them, or where the run directory is one that this user started with them on the command
line: its launcher has noted that in the user's home, for these commands and this model alone. What
any other config says of them is taken as false, so that whatever would run is refused by name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from hfscale.config.schema import Data, TrainConfig
from hfscale.records import Damaged, Record, parse, read_file

PIPE, CODE = "data.allow_pipe", "model.trust_remote_code"
KEYS = (PIPE, CODE)
ALLOWED = "HFSCALE_ALLOWED"  # in the environment of what a command starts: ranks, and jobs of Slurm


def split(overrides: Sequence[str]) -> tuple[list[str], set[str]]:
    """Return the overrides that give no permission, and the keys of those that do."""
    words = {one.replace(" ", "").lower() for one in overrides}
    granted = {key for key in KEYS if f"{key}=true" in words}
    return [one for one in overrides if one.partition("=")[0].strip() not in KEYS], granted


def grant(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a command line without its permissions, which now hold for this
    process and what it starts.
    """
    rest, granted = split(overrides)
    os.environ[ALLOWED] = ",".join(sorted(granted | _granted()))
    return rest


def settled(config: TrainConfig, *, said: set[str], home: Path) -> TrainConfig:
    """Return ``config`` with what was not permitted taken back.

    ``said`` are the keys that the command line gives; ``home`` is the folder of the config: a run
    directory, perhaps.
    """
    permitted = said | _granted() | _noted(home, config)
    for key in asked(config) - permitted:
        section, _, name = key.partition(".")
        changed = getattr(config, section).model_copy(update={name: False})
        config = config.model_copy(update={section: changed})
    return config


def asked(config: TrainConfig) -> set[str]:
    """Return the keys of the permissions that ``config`` has, or asks for."""
    return {
        key
        for key, value in (
            (PIPE, getattr(config.data, "allow_pipe", False)),
            (CODE, config.model.trust_remote_code),
        )
        if value
    }


class Note(Record):
    """What this user has permitted a run to do."""

    run: str
    allowed: dict[str, list[str]]


def note_of(run_dir: Path, config: TrainConfig) -> tuple[Path, Note]:
    """Return where this user's permissions for a run are noted, and what is noted for this
    config.
    """
    home = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    name = hashlib.sha256(os.path.realpath(run_dir).encode()).hexdigest()[:32]
    what = {key: _brings(config, key) for key in sorted(asked(config))}
    return home / "hfscale" / "allowed" / f"{name}.json", Note(run=str(run_dir), allowed=what)


def _brings(config: TrainConfig, key: str) -> list[str]:
    """Return what would run: the commands, or the model."""
    if key == CODE:
        return [str(config.model.pretrained or config.model.architecture)]
    if not isinstance(config.data, Data):
        return []
    held_out = [config.data.validation.shards] if config.data.validation else []
    return sorted({*(source.shards for source in config.data.sources), *held_out})


def _noted(home: Path, config: TrainConfig) -> set[str]:
    file, now = note_of(home, config)
    try:
        then = parse(Note, read_file(file, most=1 << 20)).allowed
    except (OSError, Damaged):
        return set()
    return {key for key, what in now.allowed.items() if then.get(key) == what}


def granted(key: str) -> bool:
    """Return whether this command, or the one that started this process, has the permission."""
    return key in _granted()


def _granted() -> set[str]:
    return {*os.environ.get(ALLOWED, "").split(",")} & {*KEYS}
