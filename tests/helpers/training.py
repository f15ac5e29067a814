"""A short run of the real trainer on ranks that are up already: for tests that look at many
runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hfscale.config.finetune import FinetuneConfig
from hfscale.config.load import to_yaml
from hfscale.config.schema import RunConfig
from hfscale.monitor.incidents import incidents
from hfscale.reports.incident import rerun
from hfscale.run_files import CONFIG, INCIDENTS
from tests.helpers.ranks import run_ranks


def train(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a short run; on ranks other than 0, nothing. For ``run_ranks``."""
    import torch

    from hfscale.dist.world import World
    from hfscale.run.run import Run
    from hfscale.training.observers.log import Log

    torch.set_num_threads(1)
    config = (FinetuneConfig if "task" in values else RunConfig).model_validate(values)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Run(config, World.from_environment()).live(torch.device("cpu"))
    records: list[dict[str, Any]] = []
    logs = [one for one in trainer.observers if isinstance(one, Log)]
    if logs:
        write = logs[0].writer.write
        logs[0].writer.write = lambda record, details: (  # type: ignore[method-assign]
            records.append(record),
            write(record, details),
        )[1]
    trainer.run()
    trainer.close()
    return records


def train_with_a_spike(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what ``train`` does, of a run in which the loss of step 5 is told wrongly, once."""
    from hfscale.monitor import incidents
    from hfscale.training.observers.health import Health, Offence

    hear, told = Health.hear, list[int]()

    def mishear(self: Health, step: int, loss: float) -> None:
        if step == 5 and not told:
            told.append(step)
            self.judge(Offence(step, incidents.LOSS, "a loss that was told wrongly", {}))
        else:
            hear(self, step, loss)

    Health.hear = mishear  # type: ignore[method-assign]
    try:
        return train(values)
    finally:
        Health.hear = hear  # type: ignore[method-assign]


def check_rewind(
    values: Callable[[str, str], dict[str, Any]], *, rows: tuple[int, int], exact: Sequence[str]
) -> None:
    """Check that a run which goes back from step 5 equals one that left ``rows`` out from its
    start, bit for bit, that its data are the same on another number of ranks, and that the step
    run again has the gradient that it had. ``values`` are those of a run by name and policy, of 8
    steps, saved every 2 and kept, without dropout.
    """
    given = values("rewound", "rewind")
    spiked, _ = run_ranks(train_with_a_spike, 2, given)
    root = Path(given["run"]["root"])
    [incident] = [one for one in incidents(root / "rewound") if one.decision == "rewind"]
    assert (incident.kind, incident.step, incident.back_to) == ("loss_spike", 5, 4)
    assert incident.left_out == (rows,), "no row explains it: the whole step"
    config = (FinetuneConfig if "task" in given else RunConfig).model_validate(given)
    (root / "rewound" / CONFIG).write_text(to_yaml(config))
    again = rerun(root / "rewound", step=5, rows_of=incident.rows)
    first = next(record for record in spiked if record["step"] == 5)
    assert (again.checkpoint, again.rows) == ("step-00000004", rows[1] - rows[0])
    assert again.grad_norm == pytest.approx(first["grad_norm"], rel=1e-4)
    (root / "left_out").mkdir()
    shutil.copy(root / "rewound" / INCIDENTS, root / "left_out")
    twin, _ = run_ranks(train, 2, values("left_out", "warn"))
    last = {record["step"]: record for record in spiked}
    assert len(twin) == 8
    for record in twin:  # step 5 asks nothing, so its loss is no number
        ours = {key: repr(last[record["step"]].get(key)) for key in exact}
        assert ours == {key: repr(record.get(key)) for key in exact}, record["step"]
    (root / "left_out_alone").mkdir()
    shutil.copy(root / "rewound" / INCIDENTS, root / "left_out_alone")
    [alone] = run_ranks(train, 1, values("left_out_alone", "warn"))
    assert [one["batch_digest"] for one in alone] == [one["batch_digest"] for one in twin]
    losses = [one["loss"] for one in twin]
    assert [one["loss"] for one in alone] == pytest.approx(losses, rel=1e-4, nan_ok=True)
