"""The secret of a job: a file beside its config that only its user can read. Who knows it may be a
rank (``dist/rendezvous.py``).
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from hfscale.run_files import SECRET


def make_secret(folder: Path) -> None:
    """Leave a secret in ``folder`` that only this user can read; one that is there stays, as ranks
    may be about to read it.
    """
    if known_secret(folder):
        return
    path, temporary = folder / SECRET, folder / f".{SECRET}.{secrets.token_hex(8)}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(handle, "w") as file:
        file.write(secrets.token_hex(32))
    os.replace(temporary, path)


def known_secret(folder: Path) -> str:
    """Return the secret in ``folder``; "" where there is none, or one that others can read or have
    put there.
    """
    try:
        handle = os.open(folder / SECRET, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return ""
    with open(handle) as file:
        status = os.fstat(file.fileno())
        return "" if status.st_mode & 0o077 or status.st_uid != os.getuid() else file.read(64)
