"""Hugging Face's Llama layout: its names, its order of rows, its config.json. No file is touched here.

The two models are the same function. Llama turns the halves (i, i+K/2) of a head together where we turn the
neighbours (2i, 2i+1), so the rows of q_proj and k_proj are in another order, and nothing else differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clinometer.lm.transformer_config import RMS_NORM_EPS, TransformerConfig
from clinometer.messages import InputError

_TOP = {
    "token_embeddings.weight": "model.embed_tokens.weight",
    "ln_final.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_BLOCK = {
    "ln1": "input_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "ln2": "post_attention_layernorm",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
}


SAME_FUNCTION = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
"""Model types whose checkpoints are read, and the class each has."""

_LEFT_OUT = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
}
"""transformers' defaults for what a config.json may leave out."""


def llama_name(name: str) -> str:
    """`layers.3.attn.output_proj.weight` → `model.layers.3.self_attn.o_proj.weight`."""
    if name in _TOP:
        return _TOP[name]
    _, layer, part = name.removesuffix(".weight").split(".", 2)
    return f"model.layers.{layer}.{_BLOCK[part]}.weight"


def is_rotated(name: str) -> bool:
    """Whether the rows of this weight are turned by RoPE: q_proj and k_proj."""
    return name.endswith(("attn.q_proj.weight", "attn.k_proj.weight"))


def halves_from_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Our rows in Llama's order: in each head, row 2i to i and row 2i+1 to i+K/2."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def pairs_from_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Llama's rows in our order: the inverse of `halves_from_pairs`."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def repeat_heads(weight: Tensor, num_kv_heads: int, num_heads: int) -> Tensor:
    """Grouped-query keys or values (H_kv·K, D) as (H·K, D): each head once for every query head it serves."""
    heads = weight.unflatten(0, (num_kv_heads, -1))
    return heads.repeat_interleave(num_heads // num_kv_heads, dim=0).flatten(0, 1)


def rescale_residual(weights: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """The same function with our ε in every norm, for weights made for another.

        w ⊙ x / √(mean(x²) + ε)  =  w ⊙ ax / √(mean((ax)²) + a²ε) ,   a = √(1e-5/ε)

    Scaled by a, the residual stream passes our norms as x passed theirs; what writes to it (embedding,
    output_proj, w2) is scaled, what reads it sees only norms. Half precision becomes float32, where the
    rounding of the products costs 6e-8 of each weight.
    """
    a = math.sqrt(RMS_NORM_EPS / eps)
    wide = {
        name: w.float() if w.dtype in (torch.bfloat16, torch.float16) else w for name, w in weights.items()
    }
    writes = ("token_embeddings.weight", "attn.output_proj.weight", "ffn.w2.weight")
    return {name: w * a if name.endswith(writes) else w for name, w in wide.items()}


def llama_config(config: TransformerConfig, dtype: torch.dtype, end_of_text_id: int | None) -> dict[str, Any]:
    """The content of config.json, in the spelling of transformers 4 and 5 both."""
    kind = str(dtype).removeprefix("torch.")
    stretched = dict(zip(_STRETCHING, config.rope_scaling, strict=True)) if config.rope_scaling else {}
    if stretched:
        stretched[_STRETCHING[3]] = round(stretched[_STRETCHING[3]])  # transformers requires whole positions
    rope = {"rope_type": "llama3" if stretched else "default", **stretched}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_theta": float(config.rope_theta),
        "rope_parameters": {**rope, "rope_theta": float(config.rope_theta)},
        "rope_scaling": rope if stretched else None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": kind,
        "torch_dtype": kind,
    }


def read_llama_config(given: Mapping[str, Any], path: object) -> tuple[TransformerConfig, int, float, bool]:
    """What config.json describes: our configuration, H_kv, the norms' ε, and whether the head is tied.

    What a config leaves out has transformers' default. A Mistral without a sliding window, or with one as
    wide as its context, is the same function. Raises `InputError` (naming `path`) for another architecture,
    and for each setting under which the model would be another function than ours.
    """
    kind = given.get("model_type")
    one = SAME_FUNCTION.get(kind) if isinstance(kind, str) else None
    architectures = given.get("architectures") or [one]
    if one is None or architectures != [one]:
        told = architectures if isinstance(architectures, list) else [architectures]
        names = ", ".join(map(str, told)) if given.get("architectures") else kind
        raise InputError("export.architecture", path=path, given=names, model_type=kind)

    given = {**_LEFT_OUT[str(kind)], **given}

    def size(field: str) -> Any:
        if given.get(field) is None:
            raise InputError("export.config_field", path=path, field=field)
        return given[field]

    def require(field: str, value: object, needed: object) -> None:
        if value != needed:
            raise InputError("export.unsupported", path=path, field=field, value=value, needed=needed)

    for field, needed in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        require(field, given.get(field, needed), needed)
    require("quantization_config", given.get("quantization_config"), None)
    theta, scaling = _rope(given, require)
    config = TransformerConfig(
        vocab_size=size("vocab_size"),
        context_length=given["max_position_embeddings"],
        d_model=size("hidden_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=size("num_attention_heads"),
        d_ff=size("intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
    )
    window = given.get("sliding_window") if kind == "mistral" else None
    if window is not None and not (isinstance(window, int) and window >= config.context_length):
        require("sliding_window", window, None)
    require("head_dim", given.get("head_dim") or config.head_dim, config.head_dim)
    num_kv_heads = given.get("num_key_value_heads")
    num_kv_heads = config.num_heads if num_kv_heads is None else num_kv_heads
    if not isinstance(num_kv_heads, int) or num_kv_heads < 1 or config.num_heads % num_kv_heads:
        needed = f"a divisor of {config.num_heads}"
        require("num_key_value_heads", num_kv_heads, needed)
    eps = given.get("rms_norm_eps", 1e-6)
    if not _is_positive(eps):
        require("rms_norm_eps", eps, "> 0")
    return config, num_kv_heads, float(eps), bool(given.get("tie_word_embeddings", False))


_STRETCHING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""What transformers calls the four numbers of our `rope_scaling`."""


def _rope(given: Mapping[str, Any], require: Any) -> tuple[float, tuple[float, float, float, float] | None]:
    """θ and its stretching, from `rope_parameters` (transformers 5) or beside `rope_scaling` (4)."""
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    require("rope_parameters", type(rope), dict)
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind == "llama3":
        told = {_STRETCHING[3]: given.get(_STRETCHING[3]), **rope}
        numbers: list[Any] = [told.get(name) for name in _STRETCHING]
        if not all(map(_is_positive, numbers)):
            raise InputError("model.scaling", value=numbers)
        factor, low, high, original = map(float, numbers)
        scaling = factor, low, high, original
    elif kind != "default":
        require("rope_type", kind, "default, llama3")
    factor = rope.get("partial_rotary_factor", given.get("partial_rotary_factor"))
    require("partial_rotary_factor", 1.0 if factor is None else factor, 1.0)
    theta = rope.get("rope_theta", given.get("rope_theta", 10_000.0))
    if not _is_positive(theta):
        raise InputError("model.theta", value=theta)
    return float(theta), scaling


def _is_positive(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < math.inf
