"""The catalogue of causes: every (status, cause) a finding or an alert can have, one line each.

    diagnose   none · zero · partly-zero · non-finite · loop   sentences: diagnosis.{status}.{cause}
    watch      alert                                           sentences: alert.{cause}
    check_*    wrong · explained · loop                        sentences: check, accumulation, causality

A variant has sentences of its own, `{key}.{variant}.what`, or shares those of its cause, `{key}.what`. These
strings are stable: people and programs look for them. A module of data that imports nothing of ours; to add a
cause, add its line here, its sentences in messages/*.toml, its section in docs/*/causes.md, and the rule that
finds it. tests/test_causes.py compares all four.
"""

from __future__ import annotations

from dataclasses import dataclass

F, E, W = "fault", "explained", "warning"


@dataclass(frozen=True)
class Cause:
    """One line of the catalogue."""

    status: str
    name: str
    severities: tuple[str, ...]
    variants: tuple[str, ...]
    key: str
    """The prefix of its sentences in the messages."""


class UnknownCause(ValueError):
    """A finding has a cause, a variant or a severity that its line in the catalogue does not allow."""


def _diagnosis(status: str, name: str, severities: tuple[str, ...], variants: str = "") -> Cause:
    return Cause(status, name, severities, tuple(variants.split()), f"diagnosis.{status}.{name}")


def _alert(name: str, severities: tuple[str, ...], variants: str = "") -> Cause:
    return Cause("alert", name, severities, tuple(variants.split()), f"alert.{name}")


def _check(status: str, name: str, severities: tuple[str, ...], key: str, variants: str = "") -> Cause:
    return Cause(status, name, severities, tuple(variants.split()), key)


CUTS = (
    "detach data tensor parameter deepcopy overwritten integer no_grad inference_mode grad function"
    " checkpoint operation"
)
ESCAPES = "item tolist numpy float int complex"
LAYERS = "layer layer_written root root_written"
POLES = "sqrt norm log division pow acos std softmax other"

