"""What a run needs of its machines, computed from the run: so much a second from its shards and to
its checkpoints, so much memory and disk.

Each need says how it comes about. Where a run says nothing of one, a need is what is usual. Units:
bytes and flop/s here; a ``Need`` is in the unit of the measurement that it is for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hfscale.checkpoint import layout
from hfscale.checks.finding import figure
from hfscale.config.schema import TrainConfig
from hfscale.engine.ds_config import running_stage
from hfscale.run_files import CHECKPOINTS
from hfscale.shards.manifest import TEXT

if TYPE_CHECKING:
    from hfscale.run.run import Run

HELD = 4  # bytes of a checkpoint for a weight
TEXT_BYTES = 5.0  # of raw text a token: more than tokenizers leave of any common language
# of the rate of matrix products, what training gets at most
MOST_MFU = 0.5
SURE = 0.8  # of what is planned: with less a run ends for certain


@dataclass(frozen=True)
class Need:
    """The least of something that is enough, and below what a run cannot be."""

    least: float
    how: str  # it comes about
    fatal: float = 0.0  # less than that is a failure, not a warning
    usual: bool = False  # of no run in particular: a node that stands out is then told so


@dataclass(frozen=True)
class Needs:
    """What is known of a run: 0 of what is not."""

    ranks: int = 1
    nodes: int = 1
    on_gpu: bool = False
    parameters: int = 0
    trained: int = 0
    optimizer_bytes: float = 8.0  # that it keeps beside a trained weight
    beside_base: bool = False  # adapters: checkpoints do not hold the frozen weights
    stage: int = 0
    precision: str = "fp32"
    # as planned: of a node, and of a GPU; with what makes it up
    node_bytes: float = 0.0
    node_how: str = ""
    gpu_bytes: float = 0.0
    gpu_how: str = ""
    keep: int = 2  # checkpoints
    kept: int = 0  # that are there already
    signal_s: int = 0  # in which a save must be done
    flops_per_token: float = 0.0
    bytes_per_token: float = 0.0  # of the shards
    step_tokens: int = 0
    accumulation: int = 1
    tokens_per_s: float = 0.0  # as this run logged it
    rank_flops: float = 0.0  # a second, of matrix products at ``precision``
    elsewhere: bool = False  # on other machines than those that are measured: a login node

    @property
    def ranks_per_node(self) -> int:
        """How many ranks share the memory and disk of a node."""
        return max(1, self.ranks // self.nodes)

    @property
    def checkpoint_bytes(self) -> int:
        """What a checkpoint takes."""
        frozen = 0 if self.beside_base else self.parameters - self.trained
        return round((HELD + self.optimizer_bytes) * self.trained) + HELD * frozen

    @property
    def speed(self) -> tuple[float, str]:
        """Tokens a second of all ranks, and how that is known; (0, "") if it is not."""
        if self.tokens_per_s:
            return self.tokens_per_s, "as this run logged it"
        if self.elsewhere or not (self.rank_flops and self.flops_per_token):
            return 0.0, ""
        rate = MOST_MFU * self.rank_flops * self.ranks / self.flops_per_token
        return rate, f"{MOST_MFU:.0%} of the matrix products, at most"

    # ------------------------------------------------------------------------- one for each check
    def reading(self) -> Need:
        """Return MB/s of the shards, for a rank."""
        speed, how = self.speed
        if not (speed and self.bytes_per_token):
            return Need(10.0, "usual are 10 and more", usual=True)
        a_rank = speed / self.ranks
        return Need(
            a_rank * self.bytes_per_token / 1e6,
            f"{a_rank:,.0f} tokens/s of {self.bytes_per_token:.2g} bytes ({how})",
        )

    def writing(self) -> Need:
        """Return MB/s to the run directory, for a node."""
        if not (self.checkpoint_bytes and self.signal_s):
            return Need(20.0, "usual are 20 and more", usual=True)
        share = self.checkpoint_bytes / self.nodes
        return Need(
            share / 1e6 / self.signal_s,
            f"{share / 1e9:.3g} GB of a checkpoint in the {self.signal_s} s of cluster.signal_s",
        )

    def free_space(self) -> Need:
        """Return GB in the run directory."""
        one = self.checkpoint_bytes / 1e9
        if not one:
            return Need(0.25, "for logs and metrics", fatal=0.25)
        more = max(1, self.keep + 1 - self.kept)
        there = f", {self.kept} are there" if self.kept else ""
        return Need(
            more * one,
            f"a checkpoint takes about {figure(one)} GB, {self.keep} are kept and one is in the "
            f"making{there}",
            fatal=max(0.25, min(more, 2) * one),
        )

    def file_size(self) -> Need:
        """Return GB of the largest file: a rank's share of a checkpoint, or a log."""
        share = self.checkpoint_bytes / self.ranks / 1e9
        return Need(max(1.0, share), "logs and a rank's share of a checkpoint", fatal=0.01 + share)

    def memory(self) -> Need:
        """Return GiB of a node's memory."""
        ranks = self.ranks_per_node
        if self.elsewhere:
            return Need(2.0, "2 GiB to look at a run", usual=True)
        if not self.node_bytes:
            return Need(2.0 * ranks, "2 GiB for each rank", usual=True)
        return _planned(
            self.node_bytes, f"`hfscale plan` says so of {ranks} ranks: {self.node_how}"
        )

    def gpu_memory(self) -> Need:
        """Return GiB of a GPU."""
        if self.elsewhere or not self.gpu_bytes:
            return Need(0.0, "", usual=True)
        return _planned(self.gpu_bytes, f"`hfscale plan` says so: {self.gpu_how}")

    def all_reduce(self) -> Need:
        """Return GB/s of bus bandwidth at which the gradients of a step take as long as the step
        itself computes: below that the ranks wait for the network.
        """
        speed, how = self.speed
        if self.elsewhere or self.ranks == 1 or not (speed and self.step_tokens):
            usual = 4.0 if self.on_gpu else 0.0
            return Need(usual, f"usual are {usual:.0f} and more" if usual else "", usual=True)
        step_s = self.step_tokens / speed
        # fp32 sums: of a whole step below stage 2, of each micro-batch from there on
        times = self.accumulation if self.stage >= 2 else 1
        size = 4 * self.trained * times * (1.5 if self.stage == 3 else 1)
        moved = 2 * (self.ranks - 1) / self.ranks * size
        return Need(
            moved / step_s / 1e9,
            f"{moved / 1e9:.3g} GB of gradients in a step of {step_s:.3g} s ({how})",
        )


