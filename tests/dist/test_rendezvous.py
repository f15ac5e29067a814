"""Nobody from elsewhere reaches the ranks of one machine, nobody without the secret is a rank, and
what they say is JSON.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hfscale.dist.agree import from_all_ranks
from hfscale.dist.group import host_group
from hfscale.dist.rendezvous import prove
from hfscale.dist.secret import SECRET, known_secret, make_secret
from hfscale.dist.world import LISTEN_FD, Place, World, listen
from hfscale.errors import ConfigError
from tests.helpers.ranks import run_ranks


def listening() -> set[str]:
    """Return the addresses on which this process listens, as /proc has them."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    own = {os.readlink(link) for link in links if os.path.lexists(link)}
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.add(fields[1].partition(":")[0])
    return found


def open_doors() -> tuple[set[str], str | None]:
    return listening(), os.environ.get(LISTEN_FD)


def told(rank_of: dict[int, int]) -> list[object]:
    rank = int(os.environ["RANK"])
    return from_all_ranks((rank, float("-inf"), {"é\n": None}, "x" * rank_of[rank]))


def proven(secrets: list[str]) -> str:
    """Return what a rank is told that knows one of ``secrets``."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        prove(World(Place(rank, size), secret=secrets[rank]), host_group())
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.slow  # ranks
def test_ranks_of_one_machine_listen_on_its_loopback_alone():
    found = run_ranks(open_doors, 2, fresh=True)
    assert [addresses for addresses, _ in found] == [{"0100007F"}] * 2  # the store and gloo
    assert [handle for _, handle in found] == [None] * 2  # nobody that a rank starts believes it


@pytest.mark.slow  # ranks
def test_ranks_tell_each_other_json():
    first, second = run_ranks(told, 2, {0: 0, 1: 100_000})
    assert first == second
    assert first[0] == [0, float("-inf"), {"é\n": None}, ""]
    assert first[1] == [1, float("-inf"), {"é\n": None}, "x" * 100_000]


@pytest.mark.slow  # ranks
def test_a_rank_that_does_not_know_the_secret_is_refused_by_all():
    assert run_ranks(proven, 2, ["right", "right"]) == ["", ""]
    said = run_ranks(proven, 2, ["right", "guessed"])
    assert "does not know the secret" in said[0]
    assert "rank 1" in said[0]
    assert "rank 0" in said[1]  # to whom the other is the stranger


def test_alone_the_same_values_come_back_as_from_others():
    assert from_all_ranks((1, {2: "b"})) == [[1, {"2": "b"}]]
    with pytest.raises(TypeError, match="PosixPath"):
        from_all_ranks(Path("a"))


def test_a_port_is_ours_from_the_start():
    with listen() as listener:
        address, port = listener.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(OSError, match="in use"):
            listen(port)


def test_the_secret_is_its_users_alone(tmp_path: Path):
    make_secret(tmp_path)
    secret = known_secret(tmp_path)
    assert len(secret) == 64
    assert stat.S_IMODE((tmp_path / SECRET).stat().st_mode) == 0o600
    make_secret(tmp_path)
    assert known_secret(tmp_path) == secret  # ranks may be about to read it
    assert secret not in repr(World().sharing(secret))
    (tmp_path / SECRET).chmod(0o644)
    assert known_secret(tmp_path) == ""
    make_secret(tmp_path)
    assert known_secret(tmp_path) not in ("", secret)
    (tmp_path / SECRET).rename(tmp_path / "elsewhere")
    (tmp_path / SECRET).symlink_to(tmp_path / "elsewhere")
    assert known_secret(tmp_path) == ""  # who made the link may know what it says
