"""Is one run bit for bit what another is? Compares what both logged and saved, in the order in
which one thing makes the next differ.
"""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path

import torch

from hfscale import run_files
from hfscale.checkpoint import layout
from hfscale.checkpoint.store import FragmentReader
from hfscale.reports.status import records

LOGGED = ("batch_digest", "tokens_seen", "lr", "loss", "grad_norm")  # of a step
# of the checkpoint of that step, as is what follows
TENSORS = ("weight", "exp_avg", "exp_avg_sq", "momentum_buffer")
COMPONENTS = (*LOGGED, *TENSORS, "optimizer", "random state", "position in the data")

# step -> component -> what it was each time that the run came there
Evidence = dict[int, dict[str, list[object]]]


def observe(run_dir: Path) -> Evidence:
    """Return all that a run logged, in every attempt, and what its checkpoints hold: digests of the
    tensors, the rest as it is.
    """
    seen: Evidence = {}
    for record in records(run_dir):
        for name in LOGGED:
            seen.setdefault(record["step"], {}).setdefault(name, []).append(record[name])
    for checkpoint in layout.committed(run_dir / run_files.CHECKPOINTS):
        state = layout.state_of(checkpoint)
        saved: dict[str, object] = {
            "optimizer": state.engine,
            "random state": state.rng,
            "position in the data": state.stream,
            **digests(checkpoint),
        }
        seen.setdefault(state.step, {}).update({name: [value] for name, value in saved.items()})
    return seen


def digests(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of all weights and of each moment that is kept, by whole tensors: the same
    for every world size and ZeRO stage.
    """
    reader, hashes = FragmentReader(checkpoint), {kind: hashlib.sha256() for kind in TENSORS}
    kept = set[str]()
    for name, shape in sorted(reader.shapes.items()):
        for kind in reader.kinds(name):
            whole = reader.read(
                name, kind, start=0, out=torch.empty(prod(shape), dtype=reader.dtype(name))
            )
            kept.add(kind)
            hashes[kind].update(
                f"{name}{list(shape)}".encode() + whole.view(torch.uint8).numpy().tobytes()
            )
    reader.close()
    return {kind: digest.hexdigest() for kind, digest in hashes.items() if kind in kept}


def first_difference(twin: Evidence, other: Evidence) -> dict[str, object] | None:
    """Return where ``other`` first was not what ``twin`` was, or None; what only one of them has is
    a difference too.
    """
    for step in sorted(twin.keys() | other.keys()):
        for component in COMPONENTS:
            expected, values = (run.get(step, {}).get(component, []) for run in (twin, other))
            if any([value] != expected for value in values) or (expected and not values):
                return {"step": step, "component": component, "twin": expected, "resumed": values}
    return None