# fmt: off
CAUSES: tuple[Cause, ...] = (
    # .grad is None
    _diagnosis("none", "frozen", (E,), "integer"),
    _diagnosis("none", "not-leaf", (F,)),
    _diagnosis("none", "no-backward", (F,)),
    _diagnosis("none", "cleared", (E,), "likely"),
    _diagnosis("none", "loss-without-graph", (F,), f"frozen {CUTS} {ESCAPES}"),
    _diagnosis("none", "cut", (F, E), f"escape apart {CUTS}"),
    _diagnosis("none", "unused", (F, E), "meta choice branch chance"),
    _diagnosis("none", "not-reaching-loss", (F, E), "extra_output differentiated seen_from_grad"),
    _diagnosis("none", "undefined-in-backward", (F,), "built_in"),
    # .grad is zero everywhere
    _diagnosis("zero", "zero-loss-gradient", (F, E), "minimum lowest flat ignored"),
    _diagnosis("zero", "dead-activation", (F, E), "relu saturated single choice"),
    _diagnosis("zero", "masked", (F, E), "mask attention zero zero_constant dropout dropout_module choice"),
    _diagnosis("zero", "clamped", (F, E), "clamp round nearest flat"),
    _diagnosis("zero", "sampled", (F,)),
    _diagnosis("zero", "constant", (F,), "equal slope"),
    _diagnosis("zero", "cancellation", (F,), "read elsewhere paths"),
    _diagnosis("zero", "zero-weight-downstream", (F, E), "product named stuck fixed forward stacked"),
    _diagnosis("zero", "underflow", (F, E), "forward"),
    _diagnosis("zero", "absent-rows", (E,), "none empty inputs"),
    _diagnosis("zero", "structural", (E,), "cancels differentiated"),
    _diagnosis("zero", "zeroed", (F, E), "function hook likely"),
    _diagnosis("zero", "unknown", (E,)),
    # some rows or columns of .grad are zero
    _diagnosis("partly-zero", "absent-rows", (E,), "rows picked slices inputs"),
    _diagnosis("partly-zero", "dead-activation", (E,), "units layers"),
    _diagnosis("partly-zero", "masked", (E,)),
    _diagnosis("partly-zero", "zero-weight-downstream", (E,), "product named stuck"),
    # .grad holds NaN or infinity
    _diagnosis("non-finite", "forward", (F,), f"parameter input softmax-across mean loss {POLES}"),
    _diagnosis("non-finite", "backward", (F,), f"where unseen unseen-input unseen-softmax function {POLES}"),
    _diagnosis("non-finite", "overflow", (F,), "forward backward sum"),
    _diagnosis("non-finite", "unknown", (F,), "own elsewhere"),
    # the loop around it
    _diagnosis("loop", "not-in-optimizer", (F, E), "other hidden"),
    _diagnosis("loop", "stale-in-optimizer", (F,)),
    _diagnosis("loop", "accumulating", (F,)),
    _diagnosis("loop", "moved-while-frozen", (F, E), "zero_gradient statistics"),
    _diagnosis("loop", "never-moves", (F, E)),
    _diagnosis("loop", "zero-lr", (F, E)),
    _diagnosis("loop", "unscaled-amp", (F, E), "held"),
    # what watch reports while a run goes on
    _alert("non-finite", (F,), "loss"),
    _alert("exploding", (F,)),
    _alert("vanishing", (W,)),
    _alert("dead", (W,)),
    _alert("no-gradient", (F, W), "none"),
    _alert("always-clipped", (W,)),
    _alert("update-ratio", (W,), "large small"),
    _alert("loss-spike", (W,)),
    _alert("not-in-optimizer", (F,)),
    _alert("accumulating", (F,)),
    _alert("moved-while-frozen", (F,)),
    _alert("never-moves", (F, W)),
    _alert("zero-lr", (F, E)),
    _alert("unscaled-amp", (F,)),
    # check_gradients
    _check("wrong", "wrong-backward", (F,), "check", f"function operator {LAYERS}"),
    _check("wrong", "wrong-gradient", (F,), "check", "tensor written"),
    _check("explained", "surrogate-gradient", (E,), "check", "surrogate_identity surrogate_steps"),
    _check("explained", "hooked", (E,), "check", "hooked"),
    _check("explained", "divided", (E,), "check", "divided"),
    _check("explained", "corner", (E,), "check", "corner"),
    _check("explained", "kink", (E,), "check", "kink"),
    _check("explained", "unclear", (E,), "check", "unclear"),
    _check("explained", "coarse", (E,), "check", "coarse"),
    _check("explained", "own-precision", (E,), "check", "own_precision"),
    _check("explained", "no-gradient", (F, E), "check", "no_gradient"),
    _check("explained", "no-gradient-cut", (F, E), "check", "no_gradient_cut"),
    _check("explained", "loss-without-graph", (F,), "check", "loss_without_graph"),
    _check("explained", "not-finite", (F,), "check", "not_finite not_finite_gradient"),
    _check("loop", "not-repeatable", (F,), "check", "not_repeatable not_repeatable_at"),
    # check_accumulation, check_causality
    _check("wrong", "factor", (F,), "accumulation", "factor factor_parts factor_twice"),
    _check("wrong", "weights", (F,), "accumulation", "weights"),
    _check("wrong", "batch-norm", (F,), "accumulation", "batch_norm"),
    _check("wrong", "some-tensors", (F,), "accumulation", "some_tensors"),
    _check("wrong", "not-a-sum", (F,), "accumulation", "not_a_sum"),
    _check("explained", "dropout", (E,), "accumulation", "dropout"),
    _check("wrong", "future-leak", (F,), "causality.leak", "everything next"),
)
# fmt: on
BY_NAME = {(cause.status, cause.name): cause for cause in CAUSES}
"""(status, cause) → its line."""


def require(status: str, name: str, variant: str = "", severity: str = "") -> Cause:
    """Returns the line of a cause; raises UnknownCause for what stands in no line.

    The variant "" is allowed for every cause, and the severity "" means any.
    """
    cause = BY_NAME.get((status, name))
    if cause is None:
        raise UnknownCause(
            f"clinometer/causes.py has no cause {name!r} with the status {status!r}: add its line"
        )
    if variant and variant not in cause.variants:
        raise UnknownCause(
            f"clinometer/causes.py has no variant {variant!r} of {status} {name}: add it there"
        )
    if severity and severity not in cause.severities:
        raise UnknownCause(f"clinometer/causes.py has {status} {name} only as {cause.severities}")
    return cause
