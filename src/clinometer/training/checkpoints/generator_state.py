"""The state of torch's random generators, as text for a checkpoint's state.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clinometer.distributed.sharded_tensors import is_distributed


def random_state() -> dict[str, Any]:
    """The state of torch's generators, as hexadecimal text."""
    state: dict[str, Any] = {"cpu": _hex(torch.get_rng_state())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        # A rank has a GPU of its own, and asking the others would open each of them once more.
        states = [torch.cuda.get_rng_state()] if is_distributed() else torch.cuda.get_rng_state_all()
        state["cuda"] = [_hex(s) for s in states]
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(_unhex(state["cpu"]))
    if "cuda" in state and torch.cuda.is_available():
        if is_distributed():
            torch.cuda.set_rng_state(_unhex(state["cuda"][0]))
        else:
            for device, one in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
                torch.cuda.set_rng_state(_unhex(one), device)


def _hex(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()
