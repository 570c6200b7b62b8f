"""The order of rows everywhere: as data flows, by layer, and inside each layer the kinds alike."""

from __future__ import annotations

from typing import Any

# What comes where in a Transformer layer; other kinds keep the order of their first use.
_KINDS = (
    "ln1",
    "input_layernorm",
    "ln_1",
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.output_proj",
    "ln2",
    "post_attention_layernorm",
    "ln_2",
    "ffn.w1",
    "ffn.w2",
    "ffn.w3",
)


def in_order(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tensors for display: layers by their first use, kinds in the same order in every layer."""
    first_use: dict[int, int] = {}
    usual: dict[str, float] = {}
    for tensor in sorted(tensors, key=lambda t: t["position"]):
        layer = tensor["layer"]
        if layer is None:
            continue
        first_use.setdefault(layer, tensor["position"])
        # Seen first in whichever layer came first: that layer's order is everybody's.
        usual.setdefault(_kind(tensor), len(_KINDS) + len(usual))

    def key(tensor: dict[str, Any]) -> tuple[float, float, float, int]:
        layer = tensor["layer"]
        if layer is None:
            return (tensor["position"], 0.0, tensor["position"], tensor["id"])
        kind = _kind(tensor)
        place = next((i for i, known in enumerate(_KINDS) if _is(kind, known)), usual[kind])
        return (first_use[layer], place, tensor["position"], tensor["id"])

    return sorted(tensors, key=key)


def _kind(tensor: dict[str, Any]) -> str:
    return str(tensor.get("kind") or "")


def _is(kind: str, known: str) -> bool:
    return kind == known or kind.startswith(known + ".")


def short_name(tensor: dict[str, Any]) -> str:
    """ "3 · attn.v_proj": the layer and the kind, or the whole name."""
    if tensor["layer"] is None or not tensor.get("kind"):
        return str(tensor["name"])
    return f"{tensor['layer']} · {tensor['kind']}"
