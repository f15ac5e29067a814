"""How long does training wait for a checkpoint? An asynchronous save's stall as a share of a
synchronous save, on CPU ranks.

The two take turns on one engine of about 100 million parameters. The first save of each, which
makes its buffers, does not count.

    # about 2 minutes; 1.3 GB a save in the temporary folder
    python -m benchmarks.async_save [--turns 5] [--procs 2]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import interleaved, machine, ratio, record, spread, table, verdict

SHAPE = {"vocab_size": 20_000, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 128}
SYNCHRONOUS, BEHIND = "synchronous save", "stall of an asynchronous save"


def measure(folder: Path, turns: int) -> tuple[int, dict[str, list[float]]]:
    """Return the number of parameters, and the seconds that training waits for each save. Runs on
    every rank.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from hfscale.checkpoint.manager import CheckpointManager
    from hfscale.checkpoint.state import CheckpointState
    from hfscale.config.schema import Checkpoint
    from hfscale.engine.engine import Engine
    from tests.engine.tiny import tiny_config

    ranks = torch.distributed.get_world_size()
    torch.manual_seed(0)
    config = tiny_config(1, "bf16", world_size=ranks)
    engine = Engine.create(
        GPT2LMHeadModel(GPT2Config(**SHAPE)), config=config, device=torch.device("cpu")
    )
    step = 0

    def saver(name: str, *, behind: bool) -> Callable[[], float]:
        checkpoints = CheckpointManager(
            folder / name,
            config=Checkpoint.model_validate({"keep_last": 1, "async": behind}),
            place=engine.all,
        )

        def save() -> float:
            nonlocal step
            step += 1
            checkpoints.save(engine, CheckpointState(step=step))
            checkpoints.wait()  # nothing writes during the next turn
            return checkpoints.stall_s

        return save

    savers = {SYNCHRONOUS: saver("front", behind=False), BEHIND: saver("behind", behind=True)}
    times = interleaved(savers, repeats=turns, warm=1)
    parameters = sum(p.numel() for p in engine.module.parameters())
    engine.close()
    return parameters, times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--procs", type=int, default=2)
    args = parser.parse_args()
    from benchmarks import async_save  # the ranks find the function by this module's name
    from tests.helpers.ranks import run_ranks

    about = machine("torch", "deepspeed")
    with tempfile.TemporaryDirectory() as folder:
        parameters, times = run_ranks(
            async_save.measure, args.procs, Path(folder), args.turns, timeout_s=180
        )[0]
    share = ratio(times[BEHIND], times[SYNCHRONOUS])
    record(
        "async_save",
        f"""GPT-2 of {parameters / 1e6:.0f}M parameters, ZeRO 1, bf16,
{args.procs} CPU ranks; {args.turns} turns.

{table(["", "s"], [[name, spread(taken)] for name, taken in times.items()])}

Training waits for {share:.1%} of a synchronous save: {verdict(share, at_most=0.15)}. {about}""",
    )


if __name__ == "__main__":
    main()
