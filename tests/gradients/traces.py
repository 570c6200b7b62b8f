"""What the tests compare to prove that a call left no trace: everything, bit for bit."""

from __future__ import annotations

import random

import numpy
import torch


def bits(tensor):
    """Type, shape and bytes of a tensor: NaN payloads and −0.0 count."""
    if tensor.is_meta:
        return str(tensor.dtype), tuple(tensor.shape), None
    if tensor.layout is torch.sparse_coo:
        return bits(tensor._indices()), bits(tensor._values())
    plain = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), plain.view(torch.uint8).numpy().tobytes()


def hooks_of(module):
    """How many hooks of each kind a module and all inside it have."""
    return {
        (path, kind): len(value)
        for path, part in module.named_modules()
        for kind, value in vars(part).items()
        if "hook" in kind and hasattr(value, "__len__") and len(value)
    }


def trace_of(module, optimizer=None):
    """Everything `untouched` promises to put back, as plain comparable values."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    state = {}
    if optimizer is not None:
        state["groups"] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        state["held"] = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
        state["state"] = [
            (id(p), [(k, bits(v) if isinstance(v, torch.Tensor) else v) for k, v in entry.items()])
            for p, entry in optimizer.state.items()
        ]
    return {
        "tensors": [(n, id(t), t.data_ptr(), bits(t), t.requires_grad, t.is_leaf) for n, t in tensors],
        "versions": [(n, t._version) for n, t in tensors],
        "grads": [
            (n, None if t.grad is None else (id(t.grad), bits(t.grad), t.grad._version))
            for n, t in tensors
            if t.is_leaf
        ],
        "modes": [(path, part.training) for path, part in module.named_modules()],
        "attributes": [
            (path, [(k, id(v)) for k, v in vars(part).items()]) for path, part in module.named_modules()
        ],
        "hooks": hooks_of(module),
        "random": (
            bits(torch.get_rng_state()),
            random.getstate(),
            repr(numpy.random.get_state(legacy=False)),
        ),
        "switches": (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_anomaly_enabled(),
        ),
        "optimizer": state,
    }
