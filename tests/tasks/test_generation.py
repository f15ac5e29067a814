"""Generation: the answers of transformers, whatever stands beside a prompt; draws of each prompt's
own; no hang at ZeRO 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config

from hfscale.config.schema import Model
from hfscale.errors import ConfigError
from hfscale.models.build import build_model
from hfscale.tasks.generation import Generation, generate, resolve
from hfscale.tasks.prompts import prompt_ids
from hfscale.tokenizer import framed
from tests.helpers.ranks import run_ranks
from tests.models.families import FAMILIES, SPECIAL_IDS, VOCAB
from tests.tasks.toys import load, words_tokenizer

PROMPTS = [[5, 6, 7], [9], [30, 31, 32, 33, 34, 35, 36, 37], [5, 6, 8], [200, 201]]
KEYS = [f"p{number}" for number in range(len(PROMPTS))]


@cache
def model_of(family: str) -> Any:
    auto_model, model = FAMILIES[family]
    sharp = (
        {"initializer_factor": 3.0}
        if family == "t5"
        else {"initializer_range": 0.3}
        if family == "gpt2"
        else {"init_std": 0.3}
    )
    # answers that differ from prompt to prompt
    made = build_model(
        Model(architecture=model.architecture, config={**model.config, **sharp}),
        auto_model=auto_model,
        vocab_size=VOCAB,
        seq_len=32,
        seed=5,
        overrides=SPECIAL_IDS,
    )
    return made.eval()


def answers(
    model: Any, prompts: list[list[int]] = PROMPTS, keys: list[str] = KEYS, **options: Any
) -> list[list[int]]:
    return [
        trimmed(row) for row in generate(model, prompts, Generation(**options), keys=keys, pad_id=2)
    ]


def trimmed(row: list[int]) -> list[int]:
    """Return the ids up to the end of the answer."""
    return row[: row.index(1)] if 1 in row else row


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 2}, {"min_new_tokens": 9}],
)
def test_answers_are_those_of_transformers_for_each_prompt_alone(
    family: str, options: dict[str, Any]
) -> None:
    model = model_of(family)
    # a T5Config has none, T5 begins with padding
    start = {"decoder_start_token_id": 2} if family == "t5" else {}
    got = answers(model, max_new_tokens=12, **options)
    assert len({*map(tuple, got)}) >= 4, "the answers should differ"
    for prompt, answer in zip(PROMPTS, got, strict=True):
        with torch.no_grad():
            alone = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=2,
                **start,
                **options,
            )
        assert answer == trimmed(alone[0, 1 if family != "gpt2" else len(prompt) :].tolist())


def test_drawn_answers_depend_on_the_prompt_and_the_seed_alone() -> None:
    model, drawn = model_of("gpt2"), {"do_sample": True, "temperature": 1.5, "max_new_tokens": 8}
    together = answers(model, **drawn)
    alone = [
        answers(model, [prompt], [key], **drawn)[0]
        for prompt, key in zip(PROMPTS, KEYS, strict=True)
    ]
    assert together == alone == answers(model, PROMPTS[::-1], KEYS[::-1], **drawn)[::-1]
    assert together != answers(model, **drawn, seed=18) and together != answers(
        model, max_new_tokens=8
    )


def test_draws_have_the_distribution_of_the_model() -> None:
    model, times = model_of("gpt2"), 3000
    got = answers(
        model,
        [[5, 6, 7]] * times,
        [str(k) for k in range(times)],
        do_sample=True,
        temperature=2.0,
        top_k=12,
        top_p=0.95,
        max_new_tokens=1,
    )
    with torch.no_grad():
        likeliest = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 2.0).topk(12)
    kept = likeliest.values.softmax(0)
    kept = kept.where(kept.cumsum(0) - kept < 0.95, 0.0)
    wanted = torch.zeros(VOCAB).index_put((likeliest.indices,), kept / kept.sum())
    assert (kept > 0).sum() >= 4
    counts = torch.bincount(torch.tensor([row[0] if row else 1 for row in got]), minlength=VOCAB)
    assert not counts[wanted == 0].any()
    assert ((counts - times * wanted).square() / (times * wanted))[
        wanted > 0
    ].sum() < 32  # chi^2, 11 degrees of freedom: p > 0.001


def test_settings_of_the_model_hold_unless_the_options_say_otherwise() -> None:
    model = model_of("gpt2")
    try:
        model.generation_config.update(max_new_tokens=3, do_sample=True, temperature=1.5)
        own = answers(model)
        assert (
            own
            == answers(model, do_sample=True, temperature=1.5, max_new_tokens=3)
            != answers(model, do_sample=False)
        )
        assert (
            max(map(len, own))
            <= 3
            < max(map(len, answers(model, max_new_tokens=6, do_sample=False)))
        )
    finally:
        model.generation_config.update(max_new_tokens=None, do_sample=None, temperature=None)


@contextmanager
def own(model: Any, **settings: Any) -> Iterator[None]:
    """Let the model's own generation_config.json say this."""
    before, model.generation_config = model.generation_config, deepcopy(model.generation_config)
    model.generation_config.update(**settings)
    try:
        yield
    finally:
        model.generation_config = before


