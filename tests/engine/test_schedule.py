import math
from dataclasses import replace

import pytest

from hfscale.config.rules import Length, run_length, warmed_rows
from hfscale.config.schema import Schedule, Train
from hfscale.engine.schedule import learning_rate


def curve(total: int = 100, **schedule: object) -> list[float]:
    return [
        learning_rate(
            step, peak=1.0, length=Length(total), schedule=Schedule.model_validate(schedule)
        )
        for step in range(1, total + 1)
    ]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_the_warmup_is_a_straight_line_to_the_peak(name):
    assert curve(name=name, warmup_steps=10)[:10] == pytest.approx(
        [step / 10 for step in range(1, 11)]
    )


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_decay_ends_at_the_minimum_and_never_rises(name):
    rates = curve(name=name, warmup_steps=10, min_ratio=0.1)
    assert rates[-1] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in zip(rates[9:], rates[10:], strict=False))


def test_shapes_halfway():
    assert curve(name="cosine", min_ratio=0.0)[24] == pytest.approx(
        0.5 * (1 + math.cos(math.pi / 4))
    )
    assert curve(name="linear", min_ratio=0.2)[49] == pytest.approx(0.6)
    wsd = curve(name="wsd", warmup_steps=10, decay_fraction=0.2, min_ratio=0.0)
    assert wsd[9:80] == [1.0] * 71 and wsd[89] == pytest.approx(0.5)
    assert set(curve(name="constant")) == {1.0}


def test_edges():
    assert curve(total=5, name="cosine", warmup_steps=5)[-1] == 1.0  # nothing left to decay in
    assert curve(total=1, name="cosine") == pytest.approx([0.1])
    rate = learning_rate(
        500, peak=1.0, length=Length(100), schedule=Schedule(name="linear", min_ratio=0.1)
    )
    assert rate == pytest.approx(0.1)  # a run that goes on longer keeps the end value
    with pytest.raises(ValueError, match="count from 1"):
        learning_rate(0, peak=1.0, length=Length(10), schedule=Schedule())


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(
    ("warmup", "after", "before", "now"),
    [(12, 14, 8, 16), (4, 8, 8, 64), (2, 10, 8, 64), (2, 5, 64, 8), (6, 3, 8, 16)],
)
def test_another_batch_goes_on_by_the_rows_that_were_seen(
    name: str, warmup: int, after: int, before: int, now: int
) -> None:
    """It never rises, ends at the minimum, and a later resume changes no rate: the rows at the
    warm-up's end are kept.
    """
    schedule = Schedule.model_validate({"name": name, "warmup_steps": warmup})
    rows = max(20 * before, after * before + 6 * now)
    train = Train(tokens=rows, global_batch=now, micro_batch=now)

    def from_(step: int, kept: int | None) -> tuple[Length, int]:
        seen = after * before + (step - after) * now
        length = run_length(train, rows=1, seq_len=1, step=step, consumed_rows=seen)
        warmed = warmed_rows(warmup, global_batch=now, step=step, consumed_rows=seen, saved=kept)
        return replace(length, warmed=warmed / now), warmed

    def rates(length: Length, first: int) -> list[float]:
        steps = range(first, length.steps + 1)
        return [learning_rate(s, peak=1.0, length=length, schedule=schedule) for s in steps]

    length, warmed = from_(after, None)
    at_the_end = warmup * before if after >= warmup else after * before + (warmup - after) * now
    assert warmed == at_the_end
    decaying = rates(length, max(after, warmup) + 1)
    assert decaying == sorted(decaying, reverse=True)
    assert decaying[-1] == pytest.approx(schedule.min_ratio)
    for again in range(after, length.steps):
        later, _ = from_(again, warmed)
        assert rates(later, again + 1) == rates(length, again + 1)
    if name == "linear":
        whole = length.steps + length.shift - warmed / now
        done = [
            s + length.shift - warmed / now for s in range(max(after, warmup) + 1, length.steps + 1)
        ]
        assert decaying == pytest.approx([1 - 0.9 * part / whole for part in done])
