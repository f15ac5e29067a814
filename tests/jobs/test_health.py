"""A poisoned step of a real run: warned of, skipped, rewound without its rows, or the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hfscale.config.load import to_yaml
from hfscale.config.schema import RunConfig
from hfscale.errors import UnhealthyError
from hfscale.monitor.incidents import Incident, incidents
from hfscale.reports.batch import rebuild
from tests.helpers.corpus import LLAMA, run_values
from tests.helpers.poison import plant
from tests.helpers.ranks import run_ranks
from tests.helpers.training import train

pytestmark = pytest.mark.slow

STEP, BATCH = 110, 8  # the poisoned one; rows of a step
POISONED = [(STEP - 1) * BATCH + k for k in (2, 5)]
LEFT_OUT = tuple((position, position + 1) for position in POISONED)
STAGE_3 = {"zero_stage": 3}
EXACT = ("step", "loss", "grad_norm", "lr", "batch_digest", "tokens_seen")


@pytest.fixture(scope="module")
def poisoned(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with two rows of one step that are one token over and over."""
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(corpus, folder, dirs_exist_ok=True)
    for position in POISONED:
        plant(RunConfig.model_validate(values(folder, folder, "any", "warn")), position, [300])
    return folder


def values(corpus: Path, root: Path, name: str, policy: str, **sections: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "model": LLAMA,
        "data": {"verify": False},
        "train": {"steps": 115, "global_batch": BATCH, "micro_batch": 4},
        "schedule": {"name": "constant", "warmup_steps": 5},
        "optim": {"lr": 3e-3},
        "checkpoint": {"every_steps": 50, "every_minutes": None, "async": False},
        "health": {"policy": policy, "window": 64, "threshold": 3},
    }
    return run_values(corpus, root, name, **own | sections)


def last_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the exact figures of each step, as it was done last."""
    steps = {record["step"]: record for record in records}
    return [{key: record[key] for key in EXACT} for record in steps.values()]


@pytest.fixture(scope="module")
def rewound(
    poisoned: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A run on two ranks that went back, and what it logged."""
    root = tmp_path_factory.mktemp("rewound")
    given = values(poisoned, root, "run", "rewind", engine=STAGE_3)
    records, _ = run_ranks(train, 2, given)
    (root / "run" / "config.yaml").write_text(to_yaml(RunConfig.model_validate(given)))
    return root / "run", records


def test_a_rewind_leaves_out_the_rows_to_blame(rewound: tuple[Path, list[dict[str, Any]]]) -> None:
    run, records = rewound
    [incident] = incidents(run)
    assert (incident.step, incident.kind, incident.decision) == (STEP, "gradient_spike", "rewind")
    assert incident.left_out == LEFT_OUT and incident.back_to == 100
    assert incident.rows == ((STEP - 1) * BATCH, STEP * BATCH)
    assert [place.position for place in incident.places] == [*range(*incident.rows)]
    assert incident.attempt == 1 and incident.scores["grad_norm"] > 2
    steps = [record["step"] for record in records]
    assert steps == [*range(1, STEP), *range(101, 116)], "the step itself was not logged"
    state = json.loads((run / "checkpoints" / "step-00000115" / "state.json").read_text())
    assert state["stream"]["left_out"] == [[*span] for span in LEFT_OUT]
    assert "skipped_rows" not in records[-1], "what is left out is no damage"


