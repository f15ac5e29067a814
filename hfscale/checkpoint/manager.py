"""Saves and loads a run: snapshot in front, writing behind, committed by one rename, loaded only if
every digest matches.

A save, as all ranks live it:
    save()           wait for the previous one; agree that the disk has room; copy the state into
                     buffers that are kept
    writer threads   write and hash this rank's file; leave a record of it
    rank 0's thread  waits for all records, writes the manifest, renames the folder, prunes
No thread takes part in a collective: they meet through files, and the ranks' main threads agree in
``save`` and ``wait``.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as torch_dist
from torch import Tensor

from hfscale.checkpoint import layout
from hfscale.checkpoint.filling import fill
from hfscale.checkpoint.manifest import Entry, write_file, write_manifest
from hfscale.checkpoint.probe import make_probe
from hfscale.checkpoint.state import CheckpointState
from hfscale.checkpoint.store import serialize
from hfscale.checkpoint.weights import verify_together
from hfscale.config.schema import Checkpoint
from hfscale.dist.agree import from_rank_0, sum_over_ranks
from hfscale.dist.group import host_group
from hfscale.dist.world import Place
from hfscale.engine.engine import Engine
from hfscale.engine.fragments import Fragment, tied
from hfscale.errors import (
    CheckpointError,
    SupersededError,
    UnhealthyError,
)
from hfscale.log import logger
from hfscale.monitor.fence import Fence
from hfscale.monitor.throughput import peak_memory_gib
from hfscale.records import parse, read_file
from hfscale.shards.files import sync_folder

POLL_S = 0.02
HEADROOM_BYTES = 64 * 2**20  # beside the tensors: headers, state, manifest


class CheckpointManager:
    """The checkpoints of one run, seen from one rank. Every method but ``due`` and ``failed`` is
    called by all ranks together.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Checkpoint,
        place: Place,
        clock: Callable[[], float] = time.monotonic,
        quiet: bool = False,
        fence: Fence | None = None,
    ) -> None:
        self.folder, self._config, self._place, self._clock = folder, config, place, clock
        self._say = logger.debug if quiet else logger.info
        self._fence = fence
        self._saved_at = clock()
        self._buffers: list[
            Tensor
        ] = []  # kept from save to save: fresh memory would cost as much time as writing
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._gave_up = threading.Event()
        self.stall_s = 0.0  # of the last save: how long training waited
        self.write_s = 0.0  # of the last save that was written: how long its writer took

    @property
    def save_s(self) -> float:
        """How long the last save that was written took, from its begin to its commit; 0 before."""
        if not self.write_s:
            return 0.0
        return self.stall_s + (self.write_s if self._config.async_ else 0.0)

    # ----------------------------------------------------------------------------------------- when
    def due(self, step: int) -> bool:
        """Return True on rank 0 when ``step`` should be saved; the ranks agree on it by the step's
        all-reduce.
        """
        if self._place.rank:
            return False
        steps = (self._config.every_steps, self._config.keep_every_steps)
        minutes = self._config.every_minutes
        return any(every and step % every == 0 for every in steps) or (
            minutes is not None and self._clock() - self._saved_at >= minutes * 60
        )

    def failed(self) -> BaseException | None:
        """Return what stopped this rank's last background write, if anything did.

        Raises:
            SupersededError: if it was a younger attempt. This rank leaves at once, and the others
                with it.
        """
        if isinstance(self._failure, SupersededError):
            raise self._failure
        return self._failure

    # ----------------------------------------------------------------------------------------- save
    def save(
        self,
        engine: Engine,
        state: CheckpointState,
        *,
        probe_inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Save the engine as the checkpoint of ``state``'s step; with ``async`` it is committed
        behind.

        ``probe_inputs`` are what the model is asked for the checkpoint's probe, by default a row of
        text.

        Raises:
            CheckpointError: on all ranks, if the disk lacks room or the previous save failed; older
                checkpoints stay.
            UnhealthyError: on all ranks, if the model no longer computes finite numbers.
        """
        began = self._clock()
        self.wait()
        own = {"engine": engine.scalars(), "tied": tied(engine.module)}
        small = {
            layout.STATE: state.model_copy(update=own).to_json(),
            layout.CONFIG: engine.module.config.to_json_string().encode(),
        }
        if how := getattr(engine.module, "generation_config", None):
            small[layout.GENERATION] = how.to_json_string().encode()
        if probe := make_probe(engine, probe_inputs):
            if not probe.logits.isfinite().all():
                raise UnhealthyError(
                    "the model's logits are not finite; nothing was saved, older checkpoints "
                    "are untouched"
                )
            small[layout.PROBE] = probe.to_bytes()
        fragments = engine.fragments(frozen=not engine.adapted)
        self._prepare(fragments, step=state.step)
        reused = bool(self._buffers)
        snapshot = self._snapshot(fragments)
        self._saved_at = self._clock()
        self.stall_s = self._saved_at - began
        self._thread = threading.Thread(
            target=self._write,
            name=f"checkpoint-{state.step}",
            daemon=True,
            kwargs={
                "snapshot": snapshot,
                "small": small if self._place.rank == 0 else {},
                "step": state.step,
                "reused": reused,
            },
        )
        self._thread.start()
        if not self._config.async_:
            self.wait()
            self.stall_s = self._clock() - began

    def wait(self) -> None:
        """Return when the save under way is committed.

        Raises:
            CheckpointError: on all ranks, if it failed on any.
            SupersededError: on rank 0, if a younger attempt has begun.
        """
        while True:
            busy = self._thread is not None and self._thread.is_alive()
            failed = self.failed() is not None
            busy_ranks, failed_ranks = sum_over_ranks(torch.tensor([busy, failed])).tolist()
            if failed_ranks:
                self._gave_up.set()
                raise CheckpointError(
                    "a checkpoint could not be written; older ones are untouched",
                    where=self.folder,
                    value=str(self._failure or "failed on another rank"),
                    remedy="free the disk or mend the folder, then run the same command again",
                )
            if not busy_ranks:
                return
            time.sleep(POLL_S)

    def _prepare(self, fragments: Sequence[Fragment], *, step: int) -> None:
        """Agree that there is room, and clear the ground: one folder, empty, before any rank
        writes.
        """
        own = sum(tensor.nbytes for fragment in fragments for tensor in fragment.tensors.values())
        need = int(sum_over_ranks(torch.tensor(own))) + HEADROOM_BYTES
        problem: str | None = None
        self._check_fence()  # what is cleared away may be the younger one's
        if self._place.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                layout.clear_leftovers(self.folder)
                free = shutil.disk_usage(self.folder).free
                # what this save would make superfluous may as well go now; the newest good one
                # always stays
                if need > free:
                    layout.prune(self.folder, self._config)
                    free = shutil.disk_usage(self.folder).free
                if need > free:
                    problem = (
                        f"no space left for a checkpoint: {need:,} bytes needed, "
                        f"{free:,} bytes free"
                    )
                else:
                    (self._partial(step) / layout.RECORDS).mkdir(parents=True)
                    (self._partial(step) / layout.ENGINE).mkdir()
            except OSError as error:
                problem = f"the checkpoint folder cannot be written: {error}"
        if problem := from_rank_0(problem):
            raise CheckpointError(
                problem,
                where=self.folder,
                remedy="free or mend the disk, then run the same command again; "
                "checkpoint.keep_last=1 keeps fewer, and `hfscale checkpoints RUN` says why "
                "each is kept",
            )

    def _snapshot(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """Return ``fragments`` copied to this manager's buffers on the CPU."""
        live = [tensor for fragment in fragments for tensor in fragment.tensors.values()]
        if [(t.numel(), t.dtype) for t in live] != [(t.numel(), t.dtype) for t in self._buffers]:
            self._buffers = [
                torch.empty(t.numel(), dtype=t.dtype, pin_memory=t.device.type == "cuda")
                for t in live
            ]
        for buffer, tensor in zip(self._buffers, live, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        if any(tensor.device.type == "cuda" for tensor in live):
            torch.cuda.synchronize()
        copies = iter(self._buffers)
        return [
            Fragment(f.name, f.shape, f.start, {kind: next(copies) for kind in f.tensors})
            for f in fragments
        ]

    # -------------------------------------------------------------------------- the writer's thread
    def _write(
        self, *, snapshot: Sequence[Fragment], small: dict[str, bytes], step: int, reused: bool
    ) -> None:
        began = time.monotonic()
        try:
            partial = self._partial(step)
            entry = write_file(partial, layout.rank_file(self._place.rank), serialize(snapshot))
            sync_folder(partial / layout.ENGINE)
            record = partial / layout.RECORDS / f"{self._place.rank}.json"
            record.with_suffix(".new").write_text(json.dumps(asdict(entry)))
            record.with_suffix(".new").rename(record)
            if self._place.rank == 0:
                self._commit(
                    [write_file(partial, path, [content]) for path, content in small.items()],
                    step=step,
                )
                self.write_s = time.monotonic() - began
                share = (
                    f" ({self.stall_s / (self.stall_s + self.write_s):.0%} of the save)"
                    if reused and self._config.async_
                    else ""
                )
                self._say(
                    f"checkpoint of step {step} committed: training waited {self.stall_s:.2f} "
                    f"s{share}, "
                    f"writing took {self.write_s:.2f} s"
                )
        except BaseException as error:  # whatever it is, the run must hear of it
            self._failure = error
        self.write_s = time.monotonic() - began

    def _commit(self, own: list[Entry], *, step: int) -> None:
        """Wait for every rank's record, then make the folder a checkpoint. On rank 0 only."""
        partial, target = self._partial(step), self.folder / layout.step_name(step)
        records = [partial / layout.RECORDS / f"{rank}.json" for rank in range(self._place.size)]
        while not all(record.exists() for record in records):
            if self._gave_up.wait(POLL_S):
                raise RuntimeError("another rank could not write its part")
        entries = [parse(Entry, read_file(record)) for record in records]
        shutil.rmtree(partial / layout.RECORDS)
        write_manifest(partial, own + entries, step=step)
        sync_folder(partial)
        self._check_fence()
        if target.exists():
            logger.warning(f"{target} was there already; it is kept as {layout.reject(target)}")
        partial.rename(target)
        sync_folder(self.folder)
        layout.prune(self.folder, self._config)

    def _check_fence(self) -> None:
        """Return if no younger attempt has begun, or this is not rank 0.

        Raises:
            SupersededError: without a word to the other ranks: they lose this one.
        """
        if self._fence is not None and self._place.rank == 0:
            self._fence.check()

    def _partial(self, step: int) -> Path:
        """Return where this attempt's ranks write, and no other attempt's."""
        attempt = f".{self._fence.number}" if self._fence else ""
        return self.folder / (layout.step_name(step) + attempt + layout.PARTIAL)

    # ----------------------------------------------------------------------------------------- load
    def load_latest(self, engine: Engine) -> CheckpointState | None:
        """Return the state of the newest good checkpoint, now loaded into ``engine``; None if the
        run has none yet.

        The world size and ZeRO stage may differ from those of the save. Damaged checkpoints are
        moved to ``rejected/``.

        Raises:
            CheckpointError: if there are checkpoints, but none is intact, or the newest is of
                another model or format.
        """
        names = from_rank_0([path.name for path in layout.candidates(self.folder)])
        folders = [self.folder / name for name in names]
        for checkpoint in reversed(folders):
            began = time.monotonic()
            if problems := verify_together(checkpoint):
                self._reject(checkpoint, f"is damaged and not loaded: {'; '.join(problems[:3])}")
                continue
            state = layout.state_of(checkpoint)
            fill(engine, checkpoint, state)
            self._say(
                f"loaded {checkpoint}, saved on {state.world_size} ranks at ZeRO "
                f"{state.zero_stage}: "
                f"{time.monotonic() - began:.1f} s, peak memory of this rank "
                f"{peak_memory_gib(engine.device):.2f} GiB"
            )
            return state
        if folders:
            raise CheckpointError(
                "no checkpoint of this run is intact; all were moved to rejected/",
                where=self.folder,
                value=[path.name for path in folders],
                remedy="run again to start from step 0, or copy a good checkpoint back",
            )
        return None

    def before(self, step: int) -> bool:
        """Return whether there is a checkpoint from before ``step``, once what is being written is
        committed.
        """
        self.wait()
        found = layout.candidates(self.folder)
        return bool(from_rank_0(any(layout.step_of(path) < step for path in found)))

    def rewind(self, engine: Engine, *, step: int) -> CheckpointState:
        """Return the state of the newest good checkpoint from before ``step``, now loaded into
        ``engine``. Those since then are moved to ``rejected/``: the run does not go on from them.

        Raises:
            CheckpointError: if none before is intact.
        """
        names = from_rank_0([path.name for path in layout.candidates(self.folder)])
        for checkpoint in [self.folder / name for name in names]:
            if layout.step_of(checkpoint) >= step:
                self._reject(checkpoint, f"has the update of step {step}, which is taken back")
        state = self.load_latest(engine)
        if state is None:
            raise CheckpointError(
                "there is no checkpoint to go back to", where=self.folder, value=f"step {step}"
            )
        return state

    def _reject(self, checkpoint: Path, why: str) -> None:
        torch_dist.barrier(group=host_group())  # nobody reads it any more
        if self._place.rank == 0:
            logger.warning(f"{checkpoint.name} {why}. Kept in {layout.reject(checkpoint)}")
        torch_dist.barrier(group=host_group())
