"""TensorBoard: curves in numbered groups, a page of charts to look at first, the config as text,
and hyperparameters by which runs compare.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from hfscale import run_files
from hfscale.monitor.tags import numbered
from hfscale.monitor.writers.base import About, Value

# charts of the page CUSTOM SCALARS, by heading: the tags that each shows
LAYOUT: dict[str, dict[str, tuple[str, ...]]] = {
    "At a glance": {
        "loss": ("loss/train", "loss/validation"),
        "gradient norm": ("optim/grad_norm",),
        "learning rate": ("optim/lr",),
        "tokens a second": ("speed/tokens_per_s",),
    },
    "Data": {
        "loss by source": ("loss/train_source/*",),
        "epochs": ("data/epoch", "data/epoch/*"),
    },
    "Layers": {
        "gradient norm by layer": ("optim/grad_norm/*",),
        "update / weight by layer": ("optim/update_ratio/*",),
    },
    "Time and memory": {
        "seconds a step": ("time/step", "time/data_wait"),
        "phases, median rank": ("time/p50/*",),
        "phases, slowest rank": ("time/max/*",),
        "GiB": ("memory/*",),
    },
}
# sections whose keys people vary, and what of others; the table of hyperparameters has these
VARIED = re.compile(
    r"(optim|schedule|objective|task)\.|model\.(architecture|pretrained|config\.\w+)$"
    r"|train\.(steps|epochs|tokens|global_batch|micro_batch)$|run\.seed$"
    r"|engine\.(precision|zero_stage|compile)$|data\.(seq_len|max_length|sources\.\d+\.weight)$"
)
# that table shows the first five by name: these are numbered
FIRST = (
    "optim.lr",
    "train.global_batch",
    "optim.weight_decay",
    "schedule.warmup_steps",
    "run.seed",
)
COMPARED = ("loss/train", "loss/validation", "speed/tokens_per_s")


class TensorBoard:
    """Event files in the run's ``tensorboard/``. What an earlier attempt drew of the steps that are
    done again is dropped, so a resumed run has one curve.
    """

    def __init__(self, about: About) -> None:
        folder = about.run_dir / run_files.TENSORBOARD
        self._board = SummaryWriter(str(folder), purge_step=about.first_step)
        self._board.add_custom_scalars(layout())
        self._compare(varied(about.config))

    def scalars(self, step: int, points: Mapping[str, float]) -> None:
        """Draw ``points``, all in one event."""
        values = [
            Summary.Value(tag=numbered(tag), simple_value=number) for tag, number in points.items()
        ]
        self._board._get_file_writer().add_summary(Summary(value=values), step)
        self._board.flush()

    def text(self, step: int, tag: str, text: str) -> None:
        """Show ``text`` on the page TEXT."""
        self._board.add_text(tag, text, step)
        self._board.flush()

    def close(self) -> None:
        """Close the file."""
        self._board.close()

    def _compare(self, columns: dict[str, Value]) -> None:
        """Put the run into the table HPARAMS, whose metrics are its curves' last points."""
        for summary in hparams(columns, dict.fromkeys(map(numbered, COMPARED), 0.0)):
            self._board._get_file_writer().add_summary(summary)


def varied(config: Mapping[str, Value]) -> dict[str, Value]:
    """Return what of ``config`` the table of hyperparameters has, by its name there."""
    names = {key: f"{number} {key}" for number, key in enumerate(FIRST, start=1)}
    return {names.get(key, key): value for key, value in config.items() if VARIED.match(key)}


def layout() -> dict[str, dict[str, list[object]]]:
    """Return ``LAYOUT`` as TensorBoard takes it: patterns of numbered tags."""
    pages: dict[str, dict[str, list[object]]] = {}
    for heading, charts in LAYOUT.items():
        patterns = {title: [_pattern(tag) for tag in tags] for title, tags in charts.items()}
        pages[heading] = {title: ["Multiline", tags] for title, tags in patterns.items()}
    return pages


def _pattern(tag: str) -> str:
    escaped = re.escape(numbered(tag).removesuffix("*"))
    return f"^{escaped}{'' if tag.endswith('*') else '$'}"
