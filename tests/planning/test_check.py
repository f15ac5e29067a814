"""A run beside its plan, and what later plans learn from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hfscale.config.load import load_config, to_yaml
from hfscale.config.schema import RunConfig
from hfscale.errors import CheckpointError, ConfigError, UserError
from hfscale.planning.check import check
from hfscale.planning.corrections import MEMORY, SAVE, STEP, correction, corrections
from hfscale.planning.figures import GIB, Figure
from hfscale.planning.plan import make_plan
from hfscale.planning.site import Asked
from launch.commands.plan import plan as plan_verb
from tests.planning.test_plan import config_of

CPU = Asked(gpu="cpu", gpus=2, memory_gib=8)
SAVES = (2.0, 2.0, 4.0)


def run_at(root: Path, name: str, *, memory_gib: float, step_s: float, stage: int = 1) -> Path:
    """Return a run directory whose files say what a run on two CPU ranks took."""
    values = config_of().model_dump(mode="json", by_alias=True)
    values["run"] |= {"root": str(root), "name": name}
    values["engine"] |= {"zero_stage": stage}
    run_dir = root / name
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(RunConfig.model_validate(values)))
    entry = {"procs": 2, "launcher": "local", "ranks": ["here: cpu", "here: cpu"]}
    (run_dir / "environment.json").write_text(json.dumps([entry]))
    lines: list[dict[str, Any]] = [
        {"step": step, "attempt": 1, "step_s": took, "memory_gib": memory_gib, "loss": 1.0}
        for step, took in enumerate([9.0, 5.0, step_s, step_s, step_s], start=1)
    ]
    for line, save_s in zip(lines[2:], SAVES, strict=True):
        line["save_s"] = save_s  # logged until the next one
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def test_a_run_is_held_against_its_plan_and_keeps_that(tmp_path: Path):
    run_dir = run_at(tmp_path, "one", memory_gib=1.5, step_s=0.75)
    compared = check(run_dir)
    kept = json.loads((run_dir / "plan.json").read_text())
    assert kept["seen"] == {
        MEMORY: 1.5 * GIB,
        STEP: 0.75,  # the first steps are slow
        SAVE: 3.0,
    }
    config = load_config(run_dir / "config.yaml").config
    plan = make_plan(config, CPU)
    assert kept["planned"] == {MEMORY: plan.peak, STEP: plan.step_s, SAVE: plan.save_s}
    assert "off" in compared.text() and compared.changed == ()


def test_later_plans_learn_from_checked_runs(tmp_path: Path):
    config = load_config(run_at(tmp_path, "one", memory_gib=2, step_s=1) / "config.yaml").config
    before = make_plan(config, CPU)
    for number, factor in enumerate((1.1, 1.1, 1.2, 9.0)):  # the last is an odd one
        held, took = factor * before.peak / GIB, factor * before.step_s
        check(run_at(tmp_path, f"run-{number}", memory_gib=held, step_s=took))
    learnt = corrections(tmp_path, device="cpu", measured=False)
    assert learnt[MEMORY].runs == 4
    assert learnt[MEMORY].factor == pytest.approx(math.sqrt(1.1 * 1.2))
    plan = make_plan(config, CPU)
    peak = plan.figure("as checked runs", "peak a rank")
    assert peak.value == pytest.approx(before.peak * math.sqrt(1.1 * 1.2))
    assert "4 checked runs" in peak.how
    small = make_plan(config, Asked(gpu="cpu", gpus=2, memory_gib=before.peak * 1.05 / GIB))
    assert "more than there is" in small.advice[-1]
    assert make_plan(config, Asked(gpu="h100", gpus=2)).sections[-1].title == "the run"


def test_a_correction_is_robust():
    one = correction([(1.0, 1.1)])
    many = correction([(1.0, 1.1), (2.0, 2.2), (3.0, 3.3), (4.0, 40.0)])
    assert one and many
    assert many.factor == pytest.approx(1.1)
    assert many.high / many.low < one.high / one.low  # of one run nothing is known of the spread
    assert correction([]) is None
    assert one.apply(Figure("peak", 10.0, "s", "seen")).value == pytest.approx(11.0)


def test_a_run_that_changed_is_said(tmp_path: Path):
    run_dir = run_at(tmp_path, "one", memory_gib=1, step_s=1)
    check(run_dir)
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("zero_stage: 1", "zero_stage: 2"))
    assert check(run_dir).changed == ("stage: 1 -> 2",)
    entries = json.loads((run_dir / "environment.json").read_text())
    (run_dir / "environment.json").write_text(json.dumps(entries * 2))
    with pytest.raises(CheckpointError, match="begun anew"):
        check(run_dir)


def test_what_cannot_be_checked_is_refused(tmp_path: Path):
    run_dir = run_at(tmp_path, "one", memory_gib=1, step_s=1)
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="logged no step"):
        check(run_dir)
    with pytest.raises(ConfigError, match="says itself"):
        plan_verb(str(run_dir), gpus=8, checked=True)
    (run_dir / "environment.json").unlink()
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text('{"step": 1, "attempt": 1, "step_s": 1.0}\n')
    with pytest.raises(CheckpointError, match="how many ranks"):
        check(run_dir)
    for took in ("-1.0", "NaN", '"x"'):
        metrics.write_text(f'{{"step": 1, "attempt": 1, "step_s": {took}}}\n')
        with pytest.raises(UserError, match="step_s"):
            check(run_dir)
    strange: list[dict[str, Any]] = [{"procs": 1, "ranks": ["here: NVIDIA Z9"]}]
    (run_dir / "environment.json").write_text(json.dumps(strange))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "attempt": 1, "step_s": 1.0}\n')
    with pytest.raises(CheckpointError, match="not in the table"):
        check(run_dir)


def test_a_damaged_plan_of_another_run_says_nothing(tmp_path: Path):
    config = load_config(run_at(tmp_path, "one", memory_gib=2, step_s=1) / "config.yaml").config
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "plan.json").write_text("{")
    assert corrections(tmp_path, device="cpu", measured=False) == {}
    assert make_plan(config, CPU).fits
