"""Versions of packages that are known to give wrong numbers without a word: no job starts with one.

``setup.cfg`` leaves them out; an environment that was made otherwise, or before, may have them all
the same.
"""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet

from hfscale.errors import ConfigError

# package, versions, what goes wrong, what to install
WRONG = (
    (
        "deepspeed",
        "<0.19.8",
        "it trains on where the gradient is not a number, adds micro-batches up in 16 bits "
        "at ZeRO 2, and below 0.19.4 keeps the last one's gradient alone",
        "deepspeed>=0.19.8",
    ),
    (
        "tokenizers",
        ">=0.23.1,<0.23.3",
        "it loses all but two of the windows that a long text is cut into",
        "tokenizers>=0.23.3",
    ),
)


def refuse_wrong_versions() -> None:
    """Return if no installed package is known to give wrong numbers.

    Raises:
        ConfigError: naming the first that does, and what to install.
    """
    for package, versions, what, instead in WRONG:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if SpecifierSet(versions).contains(version.partition("+")[0], prereleases=True):
            raise ConfigError(
                f"this version of {package} gives wrong numbers: {what}",
                where=f"package {package}",
                value=version,
                remedy=f"pip install '{instead}'",
            )
