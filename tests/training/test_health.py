"""What is decided of a step, by policy and budget."""

from __future__ import annotations

import math

import pytest

from hfscale.config import schema
from hfscale.dist.agree import Agreed
from hfscale.engine.engine import StepStats
from hfscale.errors import UnhealthyError
from hfscale.monitor.beats import Slow
from hfscale.monitor.incidents import Incident
from hfscale.training.observers.base import Step
from hfscale.training.observers.health import QUIET_STEPS, Health


def watching(policy: str, *, steps: int = 120, **options: object) -> tuple[Health, list[Incident]]:
    """Return what has seen ``steps`` ordinary steps, and where its incidents go."""
    health, written = Health(schema.Health(policy=policy, **options)), list[Incident]()
    health.write = written.append
    for step in range(1, steps + 1):
        assert health.allows(step, 1.0 + step % 5 / 20)
        health.hear(step, 3.0 + step % 5 / 50)
    return health, written


def test_a_run_that_warns_goes_on_but_for_a_gradient_that_is_no_number() -> None:
    health, written = watching("warn")
    assert health.allows(121, 60.0) and health.allows(122, 60.0)
    health.hear(121, 9.0)
    assert [(one.step, one.kind, one.decision) for one in written] == [
        (121, "gradient_spike", "warn"),
        (121, "loss_spike", "warn"),
    ], "of a kind once in a while"
    assert health.allows(121 + QUIET_STEPS, 60.0) and len(written) == 3
    assert "usual" in written[0].text and written[0].scores["grad_norm"] == 60.0
    with pytest.raises(UnhealthyError, match="step 300: the gradient is not finite"):
        health.allows(300, math.nan)
    assert written[-1].decision == "stop" and written[-1].scores == {"grad_norm": None}


def test_skips_are_counted_over_so_many_steps() -> None:
    health, written = watching("skip", budget=2, budget_steps=50)
    assert not health.allows(121, math.inf) and not health.allows(140, 60.0)
    health.hear(140, 9.0)
    assert written[-1].decision == "warn", "its update is made: too late"
    assert not health.allows(172, 60.0), "the first is long ago"
    with pytest.raises(UnhealthyError):
        health.allows(173, 60.0)
    assert [one.decision for one in written] == ["skip", "skip", "warn", "skip", "stop"]


def test_skips_of_earlier_attempts_count_too() -> None:
    health = Health(schema.Health(policy="skip", budget=2), acted=[100, 110])
    with pytest.raises(UnhealthyError):
        health.allows(111, math.inf)


def test_a_rewind_without_a_checkpoint_stops() -> None:
    health, written = watching("rewind")
    assert not health.allows(121, 60.0) and written == [], "not before it is known where to"
    with pytest.raises(UnhealthyError, match="no checkpoint before"):
        health.stay(health.take_offence())
    assert written[-1].decision == "stop"


def test_a_loss_that_is_no_number_is_told_late() -> None:
    health, _written = watching("stop")
    with pytest.raises(UnhealthyError, match="loss is not finite"):
        health.hear(120, math.inf)


def test_while_the_learning_rate_rises_a_spike_must_be_twice_as_high() -> None:
    calm = Health(schema.Health(policy="stop"), warmup_steps=1000)
    for step in range(1, 121):
        calm.allows(step, 1.0 + step % 5 / 20)
    assert calm.allows(121, 20.0)
    with pytest.raises(UnhealthyError):
        watching("stop")[0].allows(121, 20.0)


def test_what_is_ordinary_is_kept_in_checkpoints() -> None:
    health, _ = watching("warn")
    again = Health(schema.Health(policy="stop"), saved=health.state()["health"])
    with pytest.raises(UnhealthyError):
        again.allows(121, 60.0)


def looked(number: int, **figures: float) -> Step:
    stats = StepStats(grad_norm=1.0, lr=1e-3)
    agreed = Agreed({}, stop=False, due=False, failed=False, save=False, end=False, digest=0)
    details = {"optim/update_ratio/0": 1e-3, "optim/update_ratio/1": figures.pop("moved", 1e-3)}
    step = Step(number, True, agreed, stats, tokens_seen=0, skipped_rows=0)
    step.figures.update(figures)
    step.details.update(details)
    return step


def test_a_layer_that_stands_still_and_a_gradient_of_zero_are_told() -> None:
    health, written = watching("rewind")
    health.look(looked(121))
    assert health.allows(121, 0.0), "nothing to take back"
    health.look(looked(122, moved=0.0))
    assert [(one.kind, one.decision) for one in written] == [
        ("gradient_zero", "warn"),
        ("layer_still", "warn"),
    ]
    assert written[-1].text.startswith("1: not moved")


def test_a_validation_that_contradicts_training_is_told() -> None:
    health, written = watching("skip")
    health.look(looked(120, validation_loss=3.2))
    for step in range(121, 150):
        health.hear(step, 2.5)
    health.look(looked(150, validation_loss=3.3))
    assert written == [], "within 5 %"
    health.look(looked(151, validation_loss=3.5))
    assert [(one.kind, one.decision) for one in written] == [("validation_contradicts", "warn")]


def test_a_loss_that_has_lost_half_of_its_way_diverges() -> None:
    health, written = Health(schema.Health(policy="stop")), list[Incident]()
    health.write = written.append
    for step in range(1, 300):
        health.hear(step, 2.0 + 4.0 * 0.98**step)
    for step in range(300, 540):
        health.hear(step, 2.0 + (step - 300) * 0.002)
    with pytest.raises(UnhealthyError, match="came down to"):
        [health.hear(step, 2.0 + (step - 300) * 0.002) for step in range(540, 600)]
    assert written[-1].kind == "divergence"


def test_a_straggler_is_an_incident(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [Slow(2, "n2", "data", step_s=0.6, usual_s=0.2)]
    monkeypatch.setattr("hfscale.training.observers.health.slow_lately", lambda: slow)
    health, written = watching("warn")
    agreed = Agreed({}, stop=False, due=False, failed=False, save=False, end=False, digest=0)
    stats = StepStats(grad_norm=1.0, lr=1e-3)
    health.look(Step(120, False, agreed, stats, tokens_seen=1, skipped_rows=0))
    assert written == [], "where nothing is logged, nobody looks"
    health.look(Step(121, True, agreed, stats, tokens_seen=1, skipped_rows=0))
    [incident] = written
    assert (incident.kind, incident.decision) == ("straggler", "warn")
    assert "rank 2 on n2 is slow in data" in incident.text
    assert incident.scores == {"rank 2": pytest.approx(3.0)}
