"""The weights that LoRA adapters stand beside, which a run does not save."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel

from hfscale.checkpoint import layout
from hfscale.checkpoint.base import identity
from hfscale.checkpoint.pretrained import labels_of, match, tell
from hfscale.checkpoint.weights import open_weights, verify_together
from hfscale.config.schema import Lora
from hfscale.models.adapters import transposed


class Beside:
    """The weights at ``folder``, open, and what of ``model`` they fill. What they do not (a new
    head) is trained whole.
    """

    def __init__(self, model: PreTrainedModel, lora: Lora, folder: Path, *, rank: int) -> None:
        if rank == 0 and (folder / layout.MANIFEST).is_file():
            # a run of somebody else's; one of our own never prunes what adapters need
            with suppress(OSError):
                layout.pin(folder.parent, layout.step_of(folder), pinned=True)
        self.reader = open_weights(folder, check=verify_together)
        self.match = tell(match(model, self.reader, labels=labels_of(folder)), model)
        for name in self.match.missing:
            model.get_parameter(name).requires_grad_(True)
        # what every checkpoint says of the weights that are not in it
        self.about = {
            "adapters": {
                "folder": str(folder),
                **identity(folder),
                "scale": lora.alpha / lora.r,
                "match": asdict(self.match),
                "targets": transposed(model),
            }
        }
