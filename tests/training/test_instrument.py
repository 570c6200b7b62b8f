"""The instrument on the command line: on a run, on a file, and on what is neither."""

import json
import textwrap

import pytest

from tests.training.conftest import SMALL, assert_refused

BROKEN = """
import torch
from helper_of_this_file import WIDTH

class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.second = torch.nn.Linear(WIDTH, 1)

    def forward(self, x):
        h = self.first(x)
        h = h.detach()
        return self.second(torch.tanh(h)).pow(2).mean()

def broken():
    model = Encoder()
    x = torch.randn(5, WIDTH)
    return model, lambda: model(x)

def healthy():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    x = torch.randn(5, 3)
    return model, lambda: model(x).pow(2).mean(), torch.optim.SGD(model.parameters(), lr=0.1)

def frozen():
    model, loss, _ = healthy()
    model[0].requires_grad_(False)
    return model, loss

class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 2

def wrong():
    w = torch.ones(4, requires_grad=True)
    return {"w": w}, lambda: Wrong.apply(w).pow(2).sum()

def overwritten():
    layer = torch.nn.Linear(WIDTH, WIDTH)
    def loss():
        h = layer(torch.ones(3, WIDTH)).exp()
        h += 1
        return h.sum()
    return layer, loss

def fails_when_called():
    layer = torch.nn.Linear(WIDTH, WIDTH)
    return layer, lambda: layer(torch.ones(3, WIDTH + 1)).sum()

def beyond():
    table = torch.nn.Embedding(3, WIDTH)
    return table, lambda: table(torch.tensor([5])).sum()

def talks():
    print("loading the data")
    return broken()

def needs(width, depth=2):
    return None

def nothing():
    return None

def fails():
    return 1 / 0
"""


EXP = "h = layer(torch.ones(3, WIDTH)).exp()"
SHAPES = "layer(torch.ones(3, WIDTH + 1)).sum()"


@pytest.fixture
def script(tmp_path):
    (tmp_path / "helper_of_this_file.py").write_text("WIDTH = 4\n")
    path = tmp_path / "a_training_script.py"
    path.write_text(textwrap.dedent(BROKEN))
    return path


def test_a_broken_file_is_diagnosed_to_its_line_with_exit_code_1(call, script):
    line = script.read_text().splitlines().index("        h = h.detach()") + 1
    code, out, _ = call("diagnose", f"{script}:broken")
    assert code == 1
    assert f"a_training_script.py:{line}" in out
    assert "h = h.detach()" in out
    assert "first.weight" in out
    code, out, _ = call("--language", "zh", "diagnose", f"{script}:broken")
    assert code == 1
    assert f"a_training_script.py:{line}" in out
    assert "梯度" in out


def test_a_healthy_file_has_exit_code_0(call, script):
    assert call("diagnose", f"{script}:healthy")[0] == 0
    assert call("check", f"{script}:healthy")[0] == 0


def test_what_is_cut_from_the_loss_is_no_success_of_a_check_and_diagnose_is_named(call, script):
    code, out, _ = call("check", f"{script}:broken")
    told = " ".join(out.split())
    assert code == 1
    assert "2 of 4 tensors get no gradient (None)" in told
    assert "clinometer diagnose" in told
    assert "✓" not in out


def test_frozen_tensors_do_not_spoil_a_check(call, script):
    assert call("check", f"{script}:frozen")[0] == 0


def test_a_wrong_backward_is_found_with_exit_code_1(call, script):
    code, out, _ = call("check", f"{script}:wrong")
    assert code == 1
    assert "Wrong" in out
    assert "w" in out


@pytest.mark.parametrize("command", ["diagnose", "check"])
def test_a_value_written_over_is_one_paragraph_with_both_lines(call, script, command):
    source = script.read_text().splitlines()
    needs, writes = (source.index(f"        {text}") + 1 for text in (EXP, "h += 1"))
    result = call(command, f"{script}:overwritten")
    assert_refused(result, f"{script.name}:{needs} ({EXP})", f"{script.name}:{writes} (h += 1)")


@pytest.mark.parametrize("command", ["diagnose", "check"])
def test_a_closure_that_fails_is_told_with_its_line(call, script, command, monkeypatch):
    line = script.read_text().splitlines().index("    return layer, lambda: " + SHAPES) + 1
    monkeypatch.chdir(script.parent)
    assert_refused(call(command, f"{script.name}:fails_when_called"), f"line {line} failed: RuntimeError")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{script}", ["function"]),
        ("{script}:missing", ["missing", "broken, healthy, frozen"]),
        ("{script}:nothing", ["nothing", "NoneType", "(params, closure)"]),
        ("{script}:fails", ["ZeroDivisionError", "line"]),
        ("{script}:needs", ["needs() in", "needs arguments (width)", "takes none"]),
        ("{script}:beyond", ["run from 5 to 5, but the table has 3 rows"]),
        ("nowhere.py:f", ["nowhere.py"]),
        ("a_module:broken", ["file.py:function"]),
        ("no/run", ["no/run"]),
    ],
)
def test_what_cannot_be_looked_at_is_explained(call, script, target, words):
    for command in ("diagnose", "check"):
        assert_refused(call(command, target.format(script=script)), *words)


def test_the_result_is_printed_as_json_and_nothing_else_is(call, script):
    code, out, err = call("diagnose", f"{script}:talks", "--json")
    found = json.loads(out)
    assert code == 1
    assert not found["healthy"]
    assert found["findings"][0]["cause"] == "cut"
    assert found["tensors"]["first.weight"]["where"]["line"] > 1
    assert "loading the data" in err
    code, out, _ = call("check", f"{script}:healthy", "--json")
    assert (code, json.loads(out)["passed"]) == (0, True)


@pytest.mark.parametrize("arguments", [["diagnose"], ["check", "--wrong"], ["check", "a", "b"]])
def test_wrong_use_of_a_command_points_at_its_own_help(call, arguments):
    assert_refused(call(*arguments), f"clinometer {arguments[0]} --help")


def test_a_file_that_does_not_parse_is_explained_with_its_line(call, tmp_path):
    (tmp_path / "bad.py").write_text("x = 1\ndef f(:\n")
    assert_refused(call("diagnose", f"{tmp_path / 'bad.py'}:f"), "bad.py", "line 2", "SyntaxError")


def test_a_trained_run_is_healthy_and_its_gradients_are_right(call, corpus):
    assert call("train", "--corpus", corpus, "--run", "run", *SMALL, "--training.steps=3")[0] == 0
    code, out, _ = call("diagnose", "run")
    assert code == 0, out
    assert "12 " in out  # tensors of a one-layer model
    code, out, _ = call("check", "run")
    assert code == 0, out
