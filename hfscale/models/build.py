"""A transformers model from its config: checked first, built anywhere, with the same first weights
everywhere.

``check_model_config`` needs no weights and runs on a login node. ``build_model`` runs on every
rank: inside ``context`` (ZeRO 3 gives each rank its part of every parameter as soon as a module is
made) nothing is drawn; ``init.py`` draws afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hfscale.config.schema import Model
from hfscale.errors import ConfigError, UserError, lost_peer, nearest
from hfscale.hub import foreign_code, local_folder
from hfscale.log import logger
from hfscale.models.config_keys import ConfigClass, checked_values, known_keys
from hfscale.models.kinds import PURPOSES

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from hfscale.models.init import Gather

# families whose first positions are taken by the padding id (fairseq's habit)
T = TypeVar("T")

OFFSET_POSITIONS = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "longformer",
    "ibert",
    "data2vec-text",
    "mpnet",
}


# whose table of positions has a row for the padding id and begins behind it; how many rows it has
# beside those of the config
PADDED_POSITIONS = {"m2m_100": 2, "nllb-moe": 2, "prophetnet": 0, "xglm": 2}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Return the config values of a tokenizer's special ids, for ``overrides``. A decoder starts
    with the padding token, as T5's does.

    Padding is None unless it is a token of its own: embeddings never train their padding row, and a
    config's default (OPT: 1) may be an ordinary token of this tokenizer.
    """
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    own = pad if pad not in (bos, eos) else None
    return {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": own,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "forced_eos_token_id": eos,
        "decoder_start_token_id": eos if own is None else own,
    }


def first_position(config: PretrainedConfig) -> int:
    """Return the position id of a row's first token."""
    if config.model_type not in OFFSET_POSITIONS:
        return 0
    # MPNet's is written into its code
    return 2 if config.model_type == "mpnet" else (config.pad_token_id or 0) + 1


def _reserved(config: PretrainedConfig) -> int:
    """Return how many of the model's positions no token of a row can have."""
    if config.model_type in PADDED_POSITIONS:
        return max(0, (config.pad_token_id or 0) + 1 - PADDED_POSITIONS[config.model_type])
    return first_position(config)


def longest_row(config: PretrainedConfig) -> int | None:
    """Return how many tokens a row may have; None: positions are relative (T5, XLNet), and there is
    no limit.
    """
    positions = getattr(
        config, config.attribute_map.get("max_position_embeddings", "max_position_embeddings"), None
    )
    return positions - _reserved(config) if isinstance(positions, int) and positions > 0 else None


def check_model_config(
    model: Model, *, vocab_size: int, seq_len: int, overrides: Mapping[str, object] | None = None
) -> PretrainedConfig:
    """Return the transformers config of ``model``, with room for ``vocab_size`` ids and ``seq_len``
    positions.

    ``overrides`` replace an architecture's defaults; ``model.config`` replaces both. A pretrained
    config keeps its own values but for ``model.config``, and grows to ``vocab_size`` ids.

    Raises:
        ConfigError: for an unknown architecture or key, a value the architecture refuses, too few
            positions or ids.
    """
    from transformers import CONFIG_MAPPING

    if model.pretrained is not None:
        config = _pretrained_config(model)
        if "vocab_size" not in model.config:
            config.vocab_size = max(config.vocab_size, vocab_size)
    elif model.architecture is None or model.architecture not in CONFIG_MAPPING:
        near = nearest(str(model.architecture), CONFIG_MAPPING)
        # of hundreds
        usual = (
            "use transformers' model_type: gpt2, llama, qwen2, mistral, gpt_neox, opt, "
            "bert, t5, ..."
        )
        raise ConfigError(
            "unknown architecture",
            where="model.architecture",
            value=model.architecture,
            remedy=near if near.startswith("did") else usual,
        )
    else:
        config_class: ConfigClass = CONFIG_MAPPING[model.architecture]
        known = accepted(lambda: known_keys(config_class), model)
        values = checked_values(
            model.config, known, architecture=model.architecture, like=config_class()
        )
        defaults: dict[str, object] = {"vocab_size": vocab_size} | {
            key: value for key, value in (overrides or {}).items() if key in known
        }
        config = accepted(lambda: config_class(**(defaults | values)), model)
    # T5's config has no such key
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = (overrides or {}).get("decoder_start_token_id")
    _check_room(config, vocab_size=vocab_size, seq_len=seq_len)
    return config


