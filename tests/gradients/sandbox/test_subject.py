import pytest
import torch
from torch import nn

from clinometer.gradients.sandbox.subject import Subject, UnknownName, clean_name
from clinometer.messages import InputError


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def key_of(params):
    with pytest.raises(InputError) as caught:
        Subject.of(params)
    assert caught.value.render("zh") != str(caught.value)
    return caught.value.key.removeprefix("gradients.subject.")


def test_a_module_a_mapping_and_pairs_give_the_same_tensors_in_their_order():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    for params in (model, dict(model.named_parameters()), model.named_parameters(), model._parameters | {}):
        if not params:
            continue
        tensors = Subject.of(params).tensors
        assert list(tensors) == names
        assert tensors["2.weight"] is model[2].weight
    reverse = dict(reversed(list(model.named_parameters())))
    assert list(Subject.of(reverse).tensors) == names[::-1]
    assert Subject.of(model).size == 6 + 3 + 3 + 1


def test_bare_tensors_are_numbered():
    model = nn.Linear(2, 2)
    assert list(Subject.of(model.parameters()).tensors) == ["0", "1"]


def test_a_subject_is_taken_as_it_is():
    subject = Subject.of(nn.Linear(2, 2))
    assert Subject.of(subject) is subject


def test_a_tied_tensor_is_one_subject_under_its_first_name():
    model = Tied()
    subject = Subject.of(model)
    assert list(subject.tensors) == ["embed.weight", "body.weight", "body.bias"]
    assert subject.aliases == {"embed.weight": ("head.weight",)}
    assert subject.name_of("head.weight") == "embed.weight"
    pairs = Subject.of({"a": model.embed.weight, "b": model.head.weight})
    assert (list(pairs.tensors), pairs.aliases) == (["a"], {"a": ("b",)})


def test_one_name_for_two_tensors_is_refused_and_for_one_tensor_is_not():
    a, b = torch.ones(1), torch.ones(1)
    assert key_of([("w", a), ("w", b)]) == "same_name"
    assert list(Subject.of([("w", a), ("w", a)]).tensors) == ["w"]
    assert Subject.of([("w", a), ("w", a)]).aliases == {}


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("model", "kind"),
        (b"model", "kind"),
        (3, "kind"),
        (None, "kind"),
        (torch.ones(3), "bare_tensor"),
        ({}, "empty"),
        ([], "empty"),
        ({"w": 1.0}, "not_a_tensor"),
        ({"w": None}, "not_a_tensor"),
        ([("w", [1.0])], "not_a_tensor"),
        ([{"params": []}], "item"),
        ([1.0], "item"),
        (nn.ReLU(), "module_empty"),
        (nn.LazyLinear(3), "lazy"),
    ],
)
def test_what_is_no_set_of_named_tensors_is_refused(given, key):
    assert key_of(given) == key


def test_an_optimizer_is_refused():
    assert key_of(torch.optim.SGD(nn.Linear(1, 1).parameters())) == "kind"


def test_a_generator_that_was_read_is_empty_and_said_to_be():
    generator = nn.Linear(2, 2).parameters()
    list(generator)
    assert key_of(generator) == "empty"
    with pytest.raises(InputError, match="read only once"):
        Subject.of(generator)


def test_prefixes_of_wrappers_are_stripped_and_the_eager_module_is_found():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        subject = Subject.of(wrapped)
        assert list(subject.tensors) == ["0.weight", "0.bias"]
        assert subject.eager_module is model
        assert subject.module is wrapped
        assert subject.module_paths()[model[0]] == "0"
    assert subject.name_of("_orig_mod.module.0.bias") == "0.bias"
    assert Subject.of(model).eager_module is model


def test_a_compiled_part_makes_the_whole_compiled():
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)), nn.ReLU())
    assert list(Subject.of(model).tensors) == ["0.weight", "0.bias"]
    assert Subject.of(model).compiled
    in_place = nn.Linear(2, 2)
    assert not Subject.of(in_place).compiled
    in_place.compile()
    assert Subject.of(in_place).compiled


def test_a_child_that_is_merely_called_module_keeps_its_name():
    outer = nn.Module()
    outer.module = nn.Linear(2, 2)
    assert list(Subject.of(outer).tensors) == ["module.weight", "module.bias"]
    assert list(Subject.of(dict(outer.named_parameters())).tensors) == ["module.weight", "module.bias"]
    assert clean_name("a._orig_mod.b._checkpoint_wrapped_module.w") == "a.b.w"


def test_names_that_would_become_one_stay_apart():
    a, b = torch.ones(1), torch.zeros(1)
    tensors = Subject.of({"w": a, "_orig_mod.w": b}).tensors
    assert list(tensors) == ["w", "_orig_mod.w"]
    assert tensors["_orig_mod.w"] is b


def test_a_scripted_module_is_a_subject():
    scripted = torch.jit.script(nn.Linear(2, 2))
    assert list(Subject.of(scripted).tensors) == ["weight", "bias"]


def test_an_unknown_name_is_a_key_error_that_names_the_nearest():
    subject = Subject.of(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(KeyError) as caught:
        subject.name_of("0.wieght")
    assert isinstance(caught.value, UnknownName)
    assert str(caught.value) == "None of the 2 tensors is named '0.wieght'; the nearest name is '0.weight'."
