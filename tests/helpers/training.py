"""A short run of the real trainer on ranks that are up already: for tests that look at many
runs.
"""

from __future__ import annotations

from typing import Any


def train(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a short run; on ranks other than 0, nothing. For ``run_ranks``."""
    import torch

    from hfscale.config.finetune import FinetuneConfig
    from hfscale.config.schema import RunConfig
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