def test_it_equals_a_run_that_left_them_out_from_the_start(
    poisoned: Path, rewound: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run, records = rewound
    (tmp_path / "twin").mkdir()
    shutil.copy(run / "incidents.jsonl", tmp_path / "twin")
    twin, _ = run_ranks(train, 2, values(poisoned, tmp_path, "twin", "warn", engine=STAGE_3))
    assert last_of(twin) == last_of(records)
    assert len(incidents(tmp_path / "twin")) == 1, "nothing is out of the ordinary any more"


def test_it_goes_on_alike_on_other_ranks_after_a_kill(
    poisoned: Path, rewound: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """As if killed right after it went back: the ledger is in the incidents alone."""
    run, records = rewound
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000115")
    [resumed] = run_ranks(train, 1, values(poisoned, tmp_path, "run", "rewind"))
    before = [record for record in last_of(records) if record["step"] > 100]
    for record, other in zip(last_of(resumed), before, strict=True):
        assert record["batch_digest"] == other["batch_digest"]
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_its_steps_are_rebuilt_with_and_without_what_was_left_out(
    rewound: tuple[Path, list[dict[str, Any]]],
) -> None:
    run, _ = rewound
    step = rebuild(run, step=STEP)
    assert step.digest == step.logged
    assert [row.position for row in step.rows if row.text == "(left out)"] == POISONED
    whole = rebuild(run, step=STEP, whole=True)
    assert {whole.rows[position - (STEP - 1) * BATCH].ids[1] for position in POISONED} == {300}


def test_a_skip_drops_the_update_and_a_stop_ends_the_run_before_it(
    poisoned: Path, tmp_path: Path
) -> None:
    [skipped] = run_ranks(train, 1, values(poisoned, tmp_path, "skip", "skip"))
    [said] = run_ranks(ended_by, 1, values(poisoned, tmp_path, "stop", "stop"))
    [one], [other] = incidents(tmp_path / "skip"), incidents(tmp_path / "stop")
    assert (one.decision, other.decision) == ("skip", "stop") and one.scores == other.scores
    assert f"step {STEP}: grad_norm" in said
    assert skipped[STEP - 1]["grad_norm"] == one.scores["grad_norm"], "its figures are logged"
    assert skipped[STEP]["grad_norm"] < 2


def ended_by(given: dict[str, Any]) -> str:
    """Return what ended a run; for ``run_ranks``."""
    try:
        train(given)
    except UnhealthyError as error:
        return str(error)
    return "done"


def with_a_late_spike(given: dict[str, Any]) -> list[Incident]:
    """Return the incidents of a run in which the loss of one step is told wrongly, once."""
    from hfscale.training.observers.health import Health

    hear, told = Health.hear, list[int]()

    def mishear(self: Health, step: int, loss: float) -> None:
        wrong = step == 100 and not told
        told.extend([step] * wrong)
        hear(self, step, 50.0 if wrong else loss)

    Health.hear = mishear  # type: ignore[method-assign]
    try:
        train(given)
    finally:
        Health.hear = hear  # type: ignore[method-assign]
    run = Path(given["run"]["root"]) / given["run"]["name"]
    return incidents(run)


def test_a_spike_of_the_loss_takes_back_the_checkpoint_that_has_it(
    corpus: Path, tmp_path: Path
) -> None:
    given = values(corpus, tmp_path, "run", "rewind")
    [[incident]] = run_ranks(with_a_late_spike, 1, given)
    assert (incident.kind, incident.step, incident.back_to) == ("loss_spike", 100, 50)
    assert incident.left_out == ((99 * BATCH, 100 * BATCH),), "no row explains it: the whole step"
    assert (tmp_path / "run" / "checkpoints" / "rejected" / "step-00000100").is_dir()


def with_a_flipped_bit(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a run in which one bit of rank 1's weights flips after step 10."""
    from hfscale.training.observers.base import Step
    from hfscale.training.observers.replicas import Replicas

    look, flipped = Replicas.look, list[int]()

    def struck(self: Replicas, step: Step) -> None:
        if step.number == 10 and self.engine.all.rank == 1 and not flipped:
            [*self.engine.module.parameters()][3].data.view(-1).view(torch.int32)[7] ^= 1
            flipped.append(step.number)
        look(self, step)

    Replicas.look = struck  # type: ignore[method-assign]
    try:
        return train(given)
    finally:
        Replicas.look = look  # type: ignore[method-assign]


def test_a_flipped_bit_is_seen_and_taken_back(corpus: Path, tmp_path: Path) -> None:
    def given(name: str, policy: str) -> dict[str, Any]:
        return values(
            corpus,
            tmp_path,
            name,
            "",
            train={"steps": 12, "global_batch": BATCH, "micro_batch": 4},
            checkpoint={"every_steps": 5, "every_minutes": None},
            engine={"zero_stage": 0},
            health={"policy": policy, "replicas_every_steps": 5},
        )

    struck, _ = run_ranks(with_a_flipped_bit, 2, given("struck", "rewind"))
    [incident] = incidents(tmp_path / "struck")
    assert (incident.kind, incident.step, incident.back_to) == ("replicas_differ", 10, 5)
    assert incident.left_out == () and "other weights than the rest, since step 6" in incident.text
    healthy, _ = run_ranks(train, 2, given("healthy", "warn"))
    assert last_of(struck) == last_of(healthy) and not incidents(tmp_path / "healthy")
