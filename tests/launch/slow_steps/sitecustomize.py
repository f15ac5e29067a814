"""On a PYTHONPATH, this makes the steps of a job's first attempt take STEP_S seconds: time to interrupt it, without work for the CPU."""
import os
import sys
import time

if {"hfscale.worker", "submitit.core._submit"} & {*sys.orig_argv} and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    import hfscale.dist.agree

    agree = hfscale.dist.agree.agree

    def agree_slowly(**facts):
        time.sleep(float(os.environ["STEP_S"]))
        return agree(**facts)

    hfscale.dist.agree.agree = agree_slowly
