"""Export: a checkpoint becomes a transformers folder, and is published only if transformers gives the run's own logits.

Every checkpoint carries the live engine's logits on a small probe batch, so the proof needs neither the run nor its GPUs.
"""
from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent
from typing import Any

import torch
import transformers
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from hfscale.checkpoint.export import compare_logits, write_weights
from hfscale.checkpoint.probe import read_probe, respond
from hfscale.config.load import to_yaml
from hfscale.dist.group import default_device, device_name
from hfscale.errors import CheckpointError
from hfscale.jobs.opening import RunModel, open_run
from hfscale.log import logger

# relative L2 difference of logits that rounding explains: on the run's kind of device, and on another (other kernels, TF32)
SAME_DEVICE = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 5e-4}
OTHER_DEVICE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
ROOM = 2**30  # bytes of a GPU beside the weights: kernels, activations
TRAINED = ("model", "objective", "optim", "schedule", "train", "engine")  # the sections of a config that the card shows


def run(name: str, out: Path) -> str:
    """Return the Python lines that use the model now published at ``out``.

    Raises:
        CheckpointError: if ``out`` exists, ``name`` is no run or checkpoint of ours, or the logits differ; then nothing is published.
    """
    if out.exists():
        raise CheckpointError("this folder exists already; nothing was written", where=out, remedy="name another folder, or remove it")
    source = open_run(name)
    if source is None:
        raise CheckpointError("no run or checkpoint of hfscale here", where=name,
                              remedy="name a run directory, or a folder in its checkpoints/")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:  # a name of our own, removed whatever happens
        partial = Path(scratch) / "model"
        partial.mkdir()
        try:
            write_weights(source.reader, source.skeleton, partial)
        except OSError as error:
            raise CheckpointError("the weights cannot be written; nothing was published", where=out.parent, value=error.strerror,
                                  remedy="make room, or export to another disk") from error
        source.skeleton.config.architectures = [type(source.skeleton).__name__]
        source.skeleton.config.save_pretrained(partial)
        if source.skeleton.can_generate():
            source.skeleton.generation_config.save_pretrained(partial)
        (plain(source.tokenizer) if source.config.objective.name == "clm" else source.tokenizer).save_pretrained(partial)
        difference = prove(source, partial)
        (partial / "README.md").write_text(card(source, difference), "utf-8")
        partial.rename(out)
    logger.info(f"exported step {state(source)['step']} to {out}; logits equal to {difference:.1e}")
    return usage(source, out)


def plain(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the tokenizer, putting nothing around a text: as shards are made. A prompt that ends in [SEP] would be a document's end."""
    if tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    return tokenizer


def prove(source: RunModel, folder: Path) -> float:
    """Return the relative difference between the engine's logits at the save and those of ``folder`` loaded by transformers.

    Raises:
        CheckpointError: if they differ by more than rounding explains.
    """
    device, size = default_device(), sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    attention = source.skeleton.config._attn_implementation
    if device.type == "cuda" and size + ROOM > torch.cuda.mem_get_info()[0]:
        device, attention = torch.device("cpu"), "sdpa"  # where files are mapped: a model larger than the memory is slow there, but goes
    model = type(source.skeleton).from_pretrained(folder, dtype=source.skeleton.dtype, attn_implementation=attention)
    model.to(device).eval()  # type: ignore[arg-type]
    probe = read_probe(source.checkpoint)
    with torch.no_grad():
        got = probe.pick(respond(model, probe.ids_BT.to(device), encoder_decoder=model.config.is_encoder_decoder))
    same = device_name(device) == state(source)["device"] and not source.config.engine.compile
    return compare_logits(got, probe.logits, tolerance=(SAME_DEVICE if same else OTHER_DEVICE)[source.config.engine.precision])


def state(source: RunModel) -> dict[str, Any]:
    """Return what the checkpoint says of itself."""
    return json.loads((source.checkpoint / "state.json").read_text("utf-8"))


def card(source: RunModel, difference: float) -> str:
    """Return the model card: the run's facts, and how to use the model."""
    at, config = state(source), source.config
    rows = {
        "architecture": f"{source.skeleton.config.model_type}, {sum(p.numel() for p in source.skeleton.parameters()):,} parameters",
        "started from": at.get("pretrained") or "new weights",
        "trained on": f"{at['tokens_seen']:,} tokens in {at['step']:,} steps of {config.train.global_batch} x {config.data.seq_len} tokens",
        "data": f"{', '.join(f'{corpus.name} (weight {corpus.weight:g})' for corpus in config.data.sources)}; "
                f"fingerprint `{at['data_fingerprint'][:16]}`, tokenizer `{at['tokenizer_digest'][:16]}`",
        "figures": ", ".join(f"{key} {value:,.6g}" for key, value in at["metrics"].items() if isinstance(value, int | float)) or "none",
        "versions": f"{at['versions']}, exported by transformers {transformers.__version__}",
        "proof": f"logits equal to the training engine's, relative difference {difference:.1e}"}
    # not the rest of the config: a card is for everybody, and that names folders, hosts and accounts
    trained = "".join(f"{name}:\n{indent(to_yaml(getattr(config, name)), '  ')}" for name in TRAINED)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: transformers
tags: [hfscale]
---
# {config.run.name}

| | |
|---|---|
{table}

```python
{usage(source, "PATH_OF_THIS_FOLDER")}
```

How it was trained:
```yaml
{trained}```
"""


def usage(source: RunModel, path: Path | str) -> str:
    """Return the Python lines that use the model at ``path``."""
    name = type(source.skeleton).__name__
    if not source.skeleton.can_generate() or source.skeleton.config.is_encoder_decoder:
        return f'from transformers import {name}\nmodel = {name}.from_pretrained("{path}")'
    return f"""from transformers import pipeline
generate = pipeline("text-generation", model="{path}")
print(generate("Once upon a time", max_new_tokens=40)[0]["generated_text"])"""
