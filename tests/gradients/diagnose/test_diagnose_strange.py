"""The strange cases that are no fault tables: wrappers, compiled models, closures with habits, no closure."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.messages import InputError


def x():
    return torch.ones(3, 4)


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, inputs):
        h = self.encoder(inputs)
        h = h.detach()
        return self.head(h)


def line_of(text, file=__file__):
    with open(file) as lines:
        return next(i for i, line in enumerate(lines, 1) if line.strip() == text)


def assert_cut(found, prefix=""):
    entry = found[prefix + "encoder.weight"]
    assert (entry.status, entry.cause) == ("none", "cut")
    assert (entry.where.file, entry.where.line) == (__file__, line_of("h = h.detach()"))
    assert entry.where.op == "detach"
    assert not found.healthy


def test_one_line_of_a_copied_llama_layer_is_named():
    class MLP(LlamaMLP):
        def forward(self, x):
            gate = self.act_fn(self.gate_proj(x))
            up = self.up_proj(x).detach()  # planted
            return self.down_proj(gate * up)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    )
    model.model.layers[1].mlp = MLP(model.config)
    tokens = torch.randint(0, 50, (2, 8))
    found = diagnose(model, lambda: model(input_ids=tokens, labels=tokens))
    (finding,) = [f for f in found.findings if f.severity == "fault"]
    assert finding.names == ("model.layers.1.mlp.up_proj.weight",)
    assert finding.where.line == line_of("up = self.up_proj(x).detach()  # planted")
    assert finding.where.module == "model.layers.1.mlp"
    assert "up = self.up_proj(x).detach()" in found.render()


def test_data_parallel_is_looked_through():
    model = nn.DataParallel(Cut())
    assert_cut(diagnose(model, lambda: model(x()).mean()))


def test_a_compiled_model_runs_as_python_and_says_so():
    model = torch.compile(Cut(), backend="eager")
    found = diagnose(model, lambda: model(x()).mean())
    assert_cut(found)
    assert "compiled" in found.render()


def test_functional_call_on_the_model_s_own_parameters():
    model = Cut()
    assert_cut(diagnose(model, lambda: functional_call(model, dict(model.named_parameters()), (x(),)).mean()))


def test_a_plain_dictionary_of_leaves():
    model = Cut()
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    assert_cut(diagnose(weights, lambda: functional_call(model, weights, (x(),)).mean()))


def test_tied_weights_answer_to_both_names():
    model = nn.Module()
    model.a, model.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    model.b.weight = model.a.weight
    found = diagnose(model, lambda: model.b(x()).detach().mean() + model.a(x()).mean())
    assert found.healthy
    assert found["b.weight"] is found["a.weight"]


def test_the_original_of_a_parametrization_is_named():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 1))
    found = diagnose(model, lambda: model[1](model[0](x()).detach()).mean())
    (finding,) = found.findings
    assert set(finding.names) == {
        "0.bias",
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    }
    assert finding.cause == "cut"


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_cut_inside_a_checkpoint_is_found_at_its_line(reentrant):
    from torch.utils.checkpoint import checkpoint

    first, last = nn.Linear(4, 4), nn.Linear(4, 1)

    def inner(h):
        return F.relu(first(h) - 100)  # dead

    model = nn.ModuleList([first, last])
    found = diagnose(
        model,
        lambda: last(checkpoint(inner, x().requires_grad_(), use_reentrant=reentrant) + x()).mean(),
    )
    entry = found["0.weight"]
    assert (entry.status, entry.cause) == ("zero", "dead-activation")
    assert entry.where.line == line_of("return F.relu(first(h) - 100)  # dead")


def test_a_closure_that_runs_its_own_backward_is_understood():
    model = nn.Linear(4, 1)

    def closure():
        model.zero_grad()
        loss = model(x()).square().mean()
        loss.backward()
        return loss

    found = diagnose(model, closure)
    assert found.healthy
    assert [found[n].status for n in found] == ["ok", "ok"]


def test_a_loss_from_outside_keeps_its_graph():
    model = nn.Linear(4, 1)
    loss = model(x()).square().mean()
    assert diagnose(model, lambda: loss).healthy
    loss.backward()
    assert model.weight.grad is not None


def test_a_graph_that_is_used_up_is_refused_with_a_sentence():
    model = nn.Linear(4, 1)
    loss = model(x()).square().mean()
    loss.backward()
    with pytest.raises(InputError, match="anew"):
        diagnose(model, lambda: loss)


def test_several_losses_added_up():
    model = Cut()
    assert_cut(diagnose(model, lambda: sum(model(x()).mean() * k for k in range(1, 4))))


def test_a_model_of_complex_numbers():
    weight = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    other = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    found = diagnose({"w": weight, "o": other}, lambda: (weight.detach() * other).abs().sum())
    assert (found["w"].cause, found["o"].status) == ("cut", "ok")


def test_many_parameters_and_one_line_are_one_finding():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)), nn.Linear(4, 1))
    found = diagnose(model, lambda: model[-1](model[:-1](x()).detach()).mean())
    (finding,) = found.findings
    assert len(finding.names) == 40
    assert "and 37 more" in found.render("en")
    assert "另有 37 个" in found.render("zh")


def test_what_is_silent_when_all_is_well():
    model = nn.Linear(4, 1)
    text = diagnose(model, lambda: model(x()).square().mean()).render("en")
    assert text.count("\n") == 0
    assert text.startswith("✓ Looked at 2 parameters (5 numbers)")
    assert text.endswith("Nothing was changed.")


def test_a_result_is_ready_for_json_and_for_a_notebook():
    model = Cut()
    found = diagnose(model, lambda: model(x()).mean())
    read = json.loads(json.dumps(found.to_dict()))
    assert read["healthy"] is False
    assert read["tensors"]["encoder.bias"]["cause"] == "cut"
    assert read["findings"][0]["where"]["source"] == "h = h.detach()"
    assert "h = h.detach()" in found._repr_html_()


def test_what_an_entry_says():
    model = Cut()
    entry = diagnose(model, lambda: model(x()).mean())["encoder.bias"]
    assert "detach() keeps the values" in entry.message
    assert "requires_grad_(False)" in entry.remedy
    assert entry.severity == "fault"


def test_a_closure_that_cannot_run_twice_keeps_the_line_of_the_backward():
    w = nn.Parameter(torch.zeros(4))
    batches = iter([torch.ones(4)])

    def closure():
        root = (w * next(batches)).sqrt()
        return torch.where(w > 0, root, w).sum()

    found = diagnose({"w": w}, closure)
    assert (found["w"].status, found["w"].cause) == ("non-finite", "backward")
    assert found["w"].where.op == "sqrt"


class TestWithoutAClosure:
    def test_before_any_backward(self):
        found = diagnose(nn.Linear(4, 1))
        assert {found[n].cause for n in found} == {"no-backward"}
        assert "diagnose(model, closure)" in found.render()

    def test_after_a_backward_that_did_not_reach_all(self):
        model = Cut()
        model(x()).mean().backward()
        found = diagnose(model)
        assert found["encoder.weight"].cause == "not-reaching-loss"
        assert found["head.weight"].status == "ok"

    def test_zeroed(self):
        model = nn.Linear(4, 1)
        model(x()).mean().backward()
        model.zero_grad(set_to_none=False)
        found = diagnose(model)
        assert {(found[n].status, found[n].cause) for n in found} == {("zero", "zeroed")}
        assert "most likely" in found.render("en")

    def test_frozen_and_computed(self):
        frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        computed = torch.ones(2, requires_grad=True) * 2
        found = diagnose({"frozen": frozen, "computed": computed})
        assert (found["frozen"].cause, found["computed"].cause) == ("frozen", "not-leaf")

    def test_a_hook_most_likely_took_it(self):
        model = nn.Linear(4, 1)
        model.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        model(x()).mean().backward()
        found = diagnose(model)
        assert found["weight"].cause == "cleared"
        assert found.healthy

    def test_not_finite(self):
        model = nn.Linear(4, 1)
        (model(x()) * float("inf")).mean().backward()
        found = diagnose(model)
        assert found["weight"].status == "non-finite"
        assert not found.healthy

    def test_the_optimizer_is_looked_at_too(self):
        model = Cut()
        model(x()).mean().backward()
        found = diagnose(model, optimizer=torch.optim.SGD(model.head.parameters(), 0.1))
        assert "not-in-optimizer" in {f.cause for f in found.findings}


@pytest.mark.parametrize("look", [diagnose, check_gradients])
def test_an_index_beyond_the_vocabulary_is_told_with_its_line_and_the_range(look):
    table = nn.Embedding(5, 4)
    ids = torch.tensor([1, 7])

    def loss():
        return table(ids).sum()

    with pytest.raises(IndexError, match="out of range") as caught:
        look(table, loss)
    (note,) = caught.value.__notes__
    assert "test_diagnose_strange.py:" in note
    assert "(return table(ids).sum())" in note
    assert "from 1 to 7, but the table has 5 rows" in note


def test_a_target_beyond_the_classes_is_told_and_ignored_ones_are_not_counted():
    model = nn.Linear(4, 3)
    targets = torch.tensor([0, -100, 3])
    with pytest.raises(IndexError, match="out of bounds") as caught:
        diagnose(model, lambda: F.cross_entropy(model(x()), targets))
    (note,) = caught.value.__notes__
    assert "from 0 to 3, but there are 3 classes" in note


def test_an_index_error_of_another_kind_is_left_as_it_is():
    model = nn.Linear(4, 3)
    with pytest.raises(IndexError) as caught:
        diagnose(model, lambda: model(x())[torch.tensor([9])].sum())
    assert not getattr(caught.value, "__notes__", ())