def alone(model: Any, prompt: list[int]) -> list[int]:
    """Return what transformers answers to one prompt, by the model's own settings, end token and
    all.
    """
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)))
    return out[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 20, "min_length": 15},
        {"max_new_tokens": 9, "min_length": 6, "num_beams": 2, "num_return_sequences": 2},
        {"max_new_tokens": 9, "forced_bos_token_id": 7, "repetition_penalty": 1.7},
    ],
)
def test_lengths_and_what_else_the_model_says_are_followed(
    family: str, settings: dict[str, Any]
) -> None:
    """With an end token that comes at once: the likeliest of each first answer."""
    model = model_of(family)
    ends = [answers(model, max_new_tokens=3)[row][0] for row in (0, 2)]
    with own(model, **settings, eos_token_id=[1, *ends], pad_token_id=2, do_sample=False):
        got = generate(model, PROMPTS, Generation(), keys=KEYS, pad_id=2)
        for prompt, answer in zip(PROMPTS, got, strict=True):
            wanted = alone(model, prompt)
            stop = next((n for n, i in enumerate(wanted) if i in (1, *ends)), len(wanted))
            assert answer == wanted[:stop]
        if "min_length" in settings:
            short = answers(model, max_new_tokens=9, min_new_tokens=0)
            assert [] in short, "what the user says goes over it"


@pytest.mark.parametrize("ngram", [1, 2])
def test_no_setting_reads_the_padding_of_a_batch(ngram: int) -> None:
    """Padded with the end token, which then must not be taken for one that was written already."""
    model = model_of("gpt2")
    with own(model, no_repeat_ngram_size=ngram, max_new_tokens=12, eos_token_id=None):
        likely = [answers(model)[row][2] for row in range(len(PROMPTS))]
        for end in likely:
            with own(model, eos_token_id=end):
                got = generate(model, PROMPTS, Generation(), keys=KEYS, pad_id=end)
                each = [
                    generate(model, [p], Generation(), keys=[k], pad_id=end)[0]
                    for p, k in zip(PROMPTS, KEYS, strict=True)
                ]
                assert got == each


def test_an_answer_ends_with_the_tokens_of_the_model_and_of_the_task() -> None:
    model = model_of("gpt2")
    how = Generation(max_new_tokens=8, no_repeat_ngram_size=1)  # so that each token comes once
    [first] = generate(model, [[9]], how, keys=["p"], pad_id=2)
    with own(model, eos_token_id=[first[5], 1, 10**6]):
        config = resolve(model, Generation(), ends=[first[3]])
        assert config.eos_token_id == [first[3], first[5], 1], "an id of another model is none here"
        assert config.max_new_tokens == 64
        for ends, wanted in (([], first[:5]), ([first[3]], first[:3])):
            assert generate(model, [[9]], how, keys=["p"], pad_id=2, ends=ends) == [wanted]


def test_a_prompt_goes_on_where_a_tokenizer_would_end_it() -> None:
    """[CLS] text [SEP], text </s>, <s> text </s>: between a prompt and its answer stands no end."""
    words = words_tokenizer("a b", bos_token="<s>", cls_token="[CLS]", sep_token="[SEP]")
    ids = {t: words.convert_tokens_to_ids(t) for t in ("<s>", "</s>", "[CLS]", "[SEP]")}
    bare = words("a b")["input_ids"]
    for frame, wanted in {
        "[CLS] $A [SEP]": bare,
        "$A </s>": bare,
        "<s> $A </s>": [ids["<s>"], *bare],
        "$A": bare,
    }.items():
        words.backend_tokenizer.post_processor = TemplateProcessing(
            single=frame, special_tokens=list(ids.items())
        )
        assert prompt_ids(words, "a b") == wanted
        task, _ = load("translation", words, family="gpt2", prompt="{source} a", seq_len=12)
        (feature,) = task.features({"id": "0", "source": "b", "target": "a"})
        assert feature["input_ids"][-2:] == bare[::-1] and feature["labels"] == [bare[0], 1]
        exported = framed(deepcopy(words), task.frame, GPT2Config())
        assert exported("a b")["input_ids"] == wanted


