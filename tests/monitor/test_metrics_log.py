"""metrics.jsonl survives a kill, counts attempts, and TensorBoard shows one value a step."""

import errno
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hfscale.errors import CheckpointError
from hfscale.monitor.metrics_log import MetricsLog
from hfscale.monitor.writers.base import About

RECORD = {
    "loss": 2.5,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "step_s": 0.1,
    "data_wait_s": 0.01,
    "tokens_per_s": 1234.0,
    "mfu": None,
    "batch_digest": 2**64 - 1,
    "source_loss": {"web": 2.5},
}


def log_of(run_dir: Path, *, first_step: int = 1, writers: Sequence[str] = ()) -> MetricsLog:
    about = About(run_dir, "run", first_step=first_step, config={"optim.lr": 1e-3})
    return MetricsLog(about, total_steps=9, writers=writers)


def steps(log: MetricsLog, *numbers: int) -> None:
    for number in numbers:
        log.write({"step": number, **RECORD})
    log.close()


def test_a_resume_appends_with_the_next_attempt_and_drops_a_torn_line(tmp_path):
    steps(log_of(tmp_path, first_step=1), 1, 2, 3)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "lo')  # a kill in the middle of a write
    steps(log_of(tmp_path, first_step=3), 3, 4)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["attempt"]) for record in records] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (3, 2),
        (4, 2),
    ]
    assert records[0]["batch_digest"] == 2**64 - 1  # whole, not rounded to a float


def test_a_damaged_record_is_named_and_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}}\n')
    with pytest.raises(CheckpointError, match=r"damaged[\s\S]*metrics.jsonl"):
        log_of(tmp_path, first_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}}\n'


def test_what_is_not_finite_is_null(tmp_path):
    log = log_of(tmp_path, first_step=1)
    # a step that fp16 skipped
    log.write({"step": 1, **RECORD, "grad_norm": float("inf"), "validation_loss": float("nan")})
    log.close()
    [record] = (
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    assert (
        record["grad_norm"] is None and record["validation_loss"] is None and record["loss"] == 2.5
    )


def test_tensorboard_shows_one_value_a_step(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    steps(log_of(tmp_path, first_step=1, writers=["tensorboard"]), 1, 2, 3)
    steps(log_of(tmp_path, first_step=3, writers=["tensorboard"]), 3, 4)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("1 loss/train")] == [1, 2, 3, 4]
    tags = events.Tags()["scalars"]
    assert "1 loss/train_source/web" in tags and "3 speed/mfu" not in tags


def test_a_record_that_a_full_disk_takes_a_part_of_is_taken_back(tmp_path):
    """With room again the next record would be glued to it, and both be lost to every reader."""
    code = """
import json, resource, signal, sys
from pathlib import Path
from hfscale.monitor.metrics_log import MetricsLog
from hfscale.monitor.writers.base import About
from tests.monitor.test_metrics_log import RECORD, log_of
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = log_of(Path(sys.argv[1]), first_step=1)
log.write({"step": 1, **RECORD})
size, most = log._lines._file.tell(), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, most))
try:
    log.write({"step": 2, **RECORD})
except OSError as error:
    print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
log.write({"step": 3, **RECORD})
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{errno.ENOSPC}\n"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]
