from pathlib import Path

from hfscale.checkpoint import layout


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name / "engine").mkdir(parents=True)
        (folder / name / layout.MANIFEST).write_text(name)


def test_only_committed_names_are_listed_and_in_the_order_of_steps(tmp_path):
    make(tmp_path, "step-00000010", "step-00000009", "step-123456789")
    make(tmp_path, "step-00000011.partial", "step-00000008.old", "rejected/step-00000012")
    (tmp_path / "step-00000020").mkdir()
    assert [path.name for path in layout.committed(tmp_path)] == ["step-00000009", "step-00000010", "step-123456789"]
    assert layout.step_name(123456789) == "step-123456789" and layout.step_of(layout.committed(tmp_path)[0]) == 9
    assert (tmp_path / "step-00000020") in layout.candidates(tmp_path)
    assert layout.committed(tmp_path / "nowhere") == []


def test_leftovers_are_cleared_and_nothing_else(tmp_path):
    make(tmp_path, "step-00000001", "step-00000002.partial", "step-00000000.old", "mine.old", "rejected/step-00000003")
    layout.clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.old", "rejected", "step-00000001"]


def test_pruning_keeps_the_newest_and_the_permanent(tmp_path):
    make(tmp_path, *(layout.step_name(step) for step in (2, 4, 5, 6, 7)))
    assert [path.name for path in layout.prune(tmp_path, keep_last=1, keep_every_steps=4)] == [layout.step_name(step) for step in (2, 5, 6)]
    assert [layout.step_of(path) for path in layout.committed(tmp_path)] == [4, 7]
    assert layout.prune(tmp_path, keep_last=3, keep_every_steps=None) == []


def test_rejecting_never_overwrites(tmp_path):
    for number in ("", "-2", "-3"):
        make(tmp_path, "step-00000005")
        (tmp_path / "step-00000005" / "mark").write_text(number)
        assert layout.reject(tmp_path / "step-00000005").name == f"step-00000005{number}"
    assert [(tmp_path / "rejected" / f"step-00000005{n}" / "mark").read_text() for n in ("", "-2", "-3")] == ["", "-2", "-3"]
