"""What judges the steps of a run, and what its rewinds have left out."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hfscale.checkpoint.state import CheckpointState
from hfscale.config.schema import TrainConfig
from hfscale.dist.agree import from_rank_0
from hfscale.log import logger
from hfscale.monitor.incidents import ACTS, Incident, incidents, left_out
from hfscale.run.data import OpenData
from hfscale.stream.left_out import merged
from hfscale.training.observers.health import Health


def incidents_of(config: TrainConfig) -> list[Incident]:
    """Return the incidents of the run so far, as rank 0 reads them."""
    lines = [one.model_dump(mode="json") for one in incidents(config.run_dir)]
    return [Incident.model_validate_json(json.dumps(line)) for line in from_rank_0(lines)]


def health_of(
    config: TrainConfig, saved: CheckpointState | None, found: Sequence[Incident]
) -> Health:
    """Return what judges the steps after ``saved``."""
    return Health(
        config.health,
        warmup_steps=config.schedule.warmup_steps,
        acted=[incident.step for incident in found if incident.decision in ACTS],
        saved=saved.health if saved else None,
    )


def leave_out(opened: OpenData, saved: CheckpointState | None, found: Sequence[Incident]) -> None:
    """Have the stream leave the rows out that rewinds have left out since ``saved``."""
    stream = opened.stream
    spans = merged([*stream.ledger.spans, *left_out(found)])
    if spans != stream.ledger.spans:
        logger.info(f"rows {', '.join(f'{a:,} to {b - 1:,}' for a, b in spans)} are left out")
        content = saved.stream if saved else stream.state().to_dict()
        stream.rewind(content, left_out=spans)
