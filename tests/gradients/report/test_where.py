import contextlib
import functools
import json
import linecache
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import clinometer
from clinometer.gradients.report.places import Where, user_frame
from clinometer.gradients.sandbox.code_origin import is_instrument, is_machinery


class Watching(TorchFunctionMode):
    """As the instrument will use it: at every torch call, where is the user?"""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.__name__, user_frame(sys._getframe(1), op=func.__name__, module="m")))
        return func(*args, **(kwargs or {}))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        h = self.linear(x)
        return h.detach()  # the cut


def test_a_call_deep_inside_torch_is_placed_on_the_users_line():
    model = Encoder()
    with Watching() as watching:
        model(torch.ones(2))
    where = dict(watching.seen)["linear"]
    assert where.file == __file__
    assert where.source == "h = self.linear(x)"
    assert where.function == "Encoder.forward"
    assert where.label == f"test_where.py:{where.line}"
    assert (where.op, where.module) == ("linear", "m")
    assert dict(watching.seen)["detach"].source == "return h.detach()  # the cut"


def test_the_stack_is_the_users_calls_outermost_first():
    def loss():
        return user_frame()

    def closure():
        return functools.reduce(lambda a, b: loss(), [1, 2])

    with contextlib.ExitStack():
        where = closure()
    assert [frame.function for frame in where.stack[-3:]] == ["closure", "<lambda>", "loss"]
    assert (where.file, where.line, where.function) == where.stack[-1]
    assert not any("/functools.py" in frame.file for frame in where.stack)


def run(code, filename):
    space = {"user_frame": user_frame, "torch": torch}
    exec(compile(code, filename, "exec"), space)
    return space["where"]


def test_code_without_a_file_is_somebodys_code(monkeypatch):
    command = "import this  # what Python 3.13 keeps of python -c\n"
    monkeypatch.setitem(linecache.cache, "<string>", (len(command), None, [command], "<string>"))
    where = run("where = user_frame()", "<string>")
    assert (where.file, where.line, where.source) == ("<string>", 1, "")


@pytest.mark.parametrize(
    ("filename", "label"),
    [
        ("<ipython-input-3-abc>", "<ipython-input-3-abc>:2"),
        ("/tmp/ipykernel_12/34.py", "<cell>:2"),
    ],
)
def test_a_notebooks_line_is_quoted_from_linecache(filename, label):
    source = "x = 1\nwhere = user_frame()  # here\n"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    try:
        where = run(source, filename)
        assert where.source == "where = user_frame()  # here"
        assert where.label == label
    finally:
        del linecache.cache[filename]


def test_installed_packages_are_the_users_but_torch_and_the_standard_library_are_not():
    import hypothesis

    assert not is_machinery(hypothesis.__file__)
    for file in (torch.__file__, nn.__file__, functools.__file__, contextlib.__file__, json.__file__):
        assert is_machinery(file)
    assert is_machinery("<frozen runpy>")
    assert not is_machinery(__file__)


def test_our_own_model_is_a_users_model_and_the_instrument_is_not():
    import clinometer.gradients.sandbox.subject
    import clinometer.lm.functional

    assert not is_machinery(clinometer.lm.functional.__file__)
    assert is_machinery(clinometer.gradients.sandbox.subject.__file__)


@pytest.mark.parametrize("room", ["gradients", "monitoring", "integrations"])
def test_no_file_of_the_instrument_is_the_users_however_deep_it_lies(room):
    files = list((Path(clinometer.__file__).parent / room).rglob("*.py"))
    assert files
    assert all(is_instrument(str(file)) and is_machinery(str(file)) for file in files)
    assert not is_instrument(clinometer.__file__)
    assert not is_instrument(f"{Path(clinometer.__file__).parent / room}_of_mine/model.py")


def test_a_model_in_an_installed_package_is_placed_inside_that_package(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "somelib"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def forward(x, look):\n    return look()\n")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    import somelib  # pyright: ignore[reportMissingImports]

    where = somelib.forward(1, lambda: user_frame(sys._getframe(1)))
    assert where.label == "somelib/__init__.py:2"
    assert where.source == "return look()"


def test_finding_the_frame_reads_no_file(monkeypatch):
    def no_reading(*_):
        raise AssertionError("read a file")

    monkeypatch.setattr(linecache, "getline", no_reading)
    assert user_frame() is not None


def test_a_place_is_ready_for_json():
    where = user_frame(op="detach")
    assert where is not None
    data = json.loads(json.dumps(where.to_dict()))
    assert data["source"] == 'where = user_frame(op="detach")'
    assert data["op"] == "detach"
    assert data["stack"][-1] == {"file": __file__, "line": where.line, "function": where.function}
    assert Where("gone.py", 3).to_dict()["source"] == ""


def test_without_a_users_frame_there_is_no_place():
    space = {"user_frame": user_frame}
    code = compile("where = user_frame()", "<frozen nobody>", "exec")
    thread = threading.Thread(target=exec, args=(code, space))  # a fresh stack: only the standard library's
    thread.start()
    thread.join()
    assert space["where"] is None


class Many:
    def forward(self):
        (where,) = [user_frame() for _ in range(1)]
        return where


def test_a_comprehension_has_the_name_of_its_function_on_every_python():
    """From 3.12 on it is no call of its own."""
    where = Many().forward()
    assert where.function == "Many.forward"
    assert [frame.function for frame in where.stack[-2:]] == [
        "test_a_comprehension_has_the_name_of_its_function_on_every_python",
        "Many.forward",
    ]
    space = {"user_frame": user_frame}
    exec(compile("(where,) = [user_frame() for _ in range(1)]", "cell.py", "exec"), space)
    assert space["where"].function == "<module>"
