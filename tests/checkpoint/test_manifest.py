import json

import pytest

from hfscale.checkpoint.manifest import _digest, read_manifest, verify, write_file, write_manifest
from hfscale.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step-00000007"
    folder.mkdir()
    entries = [
        write_file(folder, f"engine/rank-0000{n}.safetensors", [b"ab" * 1000, memoryview(b"c" * n)])
        for n in range(3)
    ]
    entries += [write_file(folder, name, [b"{}"]) for name in ("state.json", "config.json")]
    write_manifest(folder, entries, step=7)
    return folder


def test_what_was_written_verifies(checkpoint):
    assert verify(checkpoint) == []
    assert [(entry.path, entry.bytes) for entry in read_manifest(checkpoint)] == [
        ("config.json", 2),
        *((f"engine/rank-0000{n}.safetensors", 2000 + n) for n in range(3)),
        ("state.json", 2),
    ]


def test_every_part_is_checked_by_somebody(checkpoint):
    (checkpoint / "engine/rank-00001.safetensors").unlink()
    found = [verify(checkpoint, part=rank, parts=2) for rank in range(2)]
    assert found == [["engine/rank-00001.safetensors is missing"], []]


@pytest.mark.parametrize(
    "name", ["state.json", "config.json", "engine/rank-00000.safetensors", "probe.safetensors"]
)
def test_what_is_read_is_listed(checkpoint, name):
    """Whoever makes a manifest again may leave a name out: its file would be believed unread."""
    entries = [entry for entry in read_manifest(checkpoint) if entry.path != name]
    (checkpoint / "probe.safetensors").write_bytes(b"")
    write_manifest(checkpoint, entries, step=7)
    [*problems] = verify(checkpoint)
    assert any(name in problem for problem in problems), problems


def test_each_single_flipped_bit_of_the_manifest_is_found_or_harmless(checkpoint):
    path = checkpoint / "manifest.json"
    good, entries = path.read_bytes(), read_manifest(checkpoint)
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        if not verify(checkpoint):  # a space that became another one that JSON skips
            assert read_manifest(checkpoint) == entries


def test_a_newer_format_is_refused_but_not_called_damaged(checkpoint):
    body = json.loads((checkpoint / "manifest.json").read_text())
    del body["sha256"]
    body["version"] = 99
    (checkpoint / "manifest.json").write_text(json.dumps({**body, "sha256": _digest(body)}))
    with pytest.raises(CheckpointError, match="newer version"):
        verify(checkpoint)
