"""The shards that a config names, as a login node looks at them: which files there are, and in
which order their rows come. Each manifest is opened once, when it is first asked for. Needs no
torch.
"""

from __future__ import annotations

import os
from functools import cached_property

from hfscale.config.inference import ShardsConfig
from hfscale.config.schema import RunConfig
from hfscale.errors import DataError
from hfscale.shards.manifest import TEXT, Manifest
from hfscale.shards.open import is_remote, open_manifest
from hfscale.stream.mixture import Mixture
from hfscale.stream.rows import TokenRows
from hfscale.stream.sources import open_mixture
from hfscale.stream.state import Saved


class Sources:
    """``data.sources`` and ``data.validation`` of a config.

    Everything asked of it raises DataError or ConfigError for a manifest that cannot be had.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    @cached_property
    def manifests(self) -> list[Manifest]:
        """Those of ``data.sources``, in the order of the config."""
        return [self._open(source.shards) for source in self._config.data.sources]

    @property
    def rows(self) -> int:
        """Rows of an epoch; 0: not known before raw text is tokenized."""
        if any(manifest.dtype == TEXT for manifest in self.manifests):
            return 0
        seq_len = self._config.data.seq_len
        # a row needs one token more than it predicts
        return sum(
            max(0, shard.tokens - 1) // seq_len
            for manifest in self.manifests
            for shard in manifest.shards
        )

    @cached_property
    def parts(self) -> list[TokenRows]:
        """The rows of each of ``data.sources``; a DataError if one has none."""
        sources = zip(self._config.data.sources, self.manifests, strict=True)
        return [token_rows(source.shards, self._config, manifest) for source, manifest in sources]

    @cached_property
    def held_out(self) -> TokenRows | None:
        """The rows of ``data.validation``; None where the config asks for none."""
        if (validation := self._config.data.validation) is None:
            return None
        return token_rows(validation.shards, self._config, self._open(validation.shards))

    def plan(self, saved: Saved | None) -> tuple[TokenRows, Mixture]:
        """Return the rows of all sources, joined, and their order in a run that goes on from
        ``saved``.
        """
        return open_mixture(self._config, self.parts, saved=saved)

    def check(self, saved: Saved | None) -> None:
        """Return if the shards are there, and last for a run that goes on from ``saved``."""
        held_out = [self.held_out] if self.held_out else []
        for part in [*self.parts, *held_out]:
            self._refuse_missing(part.manifest)
        self.plan(saved)

    def unknown(self) -> str:
        """Return what must come before the rows of an epoch are known; nothing if they are. Nothing
        is fetched.
        """
        places = [source.shards for source in self._config.data.sources]
        if far := [place for place in places if is_remote(place)]:
            return f"{', '.join(far)} is fetched, which looking does not do"
        try:
            raw = [manifest for manifest in self.manifests if manifest.dtype == TEXT]
        except DataError:
            return f"there are shards at {', '.join(places)}"
        if samples := sum(manifest.documents for manifest in raw):
            return f"raw text is tokenized: {samples:,} samples"
        return "" if self.rows else "a shard is as long as a row"

    def _open(self, place: str) -> Manifest:
        return open_manifest(place, **self._config.data.remote)

    def _refuse_missing(self, manifest: Manifest) -> None:
        if manifest.remote or self._config.data.on_error != "stop":
            return
        there = set(os.listdir(manifest.folder))
        names = [name for shard in manifest.shards for name in (shard.name, shard.index_name)]
        # tars of others may lie elsewhere
        missing = [n for n in names if n not in there and not (manifest.folder / n).exists()]
        if missing:
            raise DataError(
                f"{len(missing)} files of the shards are missing",
                where=manifest.folder,
                value=missing[:5],
                remedy="restore them from a copy, or build the shards again",
            )


def token_rows(
    place: str, config: RunConfig | ShardsConfig, manifest: Manifest | None = None
) -> TokenRows:
    """Return the rows of the shards at ``place``, read as ``config`` says; ``manifest`` is theirs,
    where it is open already.

    Raises:
        DataError: if there is no row in them.
    """
    data = config.data
    return TokenRows(
        manifest or open_manifest(place, **data.remote),
        place=place,
        seq_len=data.seq_len,
        verify=data.verify,
        skip=data.on_error == "skip",
    )
