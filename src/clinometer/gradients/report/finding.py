"""A finding: one cause at one place, with the tensors it concerns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from clinometer.causes import require
from clinometer.gradients.report.document import Document, Line, code, dim, fault, name, note, sentence
from clinometer.gradients.report.formatting import shorten
from clinometer.gradients.report.places import Where
from clinometer.messages import say, sentences

_FROZEN_AT_ONCE = 3

Severity = Literal["fault", "explained"]
FAULT: Severity = "fault"
"""Something is very likely wrong."""
EXPLAINED: Severity = "explained"
"""True, worth knowing, and how it should be."""


@dataclass(frozen=True)
class Finding:
    """One cause at one place."""

    cause: str
    """An entry of the catalogue: "cut"."""
    status: str
    """"none", "zero", "partly-zero", "non-finite", or "loop"."""
    severity: Severity
    key: str
    """Where its sentences are: `{key}.what`, and where they exist `{key}.why` and `{key}.remedy`.

    With a single name `{key}.what_one` is used where it exists, without one `{key}.what_none`; so for the
    other two.
    """
    names: tuple[str, ...] = ()
    where: Where | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    """What stands in the sentences' places; `count` and `name` are there without being given."""
    variant: str = ""
    """Sentences of its own: `{key}.{variant}.why` is preferred to `{key}.why`. One with its own `what`
    says everything itself."""
    linked: tuple[str, ...] = ()
    """Further causes of the catalogue that are the same mistake, and are not told a second time."""

    owners: tuple[str, ...] = ()
    """The largest modules of which only these tensors would learn, as Python: "encoder.layers[1]"."""
    others: tuple[Where, ...] = ()
    """Further lines that are part of the same: each path from the tensors to the loss is cut at one."""

    def say(self, part: str, language: str | None = None) -> str:
        """The sentence "what", "why" or "remedy" of this finding; "" if it has none."""
        key = self._key(part)
        return say(key, language, **self._values(language)) if key else ""

    def document(self, language: str | None = None) -> Document:
        """The finding as VOICE.md shows it: what, the line, why, the tensors, the remedy."""
        mark = fault("✗ ") if self.severity == FAULT else note("· ")
        lines: Document = [Line((mark, *self._spans("what", language)), hang=2)]
        if self.where is not None:
            lines += [self._place(where, language) for where in (self.where, *self.others)]
        if self.others and self.severity == FAULT:
            spans = sentence("gradients.finding.each_path", language, count=1 + len(self.others))
            lines.append(Line(spans, indent=4))
        if why := self._spans("why", language):
            lines.append(Line(why, indent=4))
        if len(self.names) > 1:
            listed = name(shorten(self.names, language=language))
            lines.append(Line(sentence("gradients.finding.names", language, names=listed), indent=4, hang=2))
        if remedy := self._spans("remedy", language):
            lines.append(Line(remedy, indent=4))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON once `jsonable` has seen the values."""
        return {
            "cause": self.cause,
            "status": self.status,
            "severity": self.severity,
            "variant": self.variant,
            "names": list(self.names),
            "linked": list(self.linked),
            "where": None if self.where is None else self.where.to_dict(),
            "others": [where.to_dict() for where in self.others],
            "values": dict(self.values),
            "message": self.say("what"),
            "why": self.say("why"),
            "remedy": self.say("remedy"),
        }

    def _place(self, where: Where, language: str | None) -> Line:
        spans = [dim(where.label)]
        if where.source:
            spans += [dim("   "), code(where.source)]
        inside = where.function if where.function not in ("", "<module>") else where.module
        if inside:
            spans += [dim("   "), *sentence("gradients.finding.inside", language, place=dim(inside))]
        return Line(tuple(spans), indent=4, hang=2)

    def _spans(self, part: str, language: str | None) -> tuple[Any, ...]:
        key = self._key(part)
        return sentence(key, language, **self._values(language)) if key else ()

    def _key(self, part: str) -> str:
        """The most particular sentence there is: of this variant, and for a single tensor."""
        known = sentences("en")
        particular = {0: "none", 1: "one"}.get(len(self.names))
        ends = [f"{part}_{particular}", part] if particular else [part]
        variant = f"{self.key}.{self.variant}"
        owners = [variant] if f"{variant}.what" in known else [variant, self.key]
        return next((key for owner in owners for end in ends if (key := f"{owner}.{end}") in known), "")

    def _values(self, language: str | None) -> dict[str, Any]:
        first = {"name": self.names[0]} if self.names else {}
        places = {
            "count": len(self.names),
            "freeze": self.freeze or say("gradients.finding.freeze", language),
            "owners": shorten(self.owners or self.names, language=language),
        }
        return {**places, **first, **self.values}

    @property
    def freeze(self) -> str:
        """The code that freezes these tensors; "" if they belong to too many modules."""
        many = len(self.owners) > _FROZEN_AT_ONCE
        return "" if many else ", ".join(f"{owner}.requires_grad_(False)" for owner in self.owners)


@dataclass(frozen=True)
class Reason:
    """Why one tensor's gradient is what it is; equal keys and groups become one finding.

    Raises UnknownCause for a cause, a variant or a severity that the catalogue in `clinometer.causes` lacks.
    """

    status: str
    cause: str
    severity: Severity = FAULT
    variant: str = ""
    where: Where | None = None
    values: dict[str, Any] = field(default_factory=dict)
    group: Any = None
    """What makes two reasons the same finding, besides cause and variant; default: the place."""
    others: tuple[Where, ...] = ()
    """Further lines, as in `Finding`."""

    def __post_init__(self) -> None:
        require(self.status, self.cause, self.variant, self.severity)
