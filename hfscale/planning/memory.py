"""The bytes that a rank holds, by part and by moment, at each ZeRO stage.

What DeepSpeed keeps was read in its source and seen on its live engine (tests/planning/
test_memory.py compares every part with the storages of real ranks). With P weights that are
trained, b bytes each at the precision of the run, and W ranks:

                    stage 0      1            2                   3
    weights         4 P          b P          b P                 b P / W
    master (fp32)                4 P / W      4 P / W             4 P / W
    optimizer       k P          k P / W      k P / W             k P / W
    gradients       4 P          4 P          4 P / W             4 P / W
    bucket                       4 R          b R                 4 R
    reduction       4 min(P, 5e8)             (b + 4) min(R, P)   8 min(R, P)

k is 8 of AdamW, 4 of Lion and of SGD with momentum. R is ``reduce_bucket_size``, which DeepSpeed
allocates whole however small the model is; stage 3 gathers weights beside. The most that a rank
holds is the largest of its moments: start, forward and backward, the last reduction, the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hfscale.planning.figures import GIB, Figure, count, size, total
from hfscale.planning.parameters import Weights
from hfscale.planning.tracing import Step

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32 = 4
# DeepSpeed's defaults, in elements (deepspeed/runtime/zero/config.py)
DEFAULTS: Mapping[str, float] = {
    "reduce_bucket_size": 5e8,
    "sub_group_size": 1e9,
    "stage3_max_live_parameters": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
}
FLATTENED = 5e8  # elements that stage 0 reduces at once (DeepSpeed's engine)
# of the memory that torch's allocator holds, what is in pieces that nothing fits into: 3 to 10 %
# were seen on GPUs; `hfscale plan --check` learns a run's own
FRAGMENTED = 0.05
CONTEXT_BYTES = 0.6 * GIB  # CUDA's context and libraries, which torch does not count
NCCL_BYTES = 0.5 * GIB  # its buffers, with more than one rank
# resident of a rank once torch, DeepSpeed and transformers are loaded and the model was checked;
# and what malloc keeps in pieces of memory that comes and goes, as part of the most of it: by a fit
# to benchmarks/plan.py, which says how far both carry. What stays for good leaves no pieces
PROCESS_BYTES = 0.51 * GIB
PRODUCTS_16_BYTES = 0.05 * GIB  # of products in 16 bit: kernels, and weights in their layout
STAGE_3_BYTES = 0.07 * GIB  # of what stage 3 keeps for each module and parameter
RETAINED = 0.23
TOKENIZING_BYTES = 0.3 * GIB  # of a process that tokenizes
NCCL_SHM_BYTES = 0.03 * GIB  # of a rank, in /dev/shm
MOMENTS_OF = ("start", "forward and backward", "last reduction of a backward", "update")
Parts = list[Figure]


@dataclass(frozen=True)
class Setup:
    """How a model is trained: all that memory and speed depend on beside the model itself."""

    stage: int  # that runs
    precision: str
    offload: str
    checkpointing: bool
    micro_batch: int
    accumulation: int
    ranks: int
    a_node: int  # ranks of one node
    on_cpu: bool = False
    async_save: bool = True
    optimizer: str = "AdamW"
    kept: float = 8.0  # bytes that it keeps beside a trained weight, on average
    tokenizing: int = 0  # processes of a rank
    zero: Mapping[str, float] | None = None  # sizes that engine.extra gives

    def size(self, key: str) -> float:
        """Return one of DeepSpeed's sizes, in elements."""
        return float((self.zero or {}).get(key, DEFAULTS[key]))

    @property
    def bytes(self) -> int:
        """Of a number at the precision of the run."""
        return BYTES[self.precision]

    def at(self, stage: int, offload: str = "none") -> Setup:
        """Return the same at another stage; 16 bit at stage 0 is stage 1."""
        stage = max(stage, 1) if self.precision != "fp32" else stage
        return replace(self, stage=stage, offload=offload)


