"""On a PYTHONPATH, this makes one rank of a job's first attempt fail as FAULT says, at the step
after the AT-th; steps take STEP_S seconds.

FAULT: "raise" in the loop, "loader exits" (its thread ends the interpreter), "loader sleeps",
"slow". FAULT_NODE: on this node in every attempt. PASS_S: so long takes a pass of a model that only
computes.
"""

import os
import sys
import threading
import time

if {"hfscale.worker", "submitit.core._submit"} & {*sys.orig_argv}:
    import hfscale.dist.agree
    from hfscale.stream.loader import Stream

    first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and not os.path.exists(
        f"{os.path.dirname(sys.orig_argv[-1])}/hangs/1"
    )
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0"))
    node = os.environ.get("FAULT_NODE")
    mine = (
        os.environ.get("SLURMD_NODENAME") == node
        if node
        else first and rank == int(os.environ.get("FAULT_RANK", "1"))
    )
    fault, left = os.environ.get("FAULT", "") if mine else "", int(os.environ.get("AT", "4"))
    agree, take, advance = hfscale.dist.agree.agree, Stream.take, Stream.advance

    def agree_slowly(**facts):
        time.sleep(float(os.environ.get("STEP_S", "0")) if first or node else 0)
        if fault == "raise" and left <= 0:
            raise RuntimeError("a defect that shows on one rank")
        return agree(**facts)

    def sleep(*_):
        threading.Event().wait()

    def count(self):
        global left
        left -= 1
        advance(self)

    def take_or_fail(self):
        if left <= 0 and fault == "loader exits":
            self._reader.submit(sys.exit, 0).result()
        if left <= 0 and fault == "loader sleeps":
            self._reader.submit(sleep).result()
        if left <= 0 and fault == "slow":
            time.sleep(0.6)
        return take(self)

    hfscale.dist.agree.agree = agree_slowly
    Stream.take, Stream.advance = take_or_fail, count

    if first and "PASS_S" in os.environ:
        from hfscale.engine.inference import InferenceEngine

        call = InferenceEngine.__call__

        def call_slowly(self, **inputs):
            time.sleep(float(os.environ["PASS_S"]))
            return call(self, **inputs)

        InferenceEngine.__call__ = call_slowly
