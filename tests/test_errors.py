"""What others have written is shown in a message, not obeyed."""

from __future__ import annotations

import ast

import pytest

from hfscale import log
from hfscale.errors import DataError, UserError, literal, shown

EVIL = 'x\x1b[2J\nerror: all is well\r\x9b31m\u202e"'


def test_escapes_and_line_ends_are_spelled_out():
    said = str(DataError(f"a member {EVIL}", where=EVIL, value=[EVIL], remedy=f"remove {EVIL}"))
    assert all(char.isprintable() or char == "\n" for char in said)
    lines = said.splitlines()
    assert [line for line in lines[1:] if not line.startswith("  ")] == []  # none looks like ours
    assert "\\x1b[2J\\nerror" in said


def test_the_log_shows_them_too(capsys: pytest.CaptureFixture[str]):
    log.setup()
    log.logger.warning(f"{EVIL}\n12:00:00 done")
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\\x1b[2J" in said
    assert [line for line in said.splitlines()[1:] if not line.startswith("  ")] == []


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("http://alice:PASS@host/x", "http://***@host/x"),
        (
            "cannot fetch https://:PASS@h, then ftp://a:b@c",
            "cannot fetch https://***@h, then ftp://***@c",
        ),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("user@host:path", "user@host:path"),
        ("déjà vu 数据 😀\t", "déjà vu 数据 😀\t"),
    ],
)
def test_a_password_of_a_url_is_not_shown(text: str, safe: str):
    assert shown(text) == safe
    assert "PASS" not in str(UserError(text, where=text, value={text: [text]}, remedy=text))


def test_a_literal_says_the_same_and_does_nothing_else():
    for text in (EVIL, 'a" + __import__("os").getcwd() + "', "b\\", "数\ud800", "{x}"):
        assert ast.literal_eval(literal(text)) == text
        assert all(char.isprintable() for char in literal(text))
