"""Run by test_kill: for each line "FOLDER STEPS PORT" on stdin, two forked ranks train and save after every step until killed.

Forked, so that torch and deepspeed are imported once and not before every kill.
"""
from __future__ import annotations

import hashlib
import os
import sys
import traceback
from pathlib import Path

import torch.distributed as torch_dist

from hfscale.checkpoint.manager import CheckpointManager
from hfscale.config.schema import Checkpoint
from hfscale.engine.engine import Engine
from tests.engine.tiny import full_state, tiny_config, tiny_engine, tiny_model, train_step

RANKS = 2


def fingerprint(engine: Engine) -> str:
    digest = hashlib.sha256()
    for _, tensors in sorted(full_state(engine).items()):
        for _, tensor in sorted(tensors.items()):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def train(folder: str, steps: int) -> None:
    torch_dist.init_process_group("gloo")
    config = tiny_config(1, "bf16", world_size=RANKS)
    engine = tiny_engine(config)
    checkpoints = CheckpointManager(Path(folder), config=Checkpoint(keep_last=2), rank=engine.rank, world_size=RANKS)
    loaded = checkpoints.load_latest(engine)
    start = loaded["step"] if loaded else 0
    found = fingerprint(engine)
    if engine.rank == 0:
        print("loaded", start, loaded["fingerprint"] == found if loaded else None, flush=True)
    for step in range(start + 1, steps + 1):
        train_step(engine, config, step)
        checkpoints.save(engine, {"step": step, "fingerprint": fingerprint(engine)}, step=step)
    checkpoints.wait()
    found = fingerprint(engine)
    if engine.rank == 0:
        print("done", steps, found, flush=True)
    engine.close()
    torch_dist.destroy_process_group()


def main() -> None:
    tiny_model()  # imports the rest
    for line in sys.stdin:
        folder, steps, port = line.split()
        os.environ.update(WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        pids = []
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                try:
                    train(folder, int(steps))
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            pids.append(pid)
        print("ranks", *pids, flush=True)
        print("gone", *(os.waitpid(pid, 0)[1] for pid in pids), flush=True)


if __name__ == "__main__":
    main()
