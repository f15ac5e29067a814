"""What a plan says a rank holds, against every storage of DeepSpeed's live engine on real ranks."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch

from hfscale.config.schema import Model
from hfscale.planning.layers import trace_deep
from hfscale.planning.memory import Setup, memory
from hfscale.planning.parameters import weights_of
from hfscale.planning.tracing import Watch
from tests.engine.tiny import tiny_config
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow

ROWS, TOKENS = 2, 16
LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
# stage, precision, micro-batches a step, sizes of DeepSpeed in elements
SMALL_BUCKET: dict[str, Any] = {"reduce_bucket_size": 100_000}
CASES = [
    (0, "fp32", 2, {}),
    (1, "fp32", 2, SMALL_BUCKET),
    (1, "bf16", 1, {"reduce_bucket_size": 3_000_000}),
    (2, "bf16", 2, SMALL_BUCKET),
    (2, "bf16", 1, {"reduce_bucket_size": 3_000_000}),
    (3, "bf16", 2, SMALL_BUCKET | {"stage3_param_persistence_threshold": 0}),
    (3, "fp32", 1, {"reduce_bucket_size": 3_000_000}),
]


def model_of(config: Any, **context: Any) -> Any:
    from hfscale.models.build import build_model

    return build_model(
        Model.model_validate({"architecture": "llama", "config": LLAMA}),
        auto_model="AutoModelForCausalLM",
        vocab_size=512,
        seq_len=TOKENS,
        seed=1,
        **context,
    )


def loss_of(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_BT, use_cache=False).logits.float().logsumexp(-1).sum()


class RealWatch(Watch):
    """Counts what takes memory: DeepSpeed keeps shapes on the meta device."""

    def _add(self, tensor: torch.Tensor) -> bool:
        return not tensor.is_meta and super()._add(tensor)


def held(stage: int, precision: str, times: int, sizes: dict[str, Any]) -> float:
    """Return the most bytes that this rank's tensors take in the second of two steps."""
    from hfscale.engine.engine import Engine
    from hfscale.engine.start import construction, gathered

    world = torch.distributed.get_world_size()
    config = tiny_config(
        stage, precision, world_size=world, accumulation=1, extra={"zero_optimization": sizes}
    )
    gc.collect()
    before = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    watch = RealWatch([one for one in before if not one.is_meta])
    del before
    with watch:
        model = model_of(
            config,
            gather=partial(gathered, modify=True),
            context=partial(construction, config, device_type="cpu"),
        )
        engine = Engine.create(model, config=config, device=torch.device("cpu"))
        del model
        ids_BT = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
        for _ in range(2):
            gc.collect()
            watch.peak = watch.live
            for _ in range(times):
                engine.backward(loss_of(engine, ids_BT))
            engine.step(1e-4)
    engine.close()
    return float(watch.peak)


def planned(stage: int, precision: str, times: int, sizes: dict[str, Any]) -> float:
    setup = Setup(
        stage=stage,
        precision=precision,
        offload="none",
        checkpointing=False,
        micro_batch=ROWS,
        accumulation=times,
        ranks=2,
        a_node=2,
        zero=sizes,
    )
    with torch.device("meta"):
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **LLAMA))
    model.to(torch.float32 if precision == "fp32" else torch.bfloat16).train()
    ids_BT = torch.zeros(ROWS, TOKENS, dtype=torch.int64, device="meta")
    step = trace_deep(model, lambda one: loss_of(one, ids_BT), inputs=[ids_BT], on_cpu=True)
    weights = weights_of(model, whole_below=setup.size("stage3_param_persistence_threshold"))
    beside = {"fragmentation", "CUDA and NCCL"}
    parts = memory(setup, weights, step).parts
    return sum(part.value for part in parts if part.name not in beside)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_plan_is_what_the_engine_holds(case: tuple[int, str, int, dict[str, Any]]):
    seen = run_ranks(held, 2, *case)
    assert planned(*case) == pytest.approx(max(seen), rel=0.07), seen
