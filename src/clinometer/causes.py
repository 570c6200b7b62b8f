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
OTHERS = "other_step other_loss"
OUTSIDE = "plain computed new late outside network beside variable"
LAYERS = "layer layer_written root root_written"
SURROGATES = "surrogate_steps surrogate_sampled"
TRIED = (
    "checkpoint_random checkpoint_changed saved_tensors not_contiguous unseen_write operation no_derivative"
    " repeated"
)
POINTS = (
    "outside inside edge near division division-small power-negative power-zero single empty eps eps-inside"
    " singular no-target no-weight other other-at"
)
"""What may be special about the values where NaN or infinity begins, in the forward and in the backward."""
FORWARD_POINTS = (
    f"{POINTS} log gradient parameter buffer input constant infinity infinity-term softmax softmax-across"
    " no-alignment unread"
)
BACKWARD_POINTS = (
    f"{POINTS} parameter buffer where where-division sqrt power-exponent origin singular-values singular-zero"
    " eigenvalues rank operand function hook hook-parameter unseen unseen-input unseen-softmax unseen-large"
    " unseen-constant"
)
TOO_LARGE = "forward exponential backward sum"
TOO_LARGE_WIDE = "forward-wide exponential-wide backward-wide sum-wide"
"""In a type with the range of float32, to whom a wider one cannot be advised."""
UNPUSHED = "zero_gradient_momentum zero_gradient_both zero_gradient_unknown"
STEP_TERMS = "eps no_eps zero_gradient state option overflow"

# fmt: off
CAUSES: tuple[Cause, ...] = (
    # .grad is None
    _diagnosis("none", "frozen", (E,), "integer"),
    _diagnosis("none", "not-leaf", (F,)),
    _diagnosis("none", "no-backward", (F,)),
    _diagnosis("none", "cleared", (E,), "likely"),
    _diagnosis("none", "loss-without-graph", (F,), f"frozen {CUTS} {ESCAPES}"),
    _diagnosis("none", "cut", (F, E), f"escape apart other_step {CUTS}"),
    _diagnosis("none", "unused", (F, E), f"meta choice depth branch chance apart replicated {OTHERS}"),
    _diagnosis("none", "not-reaching-loss", (F, E), f"extra_output differentiated seen_from_grad {OTHERS}"),
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
    _diagnosis("non-finite", "forward", (F,), FORWARD_POINTS),
    _diagnosis("non-finite", "backward", (F,), BACKWARD_POINTS),
    _diagnosis("non-finite", "overflow", (F,), f"{TOO_LARGE} {TOO_LARGE_WIDE}"),
    _diagnosis("non-finite", "unknown", (F,), "own elsewhere"),
    # the loop around it
    _diagnosis("loop", "gradients-off", (F, E), "no_grad inference_mode allowed"),
    _diagnosis("loop", "not-compiled", (E,)),
    _diagnosis("loop", "older-graph", (E,), "unnamed"),
    _diagnosis("loop", "not-in-optimizer", (F, E), f"other hidden {OUTSIDE}"),
    _diagnosis("loop", "stale-in-optimizer", (F,)),
    _diagnosis("loop", "accumulating", (F,)),
    _diagnosis("loop", "moved-while-frozen", (F, E), f"{UNPUSHED} statistics"),
    _diagnosis("loop", "never-moves", (F, E), "minimum waits"),
    _diagnosis("loop", "decay", (F, E), "tensors rows"),
    _diagnosis("loop", "step-not-finite", (F,), STEP_TERMS),
    _diagnosis("loop", "shared-memory", (F,)),
    _diagnosis("loop", "state-of-another", (F,)),
    _diagnosis("loop", "trial-step", (E,)),
    _diagnosis("loop", "zero-lr", (F, E)),
    _diagnosis("loop", "unscaled-amp", (F, E), "held"),
    # what watch reports while a run goes on
    _alert("non-finite", (F,), "loss scaler"),
    _alert("step-not-finite", (F,), "eps zero_gradient"),
    _alert("nothing-learns", (F, W), "none cleared stopped"),
    _alert("exploding", (F,)),
    _alert("vanishing", (W,)),
    _alert("dead", (W,)),
    _alert("no-gradient", (W,)),
    _alert("always-clipped", (W,)),
    _alert("update-ratio", (W,), "large small"),
    _alert("loss-spike", (W,)),
    _alert("not-in-optimizer", (F, W, E), "outside"),
    _alert("accumulating", (F,)),
    _alert("discarded", (W,)),
    _alert("no-step", (F,), "never"),
    _alert("stale-in-optimizer", (F,)),
    _alert("shared-memory", (F,)),
    _alert("decay", (F,)),
    _alert("written-between", (F, W, E), "undone"),
    _alert("moved-while-frozen", (F,)),
    _alert("never-moves", (F, W), "rate"),
    _alert("zero-lr", (F, E)),
    _alert("unscaled-amp", (F,)),
    # check_gradients
    _check("wrong", "wrong-backward", (F,), "check", f"function operator second {LAYERS}"),
    _check("wrong", "wrong-gradient", (F,), "check", f"tensor written {TRIED}"),
    _check("explained", "surrogate-gradient", (E,), "check", f"surrogate_identity {SURROGATES}"),
    _check("explained", "approximate", (E,), "check", "approximate"),
    _check("explained", "saved-tensors", (E,), "check", "saved_tensors"),
    _check("explained", "hook-backward", (E,), "check", "hook_backward"),
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
