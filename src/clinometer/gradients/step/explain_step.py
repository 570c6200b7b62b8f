"""explain_step(): watch one optimizer step, then replay it.

    with explain_step(optimizer, model) as anatomy:
        optimizer.step()
    print(anatomy["layers.0.attn.q_proj.weight"][3, 5])

Memory: a copy of the parameters looked at, of their gradients and of their optimizer state. The copies are
taken by hooks right around the step itself, so a schedule, clipping or `zero_grad()` may stand in the same
block. Nothing is computed in float64 until a result is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clinometer.distributed.ranks import Ranks, whole
from clinometer.gradients.optimizers.identity import ancestor_of
from clinometer.gradients.optimizers.made_nonfinite import (
    MadeNonfinite,
    made_nonfinite,
    without_coincidence,
)
from clinometer.gradients.optimizers.shared_memory import pairs_that_overlap
from clinometer.gradients.sandbox.closure import Closure, eagerly, evaluate
from clinometer.gradients.sandbox.interrupts import uninterrupted_block
from clinometer.gradients.sandbox.random_state import RandomState
from clinometer.gradients.sandbox.sandbox import modules_named_by, untouched
from clinometer.gradients.sandbox.saved_state import has_grad
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.step.anatomy import StepAnatomy
from clinometer.gradients.step.clipping import after_unscaling, clipping_factor
from clinometer.gradients.step.formulas import FORMULAS, Claim, claim_of
from clinometer.gradients.step.measures import WeightMove, fitting, moves_beyond_rounding
from clinometer.gradients.step.optimizer_state import OptimizerState, count_in, wide
from clinometer.messages import InputError


@uninterrupted_block
@contextmanager
def explain_step(
    optimizer: Any, params: Any, *, loss: Closure | None = None, clipped_from: float | None = None
) -> Iterator[StepAnatomy]:
    """Watches the `optimizer.step()` inside the block and yields its anatomy, complete after the block.

    Δθ is replayed in float64 by the formula the optimizer claims, and what is left is rounding, in ulp of
    max(|θ before|, |θ after|). Of several steps in one block the last is kept.

    `params`: what to look at: the model, or a mapping of a few names, which costs only their memory.
    `loss`: a closure; called before and after the step with the same random numbers and without a trace, to
    set the change of the loss against Σ⟨g, Δθ⟩.
    Of sharded tensors (FSDP2), each rank gathers what is looked at when the block ends: every rank must come
    there, and a few names cost less. Losses are then the mean over ranks, as the gradient is; under DDP each
    rank tells its own part of the batch, and may look alone.
    `clipped_from`: the total norm before clipping, as clip_grad_norm_ returns it. Without it, clipping is
    seen if the block begins before it: gradients are noted when the block begins, after every backward and
    after `GradScaler.unscale_` in it. `anatomy.before_clipping()` notes them at any other place.

    Raises InputError for something that is no optimizer. Exceptions of the block pass through, and the
    hooks are gone in any case.
    """
    watch = _Watch(Subject.of(params), innermost(optimizer), loss, clipped_from)
    anatomy = StepAnatomy(watch.subject, type(watch.optimizer).__name__, watch.note_gradients)
    with ExitStack() as stack:
        watch.begin(stack)
        yield anatomy
        watch.end(anatomy)


class _Watch:
    """The copies taken on the way through the block."""

    def __init__(
        self, subject: Subject, optimizer: Any, loss: Closure | None, clipped_from: float | None
    ) -> None:
        self.subject = subject
        self.optimizer = optimizer
        self._loss = loss
        self._clipped_from = clipped_from
        self._raw: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._held: dict[str, OptimizerState] = {}
        self._after: dict[str, Tensor] = {}
        self._owned: set[str] = set()
        self._losses: list[float] = []
        self._random: RandomState | None = None
        self._clip: float | None = None
        self._first_counts: dict[str, int] = {}
        """The count in a tensor's state before the first step that was counted, less the steps since."""
        self._steps: dict[str, int] = {}
        """The steps taken in the block with a count in the state."""
        self._counts: dict[str, tuple[int, int | None]] = {}
        """The count that the last step should have begun at, and the one its state holds after it."""
        self._shared: list[tuple[str, str]] = []
        self._stepped = False
        self._ran = self._counted = False
        modules = [subject.module, *([] if loss is None else modules_named_by(loss))]
        self._ranks = Ranks(subject.tensors, [m for m in modules if m is not None])

    def begin(self, stack: ExitStack) -> None:
        self.note_gradients()
        if isinstance(self.optimizer, Optimizer):
            before = self.optimizer.register_step_pre_hook(self._before_step)
            after = self.optimizer.register_step_post_hook(self._after_step)
            stack.callback(before.remove)
            stack.callback(after.remove)
            # Last of the hooks before the step, and first after it: what they write is not the step's.
            if (hooks := after.hooks_dict_ref()) is not None:
                hooks.move_to_end(after.id, last=False)
            for name, tensor in self.subject.tensors.items():
                if tensor.requires_grad and tensor.is_leaf:
                    note = partial(self._note, name)
                    stack.callback(tensor.register_post_accumulate_grad_hook(note).remove)
            stack.enter_context(after_unscaling(self.optimizer, self.note_gradients))
        else:
            self._copy_before()

    def note_gradients(self) -> None:
        """Gradients as they are now count as those before clipping."""
        self._raw = {}
        for name, tensor in self.subject.tensors.items():
            if has_grad(tensor):
                self._note(name, tensor)

    def _note(self, name: str, tensor: Tensor) -> None:
        if tensor.grad is not None:
            self._raw[name] = _dense(tensor.grad).clone()

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._ran, self._counted = True, False
        if closure is None:
            self._copy_before()
            return None

        def counted() -> Any:
            # The optimizer computes its gradients in here; they are what it steps with.
            value = closure()
            self._raw = {}
            self._copy_before()
            return value

        if "closure" in kwargs:
            return args, {**kwargs, "closure": counted}
        return (*args[:1], counted, *args[2:]), kwargs

    def _after_step(self, *_: Any) -> None:
        self._copy_after()
        self._stepped = not _found_inf(self.optimizer)
        # A subclass whose step calls torch's comes here twice.
        if self._stepped and not self._counted:
            self._count_steps()
        self._counted = True

    def _copy_before(self) -> None:
        options = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        scale = getattr(self.optimizer, "grad_scale", None)
        self._held, self._before, self._after = {}, {}, {}
        self._owned = {name for name, tensor in self.subject.tensors.items() if id(tensor) in options}
        self._losses = []
        for name, tensor in self.subject.tensors.items():
            self._before[name] = tensor.detach().clone()
            grad = tensor.grad if has_grad(tensor) else None
            if id(tensor) not in options or grad is None:
                continue
            grad = _dense(grad).clone() if scale is None else _dense(grad) / scale
            state = {
                key: value.detach().clone() if isinstance(value, Tensor) else value
                for key, value in self.optimizer.state.get(tensor, {}).items()
            }
            group = {key: _copied(value) for key, value in options[id(tensor)].items() if key != "params"}
            self._held[name] = OptimizerState(self._before[name], grad, state, group)
        self._shared = pairs_that_overlap({name: self.subject.tensors[name] for name in self._held})
        if self._clipped_from:
            self._clip = min(1.0, self._norm_of_all() / float(self._clipped_from))
        if self._loss is not None:
            self._random = RandomState()
            self._losses.append(self._loss_now())

    def _copy_after(self) -> None:
        self._after = {name: tensor.detach().clone() for name, tensor in self.subject.tensors.items()}
        if self._loss is not None and len(self._losses) == 1:
            self._losses.append(self._loss_now())

    def _count_steps(self) -> None:
        """Counts the steps of the block, to compare the counts in the states with."""
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for name, held in self._held.items():
            tensor = self.subject.tensors[name]
            began = count_in(held.state, held.options)
            now = count_in(self.optimizer.state.get(tensor, {}), groups.get(id(tensor), {}))
            if began is not None:
                taken = self._steps.get(name, 0)
                self._counts[name] = self._first_counts.setdefault(name, began) + taken, now
                self._steps[name] = taken + 1

    def _loss_now(self) -> float:
        assert self._loss is not None
        assert self._random is not None
        with self._ranks.apart(), untouched(self.subject, closure=self._loss), eagerly():
            self._random.restore()
            return float(evaluate(self._loss).detach())

    def _norm_of_all(self) -> float:
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        squares = [wide(whole(g)).square().sum().item() for g in grads if g is not None]
        return sum(squares) ** 0.5

    def end(self, anatomy: StepAnatomy) -> None:
        if isinstance(self.optimizer, Optimizer):
            skipped = not self._stepped
            if not self._ran:  # the pre-hook never came: GradScaler skips by not calling step()
                self._copy_before()
                self._after = dict(self._before)
        else:
            self._copy_after()
            skipped = False
        for name, held in self._held.items():
            if held.grad.is_meta:
                raise InputError("gradients.subject.meta", name=name)
        self._gather()
        claim = claim_of(self.optimizer)
        shared = {name for pair in self._shared for name in pair}
        moved: dict[str, WeightMove] = {}
        for name, tensor in self._before.items():
            held = self._held.get(name)
            raw, clip = self._raw_of(name, held)
            moved[name] = WeightMove(
                name,
                self._status(name, skipped, shared),
                tensor,
                self._after.get(name, tensor),
                held,
                raw,
                clip,
            )
        formula, moved = _formula_of(claim, moved)
        ancestor = ancestor_of(self.optimizer)
        everything = {id(t) for t in self.subject.tensors.values()}
        anatomy.complete(
            {name: _with(m, formula) for name, m in moved.items()},
            formula,
            losses=tuple(self._losses_of_all()) if len(self._losses) == 2 else None,
            apart=self._ranks.replicated and not self._ranks.sharded,
            whole=all(
                id(p) in everything
                for group in self.optimizer.param_groups
                for p in group["params"]
                if p.requires_grad
            ),
            skipped="no-step" if skipped and not self._ran else "scaler" if skipped else None,
            basis=claim.basis,
            ancestor="" if ancestor is None else ancestor.__name__,
            made={} if skipped else self._made_nonfinite(),
            stuck={} if skipped or formula not in _COUNTED else self._stuck(),
            shared=tuple(self._shared),
        )

    def _made_nonfinite(self) -> dict[str, MadeNonfinite]:
        found = {
            name: made_nonfinite(held.theta, held.grad, self._after[name], held.state, held.options)
            for name, held in self._held.items()
            if name in self._after
        }
        return without_coincidence({name: made for name, made in found.items() if made is not None})

    def _stuck(self) -> dict[str, tuple[int, int]]:
        """The counts of tensors whose state does not count the steps that were taken."""
        return {
            name: (began, now)
            for name, (began, now) in self._counts.items()
            if now is not None and now != began + 1
        }

    def _losses_of_all(self) -> list[float]:
        """The mean over ranks where they meet anyway; under DDP one of them may look alone."""
        return self._ranks.mean(self._losses) if self._ranks.sharded else self._losses

    def _gather(self) -> None:
        """Sharded tensors become whole ones."""
        if not self._ranks.sharded:
            return
        stayed = {name for name, tensor in self._after.items() if tensor is self._before[name]}
        self._before = {name: whole(tensor) for name, tensor in self._before.items()}
        self._after = {
            name: self._before[name] if name in stayed else whole(tensor)
            for name, tensor in self._after.items()
        }
        self._raw = {name: whole(tensor) for name, tensor in self._raw.items()}
        self._held = {
            name: OptimizerState(
                self._before[name],
                whole(held.grad),
                {k: whole(v) if isinstance(v, Tensor) else v for k, v in held.state.items()},
                held.options,
            )
            for name, held in self._held.items()
        }

    def _status(self, name: str, skipped: bool, shared: set[str]) -> str:
        if name not in self._owned:
            return "not-held"
        if skipped:
            return "skipped"
        if name not in self._held:
            return "no-gradient"
        return "shared" if name in shared else "stepped"

    def _raw_of(self, name: str, held: OptimizerState | None) -> tuple[Tensor | None, float | None]:
        if held is None:
            return None, None
        raw = self._raw.get(name)
        if raw is None or raw.shape != held.grad.shape or getattr(self.optimizer, "grad_scale", None):
            return None, self._clip
        factor = clipping_factor(raw, held.grad)
        return (None, self._clip) if factor is None else (raw, factor)


_COUNTED = ("adam", "adamw", "adamw-after", "adamax", "nadam", "radam", "adafactor")
"""Formulas whose bias corrections or rates depend on the count."""


def _formula_of(claim: Claim, moved: dict[str, WeightMove]) -> tuple[str | None, dict[str, WeightMove]]:
    """The formula claimed; of an optimizer that claims none, one that every tensor follows, if there is
    one."""
    if claim.basis != "fit":
        return (claim.formulas[0] if claim.formulas else None), moved
    for counts_next in (False, True):
        tried = {name: _counting(m, counts_next) for name, m in moved.items()}
        steps = [
            m for m in tried.values() if m.status == "stepped" and m.before.numel() and not m.before.is_meta
        ]
        if any(moves_beyond_rounding(m) for m in steps):
            for key in claim.formulas:
                with suppress(KeyError, TypeError, ValueError, RuntimeError):  # options of another kind
                    if all(fitting(m, {key: FORMULAS[key]})[0][1] == 0 for m in steps):
                        return key, tried
    return None, moved


def _counting(moved: WeightMove, counts_next: bool) -> WeightMove:
    if moved.held is None or not counts_next:
        return moved
    return replace(moved, held=replace(moved.held, counts_next=True))


def _with(moved: WeightMove, formula: str | None) -> WeightMove:
    status = "unknown" if moved.status == "stepped" and formula is None else moved.status
    return replace(moved, status=status, formula=formula)


def innermost(optimizer: Any) -> Any:
    """The optimizer inside a wrapper (accelerate's, a scheduler-like one), by its attribute `optimizer`."""
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    if not (isinstance(inner, Optimizer) or _looks_like_one(inner)):
        raise InputError("step.not_an_optimizer", type=type(optimizer).__name__)
    return inner


def _looks_like_one(value: Any) -> bool:
    return (
        not inspect.isclass(value)
        and isinstance(getattr(value, "param_groups", None), list)
        and isinstance(getattr(value, "state", None), dict)
        and isinstance(getattr(value, "step", None), Callable)
    )


def _found_inf(optimizer: Any) -> bool:
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(torch.as_tensor(found).any())


def _dense(grad: Tensor) -> Tensor:
    return grad.detach() if grad.layout is torch.strided else grad.detach().to_dense()


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
