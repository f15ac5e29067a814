"""What a config is on its way to, in three stages. Each is reached when it is asked for, and
what it reads is read once.

    read     files and the plan of the data, before torch is imported: ``read`` looks at them
    shape    the model on the meta device and the data: ``check`` sees whether they fit together
    live     the trainer: collective

No stage but the last waits for another rank, or imports DeepSpeed.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hfscale.checkpoint.layout import newest_state
from hfscale.checkpoint.state import CheckpointState
from hfscale.config.finetune import FinetuneConfig
from hfscale.config.rules import Length, run_length
from hfscale.config.schema import RunConfig, TrainConfig
from hfscale.dist.world import World
from hfscale.engine.ds_config import deepspeed_config
from hfscale.errors import ConfigError
from hfscale.monitor.writers.base import refuse_missing
from hfscale.packages import refuse_wrong_versions
from hfscale.run.sources import Sources
from hfscale.shards.tables import table_files

if TYPE_CHECKING:  # which take seconds to import
    import torch

    from hfscale.dist.stop import StopRequest
    from hfscale.run.shape import Shape
    from hfscale.training.loop import Trainer


class Run:
    """A run of ``config``, of which this process is the rank at ``world``; ``fresh`` if it does not
    go on from the checkpoints in its directory.
    """

    def __init__(self, config: TrainConfig, world: World = World(), *, fresh: bool = False) -> None:
        self.config, self.world = config, world
        self.fresh = fresh

    # ----------------------------------------------------------------------------------------- read
    @cached_property
    def saved(self) -> CheckpointState | None:
        """The state of the newest checkpoint; None: the run begins."""
        return None if self.fresh else newest_state(self.config.run_dir)

    @cached_property
    def sources(self) -> Sources | None:
        """Its shards; None: it has labelled examples."""
        return Sources(self.config) if isinstance(self.config, RunConfig) else None

    def length(self, rows: int) -> Length | None:
        """Return how long the run is, with ``rows`` of an epoch (0: not known); None: that decides
        it.
        """
        train = self.config.train
        saved = self.saved if self.sources else None  # examples are counted from step 0
        if not rows and train.epochs is not None:
            return None
        return run_length(
            train,
            rows=rows,
            seq_len=self.config.data.seq_len,
            step=saved.step if saved else 0,
            consumed_rows=saved.position.consumed_rows if saved else 0,
        )

    def read(self, *, device_type: str) -> None:
        """Return if nothing that can be known without torch speaks against the run.

        Raises:
            UserError: for what the engine refuses on this device, data or a tokenizer that is not
                there, sources that do not fit together.
        """
        refuse_wrong_versions()
        refuse_missing(self.config.metrics.drawn_by)
        deepspeed_config(self.config, device_type=device_type)
        self._refuse_missing_tokenizer()
        if isinstance(self.config, FinetuneConfig):
            data = self.config.data
            for table in dict.fromkeys((data.train, data.validation, data.test)):
                if isinstance(table, str):
                    table_files(table)
        if self.sources:
            self.sources.check(self.saved)

    def _refuse_missing_tokenizer(self) -> None:
        tokenizer = self.config.tokenizer
        if tokenizer is None:
            return
        path = Path(tokenizer.path)
        if path.is_absolute() and not path.exists():
            raise ConfigError(
                "there is no tokenizer",
                where="tokenizer.path",
                value=tokenizer.path,
                remedy="train one with `hfscale tokenizer train CONFIG`, or give a folder or hub "
                "name that has one",
            )

    # ---------------------------------------------------------------------------------------- shape
    @cached_property
    def shape(self) -> Shape:
        """What will be trained, and on what."""
        from hfscale.run.shape import Shape

        return Shape(self)

    def check(self) -> None:
        """Return if the parts of the run fit together: answered on a login node, in seconds.

        Raises:
            UserError: for the first that does not.
        """
        self.shape.check()

    # ----------------------------------------------------------------------------------------- live
    def live(self, device: torch.device, stop: StopRequest | None = None) -> Trainer:
        """Return the trainer, resumed from the run's newest good checkpoint if there is one.
        Collective.

        Raises:
            UserError: for anything in the config, the data or the checkpoints that cannot be used
                together.
        """
        from hfscale.run.live import live

        return live(self, device, stop)
