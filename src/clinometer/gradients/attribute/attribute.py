"""attribute(): one weight's gradient as a sum over the tokens that pushed it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clinometer.distributed.ranks import Ranks
from clinometer.gradients.attribute.contraction import Use, overlap
from clinometer.gradients.attribute.parameter_functions import ParameterFunction
from clinometer.gradients.attribute.result import Attribution, Attributions, Contribution, stacked
from clinometer.gradients.attribute.tokens import Text
from clinometer.gradients.attribute.use_recorder import UseRecorder
from clinometer.gradients.sandbox.closure import Closure, eagerly, evaluate
from clinometer.gradients.sandbox.interrupts import theirs, uninterrupted
from clinometer.gradients.sandbox.sandbox import modules_named_by, untouched
from clinometer.gradients.sandbox.subject import Subject
from clinometer.messages import InputError


@uninterrupted
def attribute(
    params: Any,
    closure: Closure,
    name: str | Iterable[str] | Mapping[str, Any],
    index: Any = None,
    *,
    tokens: Tensor | Sequence[Any] | None = None,
    decode: Callable[[int], str] | None = None,
    tokenizer: Any = None,
) -> Any:
    """The gradient of one weight, position by position of the batch, in one forward and backward.

        ∂L/∂W[i, j] = Σ over batch b and position s of δ[b, s, i] · x[b, s, j] + remainder

    `index` of one entry gives signed terms that add up to its gradient. A row (`index=3`), any part, or no
    index gives each position's part along the whole gradient, ⟨G, δxᵀ⟩/‖G‖, which add up to ‖G‖, and its norm
    ‖δ‖·‖x‖. Positions are those of a layer's output, of a convolution too. The remainder is what came by uses
    that were not seen (a packed sequence, a fused kernel, a custom Function).

    `name` may be a mapping of names to indices, or several names: then an Attributions, with one entry each.
    `tokens`: the ids, (B, S); without them those of the forward's first embedding. `decode` turns one id into
    text, or `tokenizer.decode([id])` does. Nothing is left behind, also after an exception.

    Under DDP each rank explains the gradient of its own part of the batch, before it is averaged.

    Raises InputError for an unknown name, an index out of range, a weight that has no gradient, and
    sharded tensors.
    """
    subject = Subject.of(params)
    wanted = _wanted(subject, name, index)
    ranks = Ranks(subject.tensors, [m for m in (subject.module, *modules_named_by(closure)) if m is not None])
    ranks.refuse_sharded("attribution.sharded")
    for key in wanted:
        if subject.tensors[key].is_complex():
            raise InputError("attribution.complex", name=key, dtype=subject.tensors[key].dtype)
    text = Text(tokens, _decoder(decode, tokenizer))
    tensors = {key: subject.tensors[key] for key in wanted}
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    entries = {
        key: entry for key, at in wanted.items() if (entry := _entry(key, at, shapes[key])) is not None
    }
    watched = UseRecorder(
        tensors,
        {key: lambda use, e=entry, s=shapes[key]: use.at_parameter(e, s) for key, entry in entries.items()},
    )
    with ranks.apart(), untouched(subject, closure=closure), eagerly():
        try:
            # The mode stays on in the backward: reentrant checkpointing runs its forwards there.
            with watched:
                loss = evaluate(closure)
                if not loss.requires_grad:
                    raise InputError("attribution.no_graph")
                watched.end_in(loss)
                watched.armed = True
                theirs(loss.backward)
        finally:
            watched.remove_hooks()
        grads = {key: _gradient(key, tensor) for key, tensor in tensors.items()}
    text.ids = watched.ids if text.ids is None else text.ids
    found: dict[str, Attribution] = {}
    with torch.no_grad():
        for key, at in wanted.items():
            uses = watched.uses_of(key)
            if key in entries:
                gradient = float(grads[key][entries[key]])
                parts, exact = [_of_entry(use) for use in uses if use.reduced is not None], True
            else:
                uses = [use for use in uses if use.delta is not None]
                gradient, parts, exact = _of_part(
                    uses, grads[key], _mask(at, grads[key]), stacked([use.lead for use in uses], text.shape)
                )
            found[key] = Attribution(
                key,
                entries.get(key, at),
                single=key in entries,
                gradient=gradient,
                parts=parts,
                text=text,
                unseen=watched.unseen[key],
                shape=tuple(shapes[key]),
                dtype=tensors[key].dtype,
                exact_norms=exact,
            )
    return found[next(iter(found))] if isinstance(name, str) else Attributions(found, subject.canonical)


def _wanted(subject: Subject, name: Any, index: Any) -> dict[str, Any]:
    if isinstance(name, str):
        return {subject.name_of(name): index}
    pairs = name.items() if isinstance(name, Mapping) else ((key, index) for key in name)
    wanted = {subject.name_of(key): at for key, at in pairs}
    if not wanted:
        raise InputError("attribution.nothing")
    return wanted


def _entry(name: str, index: Any, shape: torch.Size) -> tuple[int, ...] | None:
    """The index of one entry, counted from the front; None for a part."""
    if index is None and len(shape):
        return None
    index = () if index is None else index
    try:
        chosen = torch.empty(shape, device="meta")[index]
    except (IndexError, TypeError) as error:
        raise InputError("step.index", name=name, index=index, shape=list(shape)) from error
    if chosen.dim():
        return None
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(int(i) + (size if int(i) < 0 else 0) for i, size in zip(parts, shape, strict=True))


def _gradient(name: str, tensor: Tensor) -> Tensor:
    grad = tensor.grad if tensor.is_leaf else None
    if grad is None:
        raise InputError("attribution.no_gradient", name=name)
    grad = grad.to_dense() if grad.layout is not torch.strided else grad
    return grad.detach().double()


def _mask(index: Any, gradient: Tensor) -> Tensor | None:
    if index is None:
        return None
    mask = torch.zeros_like(gradient)
    mask[index] = 1.0
    return mask


def _of_entry(use: Use) -> Contribution:
    assert use.reduced is not None
    return Contribution(use.op, use.where, use.reduced.cpu(), None, use.precision)


def _of_part(
    uses: list[Use], gradient: Tensor, mask: Tensor | None, loop: bool
) -> tuple[float, list[Contribution], bool]:
    """‖G‖, each use's parts along G and norms; and whether the norms of all uses together are exact."""
    direction = gradient if mask is None else gradient * mask
    size = float(torch.linalg.vector_norm(direction))
    parts: list[Contribution] = []
    exact = True
    for use in uses:
        along = use.along(use.placement.spread(direction)) / size if size else torch.zeros(use.lead)
        squared = _squared(use, mask)
        parts.append(
            Contribution(
                use.op, use.where, along.cpu(), None if squared is None else squared.cpu(), use.precision
            )
        )
    if any(part.squared is None for part in parts):
        exact = False
    elif not loop and len(uses) > 1:
        shared = [overlap(a, b, mask) for i, a in enumerate(uses) for b in uses[i + 1 :]]
        exact = all(s is not None for s in shared)
        for s in shared if exact else ():
            assert parts[0].squared is not None
            assert s is not None
            parts[0].squared = parts[0].squared + 2 * s.cpu()
    return size, parts, exact


def _squared(use: Use, mask: Tensor | None) -> Tensor | None:
    """‖what each position adds‖²; None where it would take the outer product."""
    if isinstance(use.placement, ParameterFunction):
        slopes = use.placement.slopes
        return None if slopes is None else use.squared(slopes.square() * (1.0 if mask is None else mask))
    return use.squared(_spread_mask(use, mask))


def _spread_mask(use: Use, mask: Tensor | None) -> Tensor | None:
    positions = use.placement.positions
    if mask is not None:
        return use.placement.spread(mask)
    return None if positions is None or bool((positions >= 0).all()) else (positions >= 0).double()


def _decoder(decode: Callable[[int], str] | None, tokenizer: Any) -> Callable[[int], str] | None:
    if decode is not None or tokenizer is None:
        return decode
    return lambda token: tokenizer.decode([token])
