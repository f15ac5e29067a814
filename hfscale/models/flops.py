"""How many floating-point operations a token costs, and how many a device can do: their ratio is the MFU.

    flops a token = 6 N + 12 L H T        (forward 2, backward 4 for each of N weights; attention's two products)

N weights in matrix products, L layers, H hidden size, T = ``seq_len``. Recomputation is not counted, nor is the half that a causal
mask saves. Source: Chowdhery et al. 2022, PaLM, appendix B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

# dense 16-bit tensor-core flop/s by a part of the device's name, first match wins; vendors' data sheets
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250": 362e12,
}


def flops_per_token(config: PretrainedConfig, *, seq_len: int, parameters: int) -> float:
    """Return the flops of training on one token, forward and backward, of a model with ``parameters`` weights in all.

    An input embedding that is not also the output matrix is looked up, not multiplied, and so left out. All experts of a mixture count.
    """
    looked_up = (
        0
        if getattr(config, "tie_word_embeddings", True)
        else config.vocab_size * config.hidden_size
    )
    decoder_layers = getattr(config, "num_decoder_layers", None) or getattr(
        config, "decoder_layers", 0
    )
    layers = config.num_hidden_layers + (decoder_layers if config.is_encoder_decoder else 0)
    return 6.0 * (parameters - looked_up) + 12.0 * layers * config.hidden_size * seq_len


def peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Return the flop/s of ``device`` in 16-bit tensor cores, whatever ``precision`` runs there; None on a CPU or unknown GPU.

    fp32 is measured against the same peak: it shows what 16 bits would gain.
    """
    if device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
