"""The peer to beat: the training loop that a careful person writes by hand on DeepSpeed. Run by
torchrun with a work file.

Nothing of hfscale is imported here.
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rows import adamw_of, build_nothing, micro_batches, model_of, read_work


def main() -> None:
    work = read_work()
    build_nothing()
    deepspeed.init_distributed(
        "nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
    )
    rank, world = dist.get_rank(), dist.get_world_size()
    model = model_of(work)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw_of(model, work),
        config={
            "train_micro_batch_size_per_gpu": work["micro_batch"],
            "gradient_accumulation_steps": work["accumulation"],
            "gradient_clipping": work["clip_norm"],
            "zero_optimization": {"stage": work["zero_stage"]},
            "bf16": {"enabled": work["precision"] == "bf16"},
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    if work["compile"]:
        engine.compile()
    data = micro_batches(work, rank=rank, world_size=world, device=engine.device)
    for step in range(1, work["steps"] + 1):
        for _ in range(work["accumulation"]):
            ids = next(data)
            logits = engine(input_ids=ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
        if step % work["log_every"] == 0:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}/{work['steps']}  loss {mean.item() / world:.4f}", flush=True)
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
