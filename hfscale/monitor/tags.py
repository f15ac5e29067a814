"""Every curve of a run: its tag, the field of ``metrics.jsonl`` behind it, its unit, what it is,
and what a bad one looks like. Writers, the layout of TensorBoard and docs/monitoring.md follow it.

A ``*`` at the end of a name stands for what a run has of a kind: a source, a layer, a score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

# as one looks at them; a tag begins with one of them
GROUPS = ("loss", "optim", "speed", "time", "memory", "data", "health", "goodput")
# of a record that is no curve
NO_CURVES = {"step", "attempt", "batch_digest", "digest_version"}


@dataclass(frozen=True)
class Tag:
    """One curve, or one for each of a kind."""

    name: str
    field: str  # of metrics.jsonl; "": details.jsonl has it, by its tag
    unit: str
    what: str
    wrong: str  # what a bad one looks like, and what to do

    def matches(self, name: str) -> bool:
        """Return whether ``name`` is this tag, or one of its kind."""
        return _fits(self.name, name)


TAGS = (
    Tag(
        "loss/train",
        "loss",
        "as the objective",
        "the training loss, over all rows of the step",
        "rises for hundreds of steps, or jumps and stays: lower optim.lr, or look at the texts "
        "(`hfscale batch`)",
    ),
    Tag(
        "loss/train_source/*",
        "source_loss/*",
        "as the objective",
        "the training loss on the rows of one source",
        "falls faster than all others, near 0: its text repeats itself; lower its weight",
    ),
    Tag(
        "loss/train_*",
        "loss_*",
        "as the objective",
        "one term of a loss that has several",
        "one falls while another rises: weigh them anew in objective.options",
    ),
    Tag(
        "loss/validation",
        "validation_loss",
        "as the objective",
        "the loss on held-out rows, each counted once",
        "rises while loss/train falls: the data is used up; stop, or give more text",
    ),
    Tag(
        "loss/validation_*",
        "validation_*",
        "as the score",
        "perplexity, or what a task scores on its validation split",
        "stands still while loss/validation falls: too few examples, or another score is meant",
    ),
    Tag(
        "optim/lr",
        "lr",
        "1 a step",
        "the learning rate of the update",
        "not the shape you meant: schedule.*",
    ),
    Tag(
        "optim/grad_norm",
        "grad_norm",
        "L2",
        "the gradient's norm over the whole model, before clipping",
        "spikes beside jumps of the loss: the rows of that step (`hfscale batch RUN --step N`); "
        "grows steadily: lower optim.lr",
    ),
    Tag(
        "optim/grad_norm/*",
        "",
        "L2",
        "the same of one layer, the embeddings, or the head",
        "one is 10 times its neighbours: its weights run away; 0: nothing reaches it",
    ),
    Tag(
        "optim/update_ratio/*",
        "",
        "ratio",
        "how far the update moved a layer's weights: norm of the change / norm of the weights",
        "far above 1e-2: optim.lr is too high; under 1e-6: the layer no longer learns",
    ),
    Tag(
        "optim/clipped_share",
        "",
        "0 to 1",
        "the share of steps since the last point whose gradient was clipped",
        "near 1 long after the warm-up: optim.clip_norm, not optim.lr, sets the step",
    ),
    Tag(
        "optim/loss_scale",
        "",
        "factor",
        "what fp16 multiplies the loss by",
        "falls again and again, or stands at 1: use bf16, or a lower optim.lr",
    ),
    Tag(
        "speed/tokens_per_s",
        "tokens_per_s",
        "tokens/s",
        "tokens of all ranks a second of training",
        "drops and stays: time/* says which phase, on which rank `hfscale status`",
    ),
    Tag(
        "speed/tflops",
        "",
        "TFLOP/s",
        "what a rank computes for the model, recomputation not counted",
        "under a third of what the device can: a larger train.micro_batch, engine.compile",
    ),
    Tag(
        "speed/mfu",
        "mfu",
        "0 to 1",
        "the share of the devices' peak that goes into the model",
        "as speed/tflops; a GPU of unknown peak has none",
    ),
    Tag(
        "time/step",
        "step_s",
        "s",
        "one step, without logging, validation and saving",
        "grows with time: another job on the node, heat, a disk that fills",
    ),
    Tag(
        "time/data_wait",
        "data_wait_s",
        "s",
        "waiting for rows, of a step, on rank 0",
        "more than a tenth of time/step: data.prefetch_steps, a faster disk, shards of tokens",
    ),
    Tag(
        "time/save",
        "save_s",
        "s",
        "the last checkpoint: what training waited, and its writing behind",
        "longer than cluster.signal_s: raise that, or a signal comes too late",
    ),
    Tag(
        "time/p50/*",
        "",
        "s a step",
        "a phase in the median rank: data, forward, backward, step (optimizer), collective, "
        "validation, save",
        "collective is most of it: ranks wait for each other, see time/max",
    ),
    Tag(
        "time/max/*",
        "",
        "s a step",
        "the same in the slowest rank",
        "twice time/p50 in data, forward or backward: one slow node; `hfscale status` names it",
    ),
    Tag(
        "memory/peak",
        "memory_gib",
        "GiB",
        "the most that rank 0 has held: of its GPU, or of the machine's memory",
        "creeps up: something is kept from step to step",
    ),
    Tag(
        "memory/allocated",
        "",
        "GiB",
        "tensors on the GPU after a step, in the fullest rank",
        "differs between ranks or grows from step to step: a leak",
    ),
    Tag(
        "memory/reserved",
        "",
        "GiB",
        "what torch holds of the GPU, in the fullest rank",
        "far above memory/allocated, near the GPU's size: fragmentation; a smaller micro-batch",
    ),
    Tag(
        "memory/host",
        "",
        "GiB",
        "memory of the process on its machine, in the fullest rank",
        "climbs towards what the node has: the kernel will kill a rank; smaller prefetch_steps",
    ),
    Tag(
        "data/epoch",
        "epoch",
        "passes",
        "passes over all the data so far",
        "beyond 4 for a large model: text is repeated more than it teaches",
    ),
    Tag(
        "data/epoch/*",
        "source_epoch/*",
        "passes",
        "passes over one source",
        "one far ahead of the others: data.sources weights, max_epochs",
    ),
    Tag(
        "data/tokens_seen",
        "tokens_seen",
        "tokens",
        "tokens trained on so far, over all attempts",
        "not on a straight line: the batch or the data changed",
    ),
    Tag(
        "data/padding_share",
        "",
        "0 to 1",
        "the share of a batch's positions that hold padding",
        "above 0.3: shorter data.max_length, or group by length",
    ),
    Tag(
        "data/documents_a_row",
        "",
        "documents",
        "how many documents a row holds parts of",
        "in the hundreds: very short texts; many bytes of a row separate them",
    ),
    Tag(
        "health/skipped_rows",
        "skipped_rows",
        "rows",
        "rows that touched damaged data, so far",
        "rises: `hfscale shards verify` names the damaged shards",
    ),
    Tag(
        "goodput/*",
        "",
        "0 to 1",
        "the share of this attempt's time on rank 0 that went into compute (forward, backward, "
        "optimizer), start, data, collective, validation, save, observe (logging)",
        "compute under 0.9 after an hour: the largest of the others says why; `hfscale goodput` "
        "counts restarts too",
    ),
    Tag(
        "loss/*",
        "*",
        "as the score",
        "what else the objective reports of a step, such as an accuracy",
        "falls while loss/train falls: the loss asks for something else",
    ),
)


def tagged(record: Mapping[str, object]) -> dict[str, float]:
    """Return the curves' points that a line of ``metrics.jsonl`` holds, by tag."""
    points = {}
    for field, number in numbers(record):
        if field not in NO_CURVES:
            tag = next(tag for tag in TAGS if tag.field and _fits(tag.field, field))
            rest = field.removeprefix(tag.field.removesuffix("*"))
            points[tag.name.removesuffix("*") + rest if "*" in tag.name else tag.name] = number
    return points


def numbers(record: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of ``record`` by name; what lies deeper is joined by a slash."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and isfinite(value):
            yield prefix + name, float(value)


def numbered(tag: str) -> str:
    """Return ``tag`` as TensorBoard has it: it sorts groups by name and opens the first ones, so
    they are numbered.
    """
    group, slash, rest = tag.partition("/")
    return f"{1 + GROUPS.index(group)} {group}{slash}{rest}" if group in GROUPS else tag


def _fits(pattern: str, name: str) -> bool:
    """Return whether ``name`` is ``pattern``, or goes on where that has its star."""
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1]) and name != pattern[:-1]
    return name == pattern
