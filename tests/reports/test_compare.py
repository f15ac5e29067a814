"""`hfscale compare`: evaluations and validations of runs in one table, as text, csv and a
picture.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from hfscale.errors import DataError
from hfscale.reports.compare import find, table, write_csv
from launch.commands.runs import compare


def make_run(folder: Path, f1: float) -> Path:
    """Return a run directory with a log whose last line a kill has torn, and an evaluation."""
    evaluation = folder / "evaluations" / "ner-test" / "step-00000002-abc"
    evaluation.mkdir(parents=True)
    (evaluation / "scores.json").write_text(
        json.dumps(
            {
                "model": folder.name,
                "scores": {"f1": f1, "precision": None},
                "intervals": {"f1": [f1 - 0.1, f1 + 0.1]},
            }
        )
    )
    records = [
        {"step": 1, "loss": 2.0, "validation_f1": 0.1},
        {"step": 2, "loss": 1.0, "validation_f1": 0.2},
        {"step": 3, "loss": 1.0},
    ]
    (folder / "metrics.jsonl").write_text(
        "\n".join(map(json.dumps, records)) + '\n{"step": 4, "validation_f1'
    )
    return folder


def test_a_table_as_text_csv_and_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, f1) for name, f1 in (("a", 0.5), ("é", 0.75))]
    compare(runs, csv=tmp_path / "t.csv", png=tmp_path / "t.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["f1", "precision"]
    assert [line.split() for line in lines[1:3]] == [
        ["a", "ner-test", "0.5000"],
        [str(runs[0]), "validation,", "step", "2", "0.2000"],
    ]
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        [row["name"] for row in rows][2] == "é ner-test"
        and float(rows[2]["f1_high"]) == 0.85
        and rows[1]["f1_low"] == ""
    )
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    scores = next(runs[0].glob("evaluations/*/*/scores.json"))
    assert table(find([scores])).splitlines()[1].split() == ["a", "ner-test", "0.5000"]


def test_what_has_no_scores(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    for source, problem in (
        (tmp_path, "no scores here"),
        (tmp_path / "none", "no scores here"),
        (tmp_path / "x.json", "should be an object"),
    ):
        with pytest.raises(DataError, match=problem):
            find([source])
    with NamedTemporaryFile(
        "w", suffix=".json"
    ) as file:  # few folders above it, none of which is an evaluation's
        file.write('{"model": "m", "examples": 1, "scores": {"f1": 0.5}, "intervals": {}}')
        file.flush()
        assert find([Path(file.name)])[0].scores["f1"] == 0.5
    with pytest.raises(DataError, match=r"(?s)cannot write.*nowhere"):
        write_csv([{"name": "a", "f1": 0.5}], tmp_path / "nowhere" / "t.csv")


def test_runs_that_differ_in_seed_alone_get_a_mean(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, f1)
        for name, f1 in (("seed_1", 0.5), ("seed_2", 0.7), ("other", 0.9), ("bare", 0.1))
    ]
    for run, seed, lr in zip(runs, (1, 2, 2), (0.1, 0.1, 0.2), strict=False):
        config = {
            "run": {"name": run.name, "seed": seed},
            "optim": {"lr": lr},
            "checkpoint": {"keep_best": {"metric": "validation_f1", "mode": "min"}},
        }
        (run / "config.yaml").write_text(json.dumps(config))
    found = find(runs)
    means = {line.name: line for line in found if "mean of" in line.name}
    assert set(means) == {
        f"{what}, mean of 2 seeds" for what in ("ner-test", "validation", "best validation")
    }
    mean = means["ner-test, mean of 2 seeds"]
    assert mean.scores["f1"] == pytest.approx(0.6) and mean.scores["f1_deviation"] == pytest.approx(
        0.02**0.5
    )
    assert "0.6000 ± 0.1414" in table(found) and "best validation, step 1 " in table(found)


def test_evaluations_that_differ_in_options_alone_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "a", 0.5)
    [file] = run.glob("evaluations/*/*/scores.json")
    again = file.parents[1] / "step-00000002-def" / "scores.json"
    again.parent.mkdir()
    again.write_text(file.read_text().replace('"a"', json.dumps(str(run))))
    assert [line.name for line in find([run])][:2] == [
        "a ner-test step-00000002-abc",
        "a ner-test step-00000002-def",
    ]


def test_scores_of_unlike_tasks_have_columns_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The f1 of entities is 0 to 1, that of extractive QA 0 to 100."""
    runs = [
        make_run(tmp_path / name, f1)
        for name, f1 in (("names", 0.5), ("answers", 75.0), ("more_names", 0.6))
    ]
    for run, task in zip(
        runs, ("token_classification", "extractive_qa", "token_classification"), strict=True
    ):
        (run / "config.yaml").write_text(
            json.dumps({"run": {"name": run.name}, "task": {"name": task}})
        )
        [file] = run.glob("evaluations/*/*/scores.json")
        file.write_text(json.dumps({"task": task, **json.loads(file.read_text())}))
    compare(runs, csv=tmp_path / "t.csv", png=tmp_path / "t.png")
    assert (
        "token_classification f1  token_classification precision  extractive_qa f1"
        in capsys.readouterr().out
    )
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        answers = next(row for row in csv.DictReader(file) if row["name"] == "answers ner-test")
    assert (
        answers["extractive_qa f1"],
        answers["extractive_qa f1_high"],
        answers["token_classification f1"],
    ) == ("75.0", "75.1", "")
    means = [line for line in find(runs) if "mean of" in line.name]
    assert [line.scores["token_classification f1"] for line in means] == [
        pytest.approx(0.55),
        pytest.approx(0.2),
    ]
    assert {name for line in find([runs[0], runs[2]]) for name in line.scores} >= {
        "f1",
        "f1_low",
    }, "of one task they keep their names"
