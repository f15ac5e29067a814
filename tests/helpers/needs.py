"""What a test needs of its machine."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacking(reason: str) -> NoReturn:
    """Skip the test, for want of what ``reason`` says; in CI nothing is skipped but for want of a
    GPU, and it fails.
    """
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
