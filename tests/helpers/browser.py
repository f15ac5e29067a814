"""A page as a person's browser shows it: Chromium without a window."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.helpers.needs import lacking

# the tests run as root, without a GPU, and nothing may be asked of a network
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
)


def chromium() -> str:
    """Return the program; where there is none, the test is skipped, or fails in CI."""
    return shutil.which("chromium") or lacking("needs Debian's chromium (tests/apt-packages.txt)")


def show(url: str, *, home: Path, picture: Path | None = None, height: int = 3000) -> str:
    """Return the document that ``url`` has become in the browser, as HTML, and take a ``picture``
    (PNG) of it. ``home`` is an empty folder for what a browser keeps.
    """
    words = [chromium(), *OPTIONS, f"--user-data-dir={home}", f"--window-size=1100,{height}"]
    if picture:
        subprocess.run(
            [*words, f"--screenshot={picture}", url], check=True, capture_output=True, timeout=120
        )
    done = subprocess.run(
        [*words, "--dump-dom", url], check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout
