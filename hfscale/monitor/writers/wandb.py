"""Weights & Biases: into RUN_DIR/wandb without a network, to be synced later; at once where
WANDB_MODE is ``online``. A resumed run has the same id there.
"""

from __future__ import annotations

import html
import os
import secrets
from collections.abc import Mapping

import wandb

from hfscale.monitor.writers.base import About
from hfscale.monitor.writers.ids import keep_id, kept_id

NAME = "wandb"
PROJECT = "hfscale"  # where WANDB_PROJECT says no other


class WandB:
    """A run of the project, whose horizontal axis is the run's step."""

    def __init__(self, about: About) -> None:
        identity = kept_id(about.run_dir, NAME)
        if not identity:
            identity = secrets.token_hex(4)
            keep_id(about.run_dir, NAME, identity)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=about.name,
            id=identity,
            resume="allow",
            dir=about.run_dir,
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            config=dict(about.config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        # wandb's own count of calls never goes back, as the steps of a resumed run do
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, points: Mapping[str, float]) -> None:
        """Draw ``points``."""
        self._run.log({**points, "step": step})

    def text(self, step: int, tag: str, text: str) -> None:
        """Show ``text`` as it stands."""
        self._run.log({tag: wandb.Html(f"<pre>{html.escape(text)}</pre>"), "step": step})

    def close(self) -> None:
        """Finish, with everything written; online, with everything sent."""
        self._run.finish()
        # without it the service that writes is still at work when the process ends
        wandb.teardown()
