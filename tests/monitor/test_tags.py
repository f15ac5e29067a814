"""The table of curves is what docs/monitoring.md explains, and has a place for every figure."""

from pathlib import Path

import pytest

from hfscale.monitor.tags import GROUPS, TAGS, numbered, tagged
from hfscale.monitor.writers.tensorboard import LAYOUT

PAGE = Path(__file__).resolve().parents[2] / "docs" / "monitoring.md"


def table(group: str) -> str:
    """Return the table of ``group`` as the page has it."""
    rows = ["| tag | unit | what it is | a bad one, and what to do |", "|---|---|---|---|"]
    for tag in TAGS:
        if tag.name.partition("/")[0] == group:
            rows.append(f"| `{tag.name}` | {tag.unit} | {tag.what} | {tag.wrong} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("group", dict.fromkeys(tag.name.partition("/")[0] for tag in TAGS))
def test_the_page_explains_every_tag(group):
    assert table(group) in PAGE.read_text(), f"paste into docs/monitoring.md:\n\n{table(group)}"


def test_a_tag_stands_once_and_in_a_group():
    names = [tag.name for tag in TAGS]
    assert len({*names}) == len(names)
    assert {name.partition("/")[0] for name in names} <= {*GROUPS}
    shown = {tag for charts in LAYOUT.values() for tags in charts.values() for tag in tags}
    assert shown - {*names} <= {"memory/*"}, "the layout shows what there is"


def test_every_figure_has_a_tag():
    points = tagged(
        {
            "step": 7,
            "attempt": 2,
            "batch_digest": 2**64 - 1,
            "loss": 2.5,
            "loss_router": 0.5,
            "source_loss": {"web": 2.0, "books": None},
            "validation_loss": 3.0,
            "validation_f1": 0.5,
            "accuracy": 0.25,
            "source_epoch": {"web": 1.5},
            "mfu": None,
            "step_s": float("nan"),
        }
    )
    assert points == {
        "loss/train": 2.5,
        "loss/train_router": 0.5,
        "loss/train_source/web": 2.0,
        "loss/validation": 3.0,
        "loss/validation_f1": 0.5,
        "loss/accuracy": 0.25,
        "data/epoch/web": 1.5,
    }


def test_tensorboard_sorts_groups_as_one_looks_at_them():
    shown = [numbered(f"{group}/x") for group in GROUPS]
    assert sorted(shown) == shown and shown[0] == "1 loss/x"
    assert numbered("run/config") == "run/config"
