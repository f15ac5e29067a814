"""MLflow: into RUN_DIR/mlflow, a SQLite file and a folder of texts; elsewhere where
MLFLOW_TRACKING_URI says. A resumed run goes on with the same run there.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping

from hfscale import run_files
from hfscale.monitor.writers.base import About
from hfscale.monitor.writers.ids import keep_id, kept_id

NAME = "mlflow"
EXPERIMENT = "hfscale"  # where MLFLOW_EXPERIMENT_NAME says no other
UNSAFE = re.compile(r"[^\w\-. :/]", re.ASCII)  # in the name of a metric
PARAMS, LONGEST = 100, 500  # parameters in one call, characters of a value


class MLflow:
    """A run of the experiment."""

    def __init__(self, about: About) -> None:
        # it would report to its makers, and wait for a network that compute nodes do not have
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        folder = about.run_dir / run_files.MLFLOW
        if not uri:
            folder.mkdir(exist_ok=True)
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder}/mlflow.db")
        experiment = self._experiment("" if uri else (folder / "artifacts").as_uri())
        self._id = self._known(kept_id(about.run_dir, NAME))
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(experiment, run_name=about.name).info.run_id
            keep_id(about.run_dir, NAME, self._id)
            self._begin(about)

    def scalars(self, step: int, points: Mapping[str, float]) -> None:
        """Draw ``points``."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [
            Metric(UNSAFE.sub("_", tag), number, now_ms, step) for tag, number in points.items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def text(self, step: int, tag: str, text: str) -> None:
        """Keep ``text`` as an artifact."""
        self._client.log_text(self._id, text, f"{tag}/{step}.md")

    def close(self) -> None:
        """Say that the run is not under way."""
        self._client.set_terminated(self._id)

    def _experiment(self, artifacts: str) -> str:
        """Return the id of the experiment, which is made if it is not there."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=artifacts or None))

    def _known(self, identity: str) -> str:
        """Return ``identity`` if there is such a run, else ""."""
        from mlflow.exceptions import MlflowException

        if not identity:
            return ""
        try:
            return str(self._client.get_run(identity).info.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return ""  # it was of another server

    def _begin(self, about: About) -> None:
        """Write the config; MLflow refuses another value of a parameter later."""
        from mlflow.entities import Param

        params = [
            Param(UNSAFE.sub("_", key), str(value)[:LONGEST]) for key, value in about.config.items()
        ]
        for first in range(0, len(params), PARAMS):
            self._client.log_batch(self._id, params=params[first : first + PARAMS])
