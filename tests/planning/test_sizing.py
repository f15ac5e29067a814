"""The tables of docs/sizing.md are those that the plan makes today."""

from __future__ import annotations

import pytest

from benchmarks.sizing import PAGE, tables, with_tables

pytestmark = pytest.mark.slow


def test_the_tables_of_the_page_are_made_by_the_plan():
    text = PAGE.read_text("utf-8")
    assert with_tables(text, tables()) == text, "run python -m benchmarks.sizing"