@dataclass(frozen=True)
class Memory:
    """What a rank holds. ``parts`` are there at the fullest moment, on its device; on a CPU all of
    it is in its machine's memory.
    """

    setup: Setup
    parts: tuple[Figure, ...]
    moments: tuple[Figure, ...]
    host: tuple[Figure, ...]  # of a node
    saved: Figure  # a rank's share of a checkpoint

    @property
    def peak(self) -> Figure:
        """The most at any moment."""
        return total("peak a rank", self.parts)

    @property
    def on_host(self) -> Figure:
        """The most of a node's own memory."""
        return total("host memory a node", self.host)


def memory(setup: Setup, weights: Weights, step: Step) -> Memory:
    """Return what a rank holds that trains ``weights`` by steps as traced."""
    static = _static(setup, weights)
    moments = [
        _start(setup, weights),
        *_backward(setup, weights, step, static),
        _update(setup, weights, static),
    ]
    fullest = max(moments, key=lambda parts: sum(one.value for one in parts))
    saved = _saved(setup, weights)
    stays = {one.name for one in static}
    passing = sum(one.value for one in fullest if one.name not in stays)
    parts = [*fullest, *_beside(setup, fullest, saved, passing=passing)]
    by_moment = zip(MOMENTS_OF, moments, strict=True)
    return Memory(
        setup,
        _without_nothing(parts),
        tuple(total(name, one) for name, one in by_moment),
        _without_nothing(_host(setup, weights, saved)),
        saved,
    )


def _without_nothing(parts: Parts) -> tuple[Figure, ...]:
    return tuple(one for one in parts if one.value)


def _figure(name: str, value: float, how: str) -> Figure:
    return Figure(name, value, "bytes", how)


def _static(setup: Setup, weights: Weights) -> Parts:
    """Return what is there all the time."""
    b, stage, ranks = setup.bytes, setup.stage, setup.ranks
    trained, all_of_them = weights.trained, weights.trained + weights.frozen
    shared = f" / {ranks} ranks" if ranks > 1 else ""
    parts = list[Figure]()
    if stage < 3:
        how = f"{count(all_of_them)} weights x {b} bytes"
        parts.append(_figure("weights", b * all_of_them, how))
    elif setup.offload == "parameters":
        how = f"{count(weights.persistent)} in small parameters x {b} bytes; the rest is offloaded"
        parts.append(_figure("weights", b * weights.persistent, how))
    else:
        small = b * weights.persistent if ranks > 1 else 0
        how = f"{count(all_of_them)} weights x {b} bytes{shared}, and small parameters whole: "
        parts.append(_figure("weights", b * all_of_them / ranks + small, how + size(small)))
    parts.append(_figure("buffers of the model", weights.buffer_bytes, "as registered"))
    if setup.offload != "none":
        if stage < 3:
            how = f"the largest parameter, {count(weights.largest)} x {b} bytes"
            parts.append(_figure("offload buffer", b * weights.largest, how))
        return parts
    if stage:
        how = f"{count(trained)} x {FP32} bytes{shared}"
        parts.append(_figure("fp32 master", FP32 * trained / ranks, how))
    over = ranks if stage else 1
    how = f"{count(trained)} x {setup.kept:.4g} bytes" + (shared if stage else "")
    parts.append(_figure(setup.optimizer, setup.kept * trained / over, how))
    return parts


def _gradients(setup: Setup, weights: Weights) -> Parts:
    """Return the gradients once a backward pass has begun, with what it reduces them through."""
    trained, stage, ranks = weights.trained, setup.stage, setup.ranks
    b, bucket = setup.bytes, setup.size("reduce_bucket_size")
    shared = f" / {ranks} ranks" if ranks > 1 else ""
    parts = list[Figure]()
    if stage < 2:
        how = f"{count(trained)} x {FP32} bytes, whole until the update"
        parts.append(_figure("gradients", FP32 * trained, how))
    elif stage == 2 or setup.offload == "none":
        how = f"{count(trained)} x {FP32} bytes{shared}"
        parts.append(_figure("gradients", FP32 * trained / ranks, how))
    if stage == 2 and (setup.accumulation > 1 if b == FP32 else weights.largest > bucket):
        how = f"{count(trained)} x {b} bytes{shared}: this rank's own, of one micro-batch"
        parts.append(_figure("gradients of a micro-batch", b * trained / ranks, how))
    if stage:
        width = b if stage == 2 else FP32
        held = min(bucket, trained) if setup.on_cpu else bucket  # untouched pages are not resident
        how = f"reduce_bucket_size {count(bucket)} x {width} bytes"
        parts.append(_figure("ZeRO bucket", width * held, how))
    return parts