def test_a_prompt_without_room_is_an_error_or_cut() -> None:
    gpt2, bart = model_of("gpt2"), model_of("bart")  # of 64 positions
    full = [k % 50 + 10 for k in range(64)]
    with pytest.raises(
        ConfigError, match=r"'p0' leaves no room in the model's 64 positions[\s\S]*shorten it to 63"
    ):
        answers(gpt2, [full], ["p0"])
    with pytest.raises(ConfigError, match="shorten it to 64"):
        answers(bart, [[*full, 5]], ["p0"])
    kept = {"max_new_tokens": 8, "truncate": True}
    assert answers(gpt2, [full], ["p0"], **kept) == answers(gpt2, [full[8:]], ["p0"], **kept)
    assert answers(bart, [[*full, 5]], ["p0"], **kept) == answers(bart, [full], ["p0"], **kept)
    tight, roomy = answers(
        gpt2, [full[:62], full[:4]], KEYS[:2], max_new_tokens=8, min_new_tokens=8
    )
    assert (len(tight), len(roomy)) == (2, 8), "what is beside a long prompt is not cut short"


def test_drawing_and_beam_search_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="num_beams=1"):
        answers(model_of("gpt2"), do_sample=True, num_beams=2)


def on_ranks(stage: int, family: str) -> list[list[list[int]]]:
    """Return what each way of generating gave on this rank, with unequal numbers of prompts and of
    new tokens.
    """
    import torch.distributed as torch_dist

    from hfscale.engine.engine import Engine
    from hfscale.engine.start import construction
    from tests.engine.tiny import tiny_config

    # else DeepSpeed keeps what is as small as this model whole on every rank
    split_all = {"stage3_param_persistence_threshold": 0}
    config, rank = (
        tiny_config(stage, world_size=2, extra={"zero_optimization": split_all}),
        torch_dist.get_rank(),
    )
    model = model_of.__wrapped__(family)
    state = model.state_dict()
    if stage == 3:
        with construction(config, device_type="cpu"):
            split = type(model)(model.config)
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(split.parameters()), modifier_rank=0):
            if rank == 0:
                split.load_state_dict(state)
        model = split
    engine = Engine.create(model, config=config, device=torch.device("cpu"))
    prompts, keys = (PROMPTS[:4], KEYS[:4]) if rank == 0 else (PROMPTS[4:], KEYS[4:])
    with engine.eval_mode():
        got = [
            answers(engine, prompts, keys, max_new_tokens=3 + 9 * rank, **options)
            for options in ({}, {"num_beams": 2}, {"do_sample": True, "temperature": 1.5})
        ]
        got.append(answers(engine, prompts if rank else [], keys if rank else [], max_new_tokens=5))
        # three rooms on one rank, one on the other
        tight = [[*range(10, 70 - k)] for k in range(3)] if rank == 0 else [[7]]
        got.append(answers(engine, tight, KEYS[: len(tight)], max_new_tokens=7))
    engine.close()
    return got


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_zero_3_gives_the_answers_of_one_process_and_never_hangs(family: str) -> None:
    first, second = run_ranks(on_ranks, 2, 3, family)
    model = model_of(family)
    for number, options in enumerate(
        ({}, {"num_beams": 2}, {"do_sample": True, "temperature": 1.5})
    ):
        assert first[number] == answers(model, PROMPTS[:4], KEYS[:4], max_new_tokens=3, **options)
        assert second[number] == answers(model, PROMPTS[4:], KEYS[4:], max_new_tokens=12, **options)
    assert (first[3], second[3]) == ([], answers(model, PROMPTS[4:], KEYS[4:], max_new_tokens=5))
    assert second[4] == answers(model, [[7]], KEYS[:1], max_new_tokens=7)


@pytest.mark.parametrize("how", [{"do_sample": True}, {"do_sample": False}])
def test_settings_of_drawing_do_not_make_transformers_warn(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.generation.configuration_utils import logger

    said: list[str] = []
    monkeypatch.setattr(logger, "warning_once", said.append)
    answers(model_of("gpt2"), temperature=1.5, top_k=5, top_p=0.9, max_new_tokens=2, **how)
    assert not said
