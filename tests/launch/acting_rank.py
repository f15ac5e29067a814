"""A rank that acts as told by ACT: a real process that needs no torch. Run as `python -m
tests.launch.acting_rank CONFIG`.
"""

from __future__ import annotations

import os
import signal
import sys
import time


def main() -> int:
    act, rank = os.environ.get("ACT", "fine"), int(os.environ["RANK"])
    print(
        f"rank {rank} of {os.environ['WORLD_SIZE']} has pid {os.getpid()} and "
        f"{os.environ['OMP_NUM_THREADS']} threads",
        flush=True,
    )
    print(f"rank {rank} complains", file=sys.stderr, flush=True)
    if act == "fine":
        return 0
    if act == "user error":
        print("error: the same on every rank", file=sys.stderr, flush=True)
        return 2
    if act == "one fails" and rank == 1:
        print("rank 1 says why", flush=True)
        return 3
    if act == "one is killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "listens":
        seen: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
        print("listening", flush=True)
        while not seen:
            time.sleep(0.01)
        time.sleep(0.2)  # a save
        print(f"stopped after {len(seen)} request", flush=True)
        return 75
    if act == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("listening", flush=True)
    time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