def check_head(config: PretrainedConfig, auto_model: str) -> None:
    """Refuse (ConfigError) an architecture that ``auto_model``, a class of transformers, does not
    know.
    """
    import transformers

    if type(config) in getattr(transformers, auto_model)._model_mapping or type(
        config
    ).__module__.startswith("transformers_modules"):
        return
    fit = [
        one.objective
        for one in PURPOSES
        if one.objective and type(config) in getattr(transformers, one.auto_model)._model_mapping
    ]
    raise ConfigError(
        f"{config.model_type} has no {auto_model}",
        where="model",
        value=config.model_type,
        remedy="choose an architecture that has it"
        + (f" (of pretraining: or objective {' or '.join(fit)})" if fit else ""),
    )


def build_model(
    model: Model,
    *,
    auto_model: str,
    vocab_size: int,
    seq_len: int,
    seed: int,
    dtype: torch.dtype | None = None,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    gather: Gather | None = None,
    overrides: Mapping[str, object] | None = None,
) -> PreTrainedModel:
    """Return the model in training mode, its weights drawn from ``seed`` alone: equal at every ZeRO
    stage and world size.

    ``context`` is entered around the construction and ``gather`` around each draw
    (``init.initialize``); both do nothing below ZeRO 3. Pretrained weights are loaded into the
    engine (``checkpoint/pretrained.py``).

    Raises:
        ConfigError: as ``check_model_config``, and where the architecture has no such
            ``auto_model`` or refuses its config.
    """
    import torch
    from transformers.initialization import no_init_weights

    from hfscale.models.init import initialize, initialize_adapters
    from hfscale.models.trained import choose_trained

    config = check_model_config(model, vocab_size=vocab_size, seq_len=seq_len, overrides=overrides)
    check_head(config, auto_model)
    built = accepted(
        lambda: construct(
            config,
            auto_model,
            dtype=dtype or torch.float32,
            attention=model.attention,
            trust_remote_code=model.trust_remote_code,
            context=context,
        ),
        model,
    )
    chosen = built.config._attn_implementation
    if model.attention == "auto" and chosen != "sdpa":
        logger.info(f"attention: {chosen}, since {config.model_type} has no sdpa")
    _train_every_token(built, overrides or {})
    untouched = initialize(built, seed=seed, gather=gather)
    with no_init_weights(), context():
        choose_trained(built, model)
    initialize_adapters(built, seed=seed, gather=gather)
    if untouched and model.pretrained is None:
        raise ConfigError(
            f"the architecture does not say how {len(untouched)} of its parameters start",
            where="model.architecture",
            value=untouched[:4],
            remedy="start from pretrained weights (model.pretrained), or choose another "
            "architecture",
        )
    built.train()
    return built


def _train_every_token(model: PreTrainedModel, special: Mapping[str, object]) -> None:
    """Let embeddings train the row of padding where the padding token stands in texts, too: as
    their end, say.

    An embedding gives its ``padding_idx`` no gradient. The config keeps its value, by which padding
    is found.
    """
    import torch

    used: set[object] = set()
    for role in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        for value in (special.get(role), getattr(model.config, role, None)):
            used.update(value if isinstance(value, list) else [value])
    used.discard(None)
    for module in model.modules():
        if not isinstance(module, torch.nn.Embedding) or module.padding_idx not in used:
            continue
        if module.num_embeddings >= model.config.vocab_size:  # of words, not positions
            module.padding_idx = None


