"""The debug launcher: one rank in this process, a few tiny steps in RUN-debug, and pdb where an
error happens.

What the command line says wins over the tiny values, so `train.steps=100` is honoured. The real run
is never touched.
"""

from __future__ import annotations

import pdb
import shutil
import sys
import traceback

from hfscale import worker
from hfscale.checks.start import refuse
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.load import COMMAND_LINE, Loaded
from hfscale.config.schema import TrainConfig
from hfscale.errors import EXIT_DONE, UnhealthyError, UserError
from hfscale.log import logger
from hfscale.run_files import LOCK, is_run
from launch import run_dir
from launch.job import Training
from launch.local import gpu_count
from launch.start import Start

SUFFIX = "-debug"
_LAYER_KEYS = ("n_layer", "num_hidden_layers", "num_layers", "decoder_layers", "encoder_layers")


def launch(job: Training) -> int:
    """Return the exit code of a tiny run in the foreground; earlier attempts in RUN-debug are
    replaced.

    Raises:
        UserError: as any launcher.
    """
    on_gpu = gpu_count() > 0
    job = Training(job.request, extra=tiny(job.loaded, on_gpu=on_gpu), fresh=True)
    config = job.config
    start = Start(job, procs=1, gpus=on_gpu)
    # what takes seconds the rank finds out itself
    told = refuse(start) if job.dry_run else start.config()
    for line in told or ():
        logger.info(f"notice: {line}")
    if job.dry_run:
        print(
            f"{job.fit(1)}\nrun directory {config.run_dir} (made anew)\none process, in the "
            "foreground"
        )
        return EXIT_DONE
    with run_dir.locked(config.run_dir):
        if is_run(config.run_dir):
            run_dir.made_by_alone(config.run_dir, launcher="debug")
            logger.info(f"replacing the earlier debug run in {config.run_dir}")
            for old in config.run_dir.iterdir():
                if old.name != LOCK:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
        job.record(launcher="debug", procs=1)
        logger.info(f"run directory {config.run_dir}, one process in the foreground")
        try:
            code = worker.run(job.file)
        except (UserError, UnhealthyError):
            raise
        except Exception:
            traceback.print_exc()
            if sys.stdin.isatty():
                pdb.post_mortem()
            return 1
    if code == EXIT_DONE:
        logger.info(f"done: this config trains; what it wrote is in {config.run_dir}")
    return code


def tiny(wanted: Loaded[TrainConfig], *, on_gpu: bool) -> list[str]:
    """Return the overrides that make ``wanted`` tiny, less those that the command line gives
    itself.
    """
    config = wanted.config
    layers = {f"model.config.{key}": 2 for key in _LAYER_KEYS if key in config.model.config}
    micro_batch = min(2, config.train.micro_batch)
    accumulation = min(2, config.train.global_batch // config.train.micro_batch)
    examples = isinstance(config, FinetuneConfig)
    length = "max_length" if examples else "seq_len"
    small = {
        "train.micro_batch": micro_batch,
        "train.global_batch": micro_batch * accumulation,
        f"data.{length}": min(128, config.data.seq_len),
        "schedule.warmup_steps": min(2, config.schedule.warmup_steps),
        "train.hang_timeout_s": "null",  # pdb takes its time
        "engine.compile": "false",
        "checkpoint.every_steps": 4,
        "metrics.every_steps": 1,
        **layers,
    }
    if not any(
        wanted.source(f"train.{length}") == COMMAND_LINE for length in ("steps", "epochs", "tokens")
    ):
        small |= {"train.steps": 6}
    if not examples:
        small["data.lanes"] = "auto"
    if examples and config.data.validation is not None:
        small["data.validate_every_steps"] = 4
    elif config.data.validation is not None:
        small |= {"data.validation.rows": 4, "data.validation.every_steps": 4}
    if not on_gpu and config.engine.precision == "fp16":
        small["engine.precision"] = "fp32"
    chosen = [
        f"{key}={value}" for key, value in small.items() if wanted.source(key) != COMMAND_LINE
    ]
    return [*chosen, f"run.name={config.run.name.removesuffix(SUFFIX)}{SUFFIX}"]
