"""What every section of a config is, and the types of its values: numbers with their ranges, paths
that are absolute once validated.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from hfscale.records import is_name


def _absolute(path: Path) -> Path:
    if not is_name(path):
        raise ValueError("a part of the path is longer than 255 bytes, or no text")
    try:
        return Path(os.path.abspath(path.expanduser()))
    except RuntimeError:
        raise ValueError(f"there is no home folder of {path.parts[0]}") from None


def _absolute_unless_url(path: str) -> str:
    return path if re.match(r"\w+:", path) else str(_absolute(Path(path)))


def _absolute_unless_hub_name(path: str) -> str:
    """A folder that exists (or a run with its checkpoint, RUN@best), or no spelling of the hub's,
    is a path; ``org/name`` stays.
    """
    if not is_name(path):
        raise ValueError("a part of it is longer than 255 bytes, or no text")
    is_path = (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or Path(path.partition("@")[0]).exists()
    )
    return str(_absolute(Path(path))) if is_path else path


def _absolute_unless_hub_data(name: str) -> str:
    """Return a path in full: what is one for models, ends like a file or has a wild card. The hub's
    ``org/name:split`` stays.
    """
    return (
        str(_absolute(Path(name)))
        if re.search(r"[*?\[]|\.\w+$", name)
        else _absolute_unless_hub_name(name)
    )


Positive = Annotated[int, Field(gt=0, lt=2**53)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
# short enough for what is put around it: .NAME.parts, step-00001000.partial
FileName = Annotated[str, Field(pattern=r"^[\w][\w.\-]*$", max_length=200)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
LocalPath = Annotated[AbsolutePath, Field(validate_default=True)]
PathOrUrl = Annotated[str, Field(min_length=1), AfterValidator(_absolute_unless_url)]
PathOrHubName = Annotated[str, Field(min_length=1), AfterValidator(_absolute_unless_hub_name)]
Table = Annotated[str, Field(min_length=1), AfterValidator(_absolute_unless_hub_data)]
HeldOut = Annotated[float, Field(gt=0, lt=1, strict=True)]


def _mistaken(written: object, made: object) -> str | None:
    """Return what should have been written, where a truth value was taken for something else or the
    other way round.
    """
    if isinstance(made, bool) and not isinstance(written, bool):
        return "true or false"
    if isinstance(written, bool) and not isinstance(made, bool):
        return "something else than true or false"
    pairs: list[tuple[object, object]] = []
    if isinstance(written, dict) and isinstance(made, dict):
        pairs = [(written[key], made[key]) for key in written.keys() & made.keys()]
    elif isinstance(written, list | tuple) and isinstance(made, list | tuple):
        pairs = [*zip(written, made)]
    return next((wanted for pair in pairs if (wanted := _mistaken(*pair)) is not None), None)


class Section(BaseModel):
    """A section of a config, or a whole one: immutable, and strict about unknown keys."""

    marker: ClassVar[str] = ""  # of a whole config: the section that tells its kind

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _true_is_no_number(cls, value: object, handler: ValidatorFunctionWrapHandler) -> object:
        """``train.steps: true`` is not one step, and ``compile: 1`` or ``"no"`` is neither true nor
        false.
        """
        checked = handler(value)
        if (wanted := _mistaken(value, checked)) is not None:
            raise ValueError(f"should be {wanted}")
        return checked