def construct(
    config: PretrainedConfig,
    auto_model: str,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    trust_remote_code: bool = False,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> PreTrainedModel:
    """Return the model of ``config`` with nothing in its weights yet; ``context`` as in
    ``build_model``.

    ``attention`` auto, or None: sdpa where the architecture has it, else eager, as transformers
    chooses.
    """
    import transformers
    from transformers.initialization import no_init_weights

    kind = getattr(transformers, auto_model)
    # imported here: ZeRO 3's context takes the decorators off classes that are first imported
    # inside it
    kind._model_mapping.get(type(config), None)
    with no_init_weights(), context():
        built: PreTrainedModel = kind.from_config(
            config,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=trust_remote_code,
        )
    return built


def read_config(folder: Path, *, where: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the config of transformers in ``folder``.

    Raises:
        ConfigError: if there is none, or its values are impossible; ``where`` says who named the
            folder.
    """
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # each architecture has its own
        if foreign_code(error):
            raise ConfigError(
                "this model brings code of its own, which needs permission",
                where=where,
                value=str(folder),
                remedy="name a model that transformers knows itself; or, to train from it: if "
                "you trust it, say "
                "model.trust_remote_code=true on the command line: no file can permit what it "
                "brings",
            ) from error
        raise ConfigError(
            "no model here",
            where=where,
            value=str(folder),
            remedy="give a folder that transformers loads, with its config.json "
            f"({first_line(error)})",
        ) from error
    return config


def first_line(error: BaseException) -> str:
    """Return what another library's error says, in a line; its kind, where that is nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    return f"{kind}: {lines[0][:300]}" if lines else kind


def _pretrained_config(model: Model) -> PretrainedConfig:
    assert model.pretrained is not None
    folder = local_folder(str(model.pretrained), where="model.pretrained")
    config = read_config(
        folder, where="model.pretrained", trust_remote_code=model.trust_remote_code
    )
    known = known_keys(type(config)) | set(vars(config))
    values = checked_values(model.config, known, architecture=config.model_type, like=config)
    for key, value in values.items():
        setattr(config, key, value)
    return config


def accepted(make: Callable[[], T], model: Model) -> T:
    """Return ``make()``; what transformers says against the user's values becomes a ConfigError.

    The end of another rank is no fault of the config, and passes.
    """
    try:
        return make()
    except UserError:
        raise
    # whatever an architecture does with impossible sizes: divide by zero, run out of memory, ...
    except Exception as error:
        if lost_peer(error):
            raise
        text = " ".join(str(error).split())
        name = model.architecture or model.pretrained
        if "attn_implementation" in text or "scaled_dot_product_attention" in text:
            raise ConfigError(
                f"{name} has no such attention",
                where="model.attention",
                value=model.attention,
                remedy="set model.attention=auto: sdpa where there is one, else eager",
            ) from error
        raise ConfigError(
            f"{name}: {type(error).__name__}: {text[:300]}",
            where="model",
            value=model.config,
            remedy="see the architecture's page in the transformers documentation: "
            "which sizes must divide which, and which keys go together",
        ) from error


def _check_room(config: PretrainedConfig, *, vocab_size: int, seq_len: int) -> None:
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"the model has {config.vocab_size} ids for a tokenizer of {vocab_size}",
            where="model.config.vocab_size",
            value=config.vocab_size,
            remedy=f"omit it, or set at least {vocab_size} (a multiple of 64 is faster on GPUs)",
        )
    longest, taken = longest_row(config), _reserved(config)
    if longest is not None and seq_len > longest:
        key = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        smaller = (
            f", or data.seq_len={longest} (of labelled examples data.max_length={longest}) or less"
            if longest > 1
            else ""
        )
        padding = taken - 1 if config.model_type == "mpnet" else config.pad_token_id
        why = f" ({config.model_type} counts them from its padding id, {padding})" if taken else ""
        raise ConfigError(
            f"rows of {seq_len} tokens need more than the model's {longest + taken} positions{why}",
            value=seq_len,
            where=f"data.seq_len or data.max_length, model.config.{key}",
            remedy=f"set model.config.{key}={seq_len + taken}{smaller}",
        )
