"""A sweep over learning rates as one Slurm array, and its best run. From the folder that holds
hfscale/:

# `local` as a second argument: on this machine
python slurm/sweep.py configs/pretrain/gpt2_small.yaml
"""

import sys

from launch.submit import submit_sweep


def main(config: str, cluster: str = "slurm") -> None:
    jobs = submit_sweep(
        config, {"optim.lr": [3e-4, 6e-4, 1.2e-3]}, ["train.steps=1000"], cluster=cluster
    )
    print("submitted:", *(job.job_id for job in jobs))
    results = [job.results()[0] for job in jobs]  # waits for each; rank 0's
    for result in sorted(results, key=lambda result: result["loss"]):
        print(f"{result['loss']:.4f}  {result['run_dir']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
