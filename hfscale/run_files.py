"""The names of what lies in a run directory, and the way from a checkpoint back to its run: said
here and nowhere else. On the lowest floor, because the rooms that write these files lie on many.

    RUN_DIR/config.yaml           the resolved config of the newest attempt
    RUN_DIR/environment.json      one entry an attempt (launch/run_dir.py), with the code's
                                  environment-*.patch
    RUN_DIR/metrics.jsonl         one line a logged step; tensorboard/ draws it
                                  (monitor/metrics_log.py)
    RUN_DIR/wandb/, mlflow/       what these writers draw; writers/ has the ids that they know it by
    RUN_DIR/details.jsonl, incidents.jsonl, goodput.jsonl, samples.jsonl    more such lines
                                  (monitor/lines.py)
    RUN_DIR/exports.jsonl         what was exported to where (jobs/export.py)
    RUN_DIR/plan.json             what was planned for it beside what it took (planning/check.py)
    RUN_DIR/profiles/             what the profiler wrote
    RUN_DIR/checkpoints/          what lies in it: checkpoint/layout.py
    RUN_DIR/attempts/N/           who worked here, and how that ended (monitor/fence.py)
    RUN_DIR/heartbeats/, hangs/   signs of life, and autopsies (monitor/heartbeat.py)
    RUN_DIR/logs/                 what each rank, and each Slurm job, said
    RUN_DIR/evaluations/          scores and predictions (jobs/evaluate.py)
    RUN_DIR/data/, tokenizer/     copies of the sources' manifests, and of a borrowed tokenizer
    RUN_DIR/code/N/               the code that a job of Slurm runs
    RUN_DIR/gradient.json         how far the engine's gradient was from plain autograd's, at the
                                  newest start (run/gradient_proof.py)
    RUN_DIR/trial/                while the first save is tried
    RUN_DIR/secret, lock, job     by which ranks know each other; of whoever works here
    RUN_DIR/restarts.json, excluded_nodes.txt    of its Slurm jobs (launch/attempt.py)
    RUN_DIR/rehearsal.json, rehearsal.jsonl, verdict.json    of a rehearsal (rehearsal/plan.py)

A folder that scores or predicts has the same names, as far as it has these files.
"""

from __future__ import annotations

import os
from pathlib import Path

from hfscale.errors import CheckpointError

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
PLAN = "plan.json"
PATCH = "environment-{}.patch"
METRICS = "metrics.jsonl"
DETAILS = "details.jsonl"
INCIDENTS = "incidents.jsonl"
GOODPUT = "goodput.jsonl"
EXPORTS = "exports.jsonl"
SAMPLES = "samples.jsonl"
PROFILES = "profiles"
REQUEST, PROFILED = "request.json", "rank-{}.txt"  # of a profile
TENSORBOARD = "tensorboard"
MLFLOW = "mlflow"
WRITERS = "writers"
CHECKPOINTS = "checkpoints"
ATTEMPTS = "attempts"
# of an attempt
OWNER, EXIT_CODE, ENDED, LEFT = "owner.json", "exit_code", "ended", "left"
HEARTBEATS = "heartbeats"
HANGS = "hangs"  # a folder for each attempt that hung, by its number
REPORT = "report.json"  # of a hang
LOGS = "logs"
RANK_LOG, SLURM_LOG = "rank-{}.log", "slurm-{}.log"
EVALUATIONS = "evaluations"
SCORES, PREDICTIONS = "scores.json", "predictions.jsonl"  # of an evaluation
DATA = "data"
TOKENIZER = "tokenizer"
CODE = "code"
GRADIENT_PROOF = "gradient.json"
TRIAL = "trial"
SECRET = "secret"
LOCK = "lock"
JOB = "job"  # the id of the Slurm job that holds the run, or held it last (launch/queue.py)
RESTARTS = "restarts.json"  # how often which job began from which checkpoint
EXCLUDED = "excluded_nodes.txt"
REHEARSAL, REHEARSED = "rehearsal.json", "rehearsal.jsonl"  # its plan, and what was done
VERDICT = "verdict.json"  # on it


# of what scores or predicts: what was asked for
ASKED = "key.json"


def is_run(folder: Path) -> bool:
    """Return whether ``folder`` is a run directory."""
    return os.path.isfile(folder / CONFIG)


def no_run(place: Path | str, *, remedy: str = "") -> CheckpointError:
    """Return what is said where ``place`` is to be a run, and is none."""
    named = f"name a run directory, which holds {CONFIG} and {CHECKPOINTS}/"
    what = "this folder is not a run directory" if os.path.isdir(place) else "there is no such run"
    return CheckpointError(what, where=place, remedy=remedy or named)


def parts_of(out: Path) -> Path:
    """Return where the parts of predictions lie until their file ``out`` is whole."""
    return out.with_name(f".{out.name}.parts")


def run_of(checkpoint: Path) -> Path:
    """Return the run directory that a checkpoint is in, by its name: a checkpoint that was moved to
    another disk may be a link there.

    Raises:
        CheckpointError: if it is named by another place, where its run is not known.
    """
    checkpoint = Path(os.path.abspath(checkpoint))
    if checkpoint.parent.name != CHECKPOINTS:
        raise CheckpointError(
            "this checkpoint lies outside of a run directory, which says what it is of",
            where=checkpoint,
            remedy=f"name it as RUN/{CHECKPOINTS}/{checkpoint.name}, where it may be a link",
        )
    return checkpoint.parents[1]
