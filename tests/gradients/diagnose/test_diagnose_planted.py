"""Each planted fault is found, by its cause, at its line, for exactly its tensors; and nothing else is."""

import pytest
from tests.gradients.diagnose.planted import cut_paths, loops, no_gradient, not_finite, zero_gradient

from clinometer.gradients.diagnose.diagnose import diagnose

PLANTED = [*cut_paths.FAULTS, *no_gradient.FAULTS, *zero_gradient.FAULTS, *not_finite.FAULTS, *loops.FAULTS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_planted_fault_is_found_at_its_line(planted):
    params, closure, *rest = planted.build()
    found = diagnose(params, closure, optimizer=rest[0] if rest else None)
    text = found.render(width=100)
    matching = [f for f in found.findings if f.cause == planted.cause and f.status == planted.status]
    assert matching, text
    named = {name for f in matching for name in f.names} - {"loss"}
    assert named == planted.concerned([*found, *named]), text
    for name in named & set(found):
        if planted.status != "loop":
            assert (found[name].status, found[name].cause) == (planted.status, planted.cause)
    assert {f.severity for f in matching} == {planted.severity}, text
    finding = matching[0]
    if planted.line is not None:
        assert len(matching) == 1, text  # one line is one finding
        assert finding.where is not None, text
        assert (finding.where.file, finding.where.line) == (planted.file, planted.line), text
    accused = [f for f in found.findings if f.severity == "fault" and f is not finding]
    assert not accused, text
    assert found.healthy == (planted.severity == "explained")
    if finding.where is not None:
        assert finding.where.source in found.render("en", width=400)
    for language in ("en", "zh"):
        assert finding.say("what", language) in found.render(language, width=400)
        for part in ("what", "why", "remedy"):
            assert "{" not in finding.say(part, language)
        if planted.severity == "fault":
            assert finding.say("why", language), f"{finding.key}.{finding.variant} does not say why"
            assert finding.say("remedy", language), f"{finding.key}.{finding.variant} has no remedy"


def test_there_are_at_least_eighty_planted_faults():
    assert len({planted.name for planted in PLANTED}) >= 80