def _gathered(setup: Setup, weights: Weights) -> Parts:
    """Return what stage 3 holds whole."""
    if setup.stage < 3 or (setup.ranks == 1 and setup.offload != "parameters"):
        return []
    everything, b = weights.trained + weights.frozen - weights.persistent, setup.bytes
    live = min(everything, setup.size("stage3_max_live_parameters"))
    ahead = min(everything, setup.size("stage3_prefetch_bucket_size") + weights.largest)
    how = f"stage3_max_live_parameters, at most all: {count(live)} x {b} bytes"
    coming = f"prefetched and the largest parameter: {count(ahead)} x {b} bytes"
    return [
        _figure("gathered weights", b * live, how),
        _figure("weights under way", b * ahead, coming),
    ]


def _backward(setup: Setup, weights: Weights, step: Step, static: Parts) -> list[Parts]:
    """Return the fullest moment of forward and backward, and that of the last reduction."""
    saved, most = step.of(lambda one: one.saved), step.of(lambda one: one.peak)
    whole = [*static, *_gathered(setup, weights), *_gradients(setup, weights)]
    early = [*static, *_gathered(setup, weights)]
    if setup.accumulation > 1 or setup.stage > 1:
        early = whole
    elif setup.stage == 1:
        early = [*early, *(one for one in whole if one.name == "ZeRO bucket")]
    how = f"micro-batch of {setup.micro_batch}, {step.how}"
    kept = _figure("activations", saved, how + ": kept for the backward pass")
    passing = _figure("passing activations", most - saved, "the most beside those, " + step.how)
    full = [*early, kept, passing]
    if sum(one.value for one in whole) > sum(one.value for one in [*early, kept]):
        full = [*whole, passing]  # gradients come as activations go
    return [full, [*whole, *_reducing(setup, weights, saved)]]


def _reducing(setup: Setup, weights: Weights, saved: float) -> Parts:
    """Return what a bucket is reduced through, and the activations of layers not yet passed."""
    if setup.stage < 2:
        return []
    bucket, b = setup.size("reduce_bucket_size"), setup.bytes
    held = max(min(bucket, weights.trained), weights.largest)
    width = b + FP32 if b < FP32 else FP32
    if setup.stage == 3:
        width = 2 * FP32
    left = saved * max(0.0, 1 - bucket / max(1, weights.trained))
    how = f"copies of a bucket of {count(held)} x {width} bytes while ranks add it up"
    return [
        _figure("reduction", width * held, how),
        _figure("activations", left, "of the layers below the first bucket's"),
    ]


def _update(setup: Setup, weights: Weights, static: Parts) -> Parts:
    """Return the moment in which the optimizer works."""
    stage, trained, ranks = setup.stage, weights.trained, setup.ranks
    b = setup.bytes
    whole = [
        one
        for one in (*static, *_gradients(setup, weights))
        if one.name != "gradients of a micro-batch" and not (stage == 2 and "bucket" in one.name)
    ]
    if setup.offload != "none":
        return whole
    if stage == 0:
        flat = min(trained, FLATTENED)
        how = f"{count(flat)} gradients x 4 bytes, laid end to end to be added up"
        return [*whole, _figure("reduction", FP32 * flat, how)]
    share = trained / ranks
    if stage == 3:
        share = min(share, setup.size("sub_group_size"))
    elif stage == 2 and b < FP32:
        share = 0.0  # they lie as the optimizer wants them
    how = f"{count(share)} gradients x 4 bytes, laid end to end for {setup.optimizer}"
    return [*whole, _figure("flat gradients", FP32 * share, how)]


def _start(setup: Setup, weights: Weights) -> Parts:
    """Return the moment in which DeepSpeed lays the weights out."""
    parts = _static(setup, weights)
    if setup.stage in (0, 3):
        return [one for one in parts if one.name != setup.optimizer]
    flat = setup.bytes * weights.trained
    how = f"{count(weights.trained)} weights x {setup.bytes} bytes, laid end to end beside"
    kept = [one for one in parts if one.name not in (setup.optimizer, "fp32 master")]
    return [*kept, _figure("flat weights", flat, how)]


