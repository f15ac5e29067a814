"""A page of sections that one can mail: one HTML file with its pictures inside, which asks no
network for anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata, resources

from jinja2 import Environment


@dataclass(frozen=True)
class Section:
    """A part of a page, from top to bottom: texts, a picture, a table, what is to be read as it
    is. An empty part is not shown.
    """

    title: str
    texts: Sequence[str] = ()
    picture: str = ""  # SVG
    header: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    code: str = ""
    folded: str = ""  # the words behind which ``code`` is folded; "": it is shown

    @property
    def anchor(self) -> str:
        """The name by which a link finds it."""
        return re.sub(r"\W+", "-", self.title.lower())


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the page as HTML. Whatever a run says of itself is escaped."""
    template = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    return (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(template)
        .render(title=title, lead=lead, sections=sections, foot=f"{version()}, {now}")
    )


def version() -> str:
    """Return the name of this program with its version, where it is installed."""
    try:
        return f"hfscale {metadata.version('hfscale')}"
    except metadata.PackageNotFoundError:
        return "hfscale"