def needs_of(run: Run, *, ranks: int, nodes: int, on_gpu: bool, tokens_per_s: float = 0.0) -> Needs:
    """Return what ``run`` needs on so many ranks. Looks at its model on the meta device.

    Raises:
        UserError: if the parts of the run do not fit together.
    """
    # torch is slow to import
    from hfscale.engine.optimizers import kept_a_weight

    config, shape = run.config, run.shape
    weights = list(shape.skeleton.parameters())
    return Needs(
        ranks=ranks,
        nodes=nodes,
        on_gpu=on_gpu,
        parameters=shape.parameters,
        trained=sum(weight.numel() for weight in weights if weight.requires_grad),
        optimizer_bytes=kept_a_weight(shape.skeleton, config.optim),
        beside_base=config.model.lora is not None,
        stage=running_stage(config.engine),
        precision=config.engine.precision,
        keep=config.checkpoint.keep_last,
        kept=len(layout.committed(config.run_dir / CHECKPOINTS)),
        signal_s=config.cluster.signal_s,
        flops_per_token=shape.flops_per_token,
        bytes_per_token=_bytes_per_token(run),
        step_tokens=config.train.global_batch * config.data.seq_len,
        accumulation=max(1, config.train.global_batch // (config.train.micro_batch * ranks)),
        tokens_per_s=tokens_per_s,
    )


def with_memory(needs: Needs, config: TrainConfig) -> Needs:
    """Return ``needs`` with the memory that `hfscale plan` computes for ``config``, which takes a
    second or two.

    Raises:
        UserError: if the model cannot be built.
    """
    # torch is slow to import
    from hfscale.planning.memory import memory
    from hfscale.planning.subject import Subject

    subject = Subject(config, on_cpu=not needs.on_gpu)
    setup = subject.setup(needs.ranks, a_node=needs.ranks_per_node)
    step = subject.step(setup.micro_batch, checkpointing=setup.checkpointing)
    held = memory(setup, subject.weights, step)
    rank, node = held.peak, held.on_host
    if needs.on_gpu:
        return replace(
            needs,
            gpu_bytes=rank.value,
            gpu_how=rank.how,
            node_bytes=node.value,
            node_how=node.how,
        )
    # on a CPU what a rank holds is in its node's memory
    bytes_of_all = needs.ranks_per_node * rank.value
    return replace(needs, node_bytes=bytes_of_all, node_how=f"each {rank.how}")


def _planned(size: float, how: str) -> Need:
    return Need(size / 2**30, how, fatal=SURE * size / 2**30)


def _bytes_per_token(run: Run) -> float:
    """Return how many bytes of shards a token takes; 0 of labelled examples, a few small files."""
    if run.sources is None:
        return 0.0
    manifests = run.sources.manifests
    if any(manifest.dtype == TEXT for manifest in manifests):
        return TEXT_BYTES
    shards = [shard for manifest in manifests for shard in manifest.shards]
    tokens = sum(shard.tokens for shard in shards)
    return sum(shard.bytes for shard in shards) / tokens if tokens else 0.0
