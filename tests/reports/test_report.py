"""A run on one page, and two runs beside each other."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from hfscale.config.load import to_yaml
from hfscale.monitor.fence import take
from hfscale.reports.curves import MOST_POINTS, curves_of, thinned
from hfscale.reports.diff import compare_runs
from hfscale.reports.report import report
from tests.helpers.cli import hfscale
from tests.reports.test_status import RECORD, config


def make_run(root: Path, *, losses: dict[int, float], revision: str = "a" * 40) -> Path:
    """Write the files of a run of two attempts, as far as a page asks for them."""
    run = root / "r"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config(root, steps=100)))
    for number in (1, 2):
        assert take(run, launcher="local").number == number
    records = [
        {**RECORD, "step": step, "loss": loss, "grad_norm": 1.0, "attempt": 1 + (step > 2)}
        for step, loss in losses.items()
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    now = time.time()
    phases = {"start/imports": 1.0, "forward": 2.0}
    mark = {"attempt": 1, "step": 1, "began": now - 3, "time": now, "phases": phases}
    (run / "goodput.jsonl").write_text(json.dumps(mark) + "\n")
    entry = {
        "started": "2026-01-01T00:00:00+00:00",
        "launcher": "local",
        "procs": 2,
        "command": ["hfscale", "pretrain", "it's <b>.yaml"],
        "packages": {"torch": "2.13.0"},
        "code": {"revision": revision, "patch": None},
        "ranks": ["n1: cpu", "n2: cpu"],
    }
    (run / "environment.json").write_text(json.dumps([entry]))
    return run


def test_a_page_needs_no_network_and_runs_nothing(tmp_path: Path):
    run = make_run(tmp_path, losses={1: 4.0, 2: 3.5, 3: 3.25, 25: 3.0})
    (run / "incidents.jsonl").write_text(
        json.dumps(
            {
                "step": 2,
                "kind": "loss_spike",
                "decision": "warn",
                "text": "loss 9 at step 2",
                "time": 1.7e9,
                "attempt": 1,
            }
        )
        + "\n"
    )
    html = report(run)
    assert "loss 9 at step 2" in html
    assert not re.search(r"(src|href)=\"(?!#)", html), "pictures are inside"
    assert "<script" not in html and "@import" not in html
    assert "it&#39;s &lt;b&gt;.yaml" in html or "&lt;b&gt;.yaml" in html, (
        "a run's words are escaped"
    )
    assert "<b>.yaml" not in html
    for words in (
        "pretrain: clm, gpt2",
        "Where the time went",
        "gradient norm",
        "n1: cpu; n2: cpu",
    ):
        assert words in html
    assert html.count("<svg") == 2


def test_curves_have_the_last_line_of_a_step_and_mark_where_a_run_went_back(tmp_path: Path):
    run = make_run(tmp_path, losses={1: 4.0, 2: 3.5, 3: 9.0})
    with open(run / "metrics.jsonl", "a") as file:
        for step in (2, 3, 4):
            file.write(json.dumps({**RECORD, "step": step, "loss": 3.0, "attempt": 2}) + "\n")
    curves = curves_of(run)
    assert curves.of("loss") == [(1, 4.0), (2, 3.0), (3, 3.0), (4, 3.0)]
    assert curves.restarts == [3, 2], "another attempt, and a rewind"


def test_a_run_that_has_not_begun_has_a_page(tmp_path: Path):
    run = tmp_path / "r"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config(tmp_path, steps=100)))
    html = report(run)
    for words in ("No step was logged yet", "nothing here says when this run began", "None yet."):
        assert words in html


def test_what_a_report_refuses(tmp_path: Path):
    run = make_run(tmp_path, losses={1: 4.0})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": "two"}\n')
    refused = hfscale("report", run, check=False)
    assert refused.returncode == 2
    assert (
        "a record of the run is damaged" in refused.stderr and "metrics.jsonl:2" in refused.stderr
    )
    assert not (run / "report.html").exists()
    (run / "metrics.jsonl").write_text("no JSON\n" + json.dumps(RECORD) + "\n")
    told = hfscale("report", run)
    assert f"{run}/metrics.jsonl:1 is no record: it is left out" in told.stderr
    assert str(run / "report.html") in told.stdout and (run / "report.html").exists()
    nowhere = hfscale("report", run, tmp_path / "no" / "where.html", check=False)
    assert nowhere.returncode == 2 and "where.html" in nowhere.stderr


def test_a_run_that_was_moved_is_where_it_lies(tmp_path: Path):
    run = make_run(tmp_path, losses={1: 4.0, 2: 3.5})
    moved = run.rename(tmp_path / "moved")
    html = report(moved)
    assert str(moved) in html and str(run) + "<" not in html
    assert "none was logged yet" not in html


def test_a_run_whose_launcher_was_killed_is_not_running(tmp_path: Path):
    run = make_run(tmp_path, losses={1: 4.0, 2: 3.5})
    assert "not while it does not run" not in report(run)
    owner = run / "attempts" / "2" / "owner.json"
    owner.write_text(json.dumps({**json.loads(owner.read_text()), "pid": 2**22 + 1}))
    assert "not while it does not run" in report(run)
    refused = hfscale("profile", run, check=False)
    assert refused.returncode == 2
    assert "not under way" in refused.stderr and "killed, with its launcher" in refused.stderr


def test_a_spike_among_many_steps_stays_in_the_picture(tmp_path: Path):
    run = make_run(tmp_path, losses={step: 50.0 if step == 900 else 3.0 for step in range(1, 2001)})
    points = thinned(curves_of(run).of("loss"))
    assert len(points) <= MOST_POINTS and max(point.most for point in points) == 50.0
    assert "shaded is what lies between" in report(run)


@pytest.mark.parametrize("verb", ["report", "goodput", "profile", "incident"])
def test_what_is_no_run_that_trains(tmp_path: Path, verb: str):
    refused = hfscale(verb, tmp_path, check=False)
    assert refused.returncode == 2 and "this folder is not a run directory" in refused.stderr
    (tmp_path / "config.yaml").write_text("not: [a config\n")
    refused = hfscale(verb, tmp_path, check=False)
    assert refused.returncode == 2 and "config.yaml" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_where_two_runs_part(tmp_path: Path):
    losses = {1: 4.0, 2: 3.5, 3: 3.25}
    first = make_run(tmp_path / "a", losses=losses)
    second = make_run(tmp_path / "b", losses=losses | {3: 3.0}, revision="b" * 40)
    (second / "config.yaml").write_text(to_yaml(config(tmp_path / "b", steps=50)))
    compared = compare_runs(first, second)
    assert [change.name for change in compared.changes["config"]] == ["train.steps"]
    assert [(one.first, one.second) for one in compared.changes["code"]] == [("a" * 12, "b" * 12)]
    assert compared.changes["versions"] == compared.changes["hardware"] == []
    assert compared.steps == [
        "They are equal to step 2. At step 3 they first differ, in loss.",
        "From step 3 on the losses part: 3.25 and 3.0.",
        "At step 3, the last that both have, they are: 3.25 and 3.0.",
    ]
    assert compare_runs(first, first).steps == [
        "All 3 steps that both have logged, to step 3, are equal."
    ]
    out = tmp_path / "both.html"
    told = hfscale("diff", first, second, out)
    assert "A  100" in told.stdout and "B  50" in told.stdout
    assert out.read_text().count("<svg") == 1
    refused = hfscale("diff", first, tmp_path, check=False)
    assert refused.returncode == 2 and "this folder is not a run directory" in refused.stderr


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', ""])
def test_a_torn_last_line_is_passed_over_without_a_word(tmp_path: Path, tail: str):
    run = make_run(tmp_path, losses={1: 4.0})
    with open(run / "metrics.jsonl", "a") as file:
        file.write(tail)
    assert "left out" not in hfscale("report", run).stderr
