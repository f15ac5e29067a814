"""The loop that a careful person writes by hand in plain torch for one GPU: fp32 weights, autocast,
fused AdamW, clipping.

Nothing of hfscale is imported here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rows import adamw_of, micro_batches, model_of, read_work


def main() -> None:
    work = read_work()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = model_of(work).to(device)
    adamw = adamw_of(model, work)
    forward = torch.compile(model) if work["compile"] else model
    data = micro_batches(work, rank=0, world_size=1, device=device)
    for step in range(1, work["steps"] + 1):
        for _ in range(work["accumulation"]):
            ids = next(data)
            with torch.autocast(device.type, torch.bfloat16, enabled=work["precision"] == "bf16"):
                logits = forward(input_ids=ids[:, :-1], use_cache=False).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            (loss / work["accumulation"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), work["clip_norm"])
        adamw.step()
        adamw.zero_grad()
        if step % work["log_every"] == 0:
            print(f"step {step}/{work['steps']}  loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