def _saved(setup: Setup, weights: Weights) -> Figure:
    """Return a rank's share of a checkpoint: fp32 weights and what the optimizer keeps, frozen
    weights once.
    """
    trained = (FP32 + setup.kept) * weights.trained
    frozen = 0.0 if weights.adapted else setup.bytes * weights.frozen
    each = f"{count(weights.trained)} x {FP32 + setup.kept:.4g} bytes"
    how = f"({each} + {size(frozen)} frozen) / {setup.ranks} ranks"
    return _figure("save buffers", (trained + frozen) / setup.ranks, how)


def _beside(setup: Setup, parts: Parts, saved: Figure, *, passing: float) -> Parts:
    """Return what no tensor of the step holds; ``passing`` are the bytes of ``parts`` that come and
    go.
    """
    held = sum(one.value for one in parts)
    if setup.on_cpu:
        process = PROCESS_BYTES
        how = "resident once torch, DeepSpeed and transformers are loaded"
        if setup.bytes < FP32:
            process += PRODUCTS_16_BYTES
            how += f", {size(PRODUCTS_16_BYTES)} for products in 16 bit"
        if setup.stage == 3:
            process += STAGE_3_BYTES
            how += f", {size(STAGE_3_BYTES)} for stage 3's own records"
        how += " (seen on CPU ranks)"
        kept = (
            f"{RETAINED:.0%} of {size(passing)} that come and go: malloc keeps some of what was "
            "freed (seen on CPU ranks)"
        )
        return [
            _figure("process", process, how),
            saved,
            _figure("malloc", RETAINED * passing, kept),
        ]
    nccl = NCCL_BYTES if setup.ranks > 1 else 0.0
    how = f"{FRAGMENTED:.0%} of what torch allocates lies in pieces (assumed; --check learns it)"
    return [
        _figure("fragmentation", FRAGMENTED * held, how),
        _figure("CUDA and NCCL", CONTEXT_BYTES + nccl, "context, libraries, buffers (assumed)"),
    ]


def _host(setup: Setup, weights: Weights, saved: Figure) -> Parts:
    """Return what a node holds in its own memory, beside its devices."""
    ranks, here = setup.ranks, setup.a_node
    each = f" x {here} ranks"
    whole = weights.trained + weights.frozen
    parts = [
        _figure(
            "processes",
            here * (PROCESS_BYTES + (0 if setup.on_cpu else CONTEXT_BYTES * 3)),
            f"resident once libraries are loaded (assumed){each}",
        ),
        _figure("save buffers", here * saved.value, f"{saved.how}{each}; kept from save to save"),
        _figure(
            "tokenizing",
            here * setup.tokenizing * TOKENIZING_BYTES,
            f"{setup.tokenizing} processes x {size(TOKENIZING_BYTES)} (assumed){each}",
        ),
    ]
    if setup.stage < 3 and not setup.on_cpu:
        how = f"{count(whole)} x 4 bytes{each}: each rank builds the model before it is moved"
        parts.append(_figure("model as it is built", here * FP32 * whole, how))
    if setup.offload != "none":
        width = FP32 + setup.kept + FP32 + (setup.bytes if setup.stage < 3 else 0)
        how = f"{count(weights.trained)} x {width:.4g} bytes / {ranks} ranks{each}, pinned"
        parts.append(_figure("offloaded optimizer", here * width * weights.trained / ranks, how))
    if setup.offload == "parameters":
        how = f"{count(whole)} x {setup.bytes} bytes / {ranks} ranks{each}, pinned"
        parts.append(_figure("offloaded weights", here * setup.bytes * whole / ranks, how))
    return parts


def shared_memory(setup: Setup) -> Figure:
    """Return what a node needs in /dev/shm: NCCL's, nothing of hfscale's own."""
    ranks = setup.a_node if setup.ranks > 1 and not setup.on_cpu else 0
    how = f"{ranks} ranks x {size(NCCL_SHM_BYTES)} of NCCL (assumed); data is read by threads"
    return _figure("/dev/shm a node", ranks * NCCL_SHM_BYTES, how)
