"""The peer that most people use: transformers' Trainer with DeepSpeed. Run by torchrun with a work
file.

Rows come from the flat memory map of the other peer, in the same order. Nothing of hfscale is
imported here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rows import build_nothing, model_of, read_work
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments


class Rows(Dataset):
    """Rows of ``seq_len`` tokens with their targets, as the Trainer wants them."""

    def __init__(self, path: str, *, seq_len: int, dtype: str) -> None:
        self._rows = np.memmap(path, dtype, "r").reshape(-1, seq_len + 1)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self._rows[index].astype(np.int64))
        return {
            "input_ids": ids[:-1],
            "labels": ids[1:],
            "shift_labels": ids[1:],
        }  # targets as they are, no shift by the model


class InOrder(Trainer):
    """The Trainer, without its shuffle."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class PrintSteps(TrainerCallback):
    """Prints what it logs in the form that the benchmark reads."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            print(
                f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}",
                flush=True,
            )


def main() -> None:
    work = read_work()
    build_nothing()
    on_cpu = not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=work["scratch"],
        max_steps=work["steps"],
        per_device_train_batch_size=work["micro_batch"],
        gradient_accumulation_steps=work["accumulation"],
        learning_rate=work["lr"],
        lr_scheduler_type="constant",
        weight_decay=work["weight_decay"],
        adam_beta1=work["betas"][0],
        adam_beta2=work["betas"][1],
        adam_epsilon=work["eps"],
        max_grad_norm=work["clip_norm"],
        optim="adamw_torch_fused",
        bf16=work["precision"] == "bf16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu else None,
        logging_steps=work["log_every"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        deepspeed={
            "zero_optimization": {"stage": work["zero_stage"]},
            "bf16": {"enabled": work["precision"] == "bf16"},
            "gradient_clipping": work["clip_norm"],
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    model = model_of(work)
    model.config.use_cache = False
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=Rows(work["rows"], seq_len=work["seq_len"], dtype=work["dtype"]),
    )
    trainer.pop_callback("PrinterCallback")
    trainer.add_callback(PrintSteps())
    trainer.train()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
