"""torch's private details are looked up in clinometer.torch_internals, and in no other place."""

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from clinometer import torch_support
from clinometer.commands import doctor
from clinometer.messages import LANGUAGES, say, sentences, set_language
from clinometer.torch_internals import look_up

SOURCE = Path(__file__).parent.parent / "src" / "clinometer"
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if "torch_internals" not in path.parts]

ALLOWED = {
    # Names of calls as a TorchFunctionMode meets them: compared, never looked up; a torch without one makes
    # no such call.
    "gradients/check/numerics/float64.py": {"_grouped_mm"},
    "gradients/trace/operations.py": {"_set_grad_enabled", "_amp"},
    "gradients/attribute/layer_handlers.py": {"_grouped_mm"},
    "gradients/diagnose/finiteness.py": {"_safe_softmax"},
    "gradients/diagnose/why_nonfinite.py": {"_safe_softmax"},
    # Names in the user's own modules that are looked for there.
    "gradients/diagnose/optional_modules.py": {"_reset_parameters", "_init_weights"},
    # The standard library's: NamedTuple, os._exit, _thread.
    "gradients/sandbox/interrupts.py": {"_thread"},
    "gradients/step/measures.py": {"_replace"},
    "gradients/attribute/result.py": {"_asdict"},
    "gradients/report/places.py": {"_asdict"},
    "monitoring/measure/statistics.py": {"_replace"},
    "distributed/heartbeat.py": {"_exit"},
    # Read from tuples that torch returns, as collections.namedtuple has them.
    "gradients/check/numerics/stop_gradients.py": {"_fields"},
}
FRAMES = {"f_locals", "co_name", "f_code"}
"""What is read from frames: a test of names of torch's own functions belongs to torch_internals.frames."""
WALKS = {
    # Frames of the user's code, or __deepcopy__, which is Python's protocol.
    "gradients/trace/grad_mode.py": {"f_code"},
    "gradients/attribute/parameter_views.py": {"f_code"},
    "gradients/trace/operations.py": {"f_code", "co_name"},
    "gradients/trace/forward_trace.py": {"f_code", "co_name"},
    "gradients/report/places.py": {"co_name", "f_code"},
    "gradients/sandbox/interrupts.py": {"f_code"},
}


def _torchs_own():
    x = torch.ones(1, requires_grad=True)
    things = [
        torch, torch.Tensor, x.untyped_storage(), (x * 2).grad_fn, torch.autograd.Function, nn.BatchNorm1d(2),
        nn.LSTM(2, 2), torch.optim.SGD([x], 0.1), torch.amp.GradScaler("cpu"), torch.ops.aten.add,
        torch.ops.aten.add.Tensor,
    ]  # fmt: skip
    return {name for thing in things for name in dir(thing) if is_private(name)}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and len(name) > 1


TORCHS = _torchs_own()
FURTHER = {"_forward_cls", "_unsharded_param", "_get_fsdp_state", "_orig_mod", "_saved_"}


def private_details(tree):
    """(line, name) of each private name that a file takes from something else than itself."""
    nodes = list(ast.walk(tree))
    own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr == "_getframe" and isinstance(node.value, ast.Name) and node.value.id == "sys":
                continue
            if (node.attr not in own) if mine else (node.attr in TORCHS or node.attr not in own):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in names if is_private(name))
        elif isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
            yield from ((node.lineno, part) for part in parts if is_private(part))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".")
            named = node.value in TORCHS | FURTHER
            dotted = parts[0] == "torch" and all(part.isidentifier() for part in parts)
            if named or (dotted and any(map(is_private, parts))):
                yield node.lineno, node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_file_uses_a_private_detail_of_torch(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(SOURCE).as_posix()
    # What is defined elsewhere in the package for subclasses is its own.
    found = {(line, detail) for line, detail in private_details(tree) if detail not in PACKAGES}
    assert [(line, detail) for line, detail in found if detail not in ALLOWED.get(name, ())] == []
    frames = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in FRAMES}
    assert frames <= WALKS.get(name, set()), name


def _defined_for_subclasses():
    found = set()
    for path in FILES:
        for kind in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(kind, ast.ClassDef):
                for n in kind.body:
                    if isinstance(n, ast.AnnAssign | ast.Assign):
                        targets = [n.target] if isinstance(n, ast.AnnAssign) else n.targets
                        found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found - TORCHS


PACKAGES = _defined_for_subclasses()


@pytest.mark.parametrize(
    "line",
    [
        "from torch._ops import OpOverload",
        "import torch._dynamo",
        "torch._C._are_functorch_transforms_active()",
        "storage._cdata",
        "tensor._version",
        'getattr(node, "_forward_cls", None)',
        '"torch._dynamo" in sys.modules',
        "from torch.autograd.graph import _engine_run_backward",
        "torch._foreach_norm(grads)",
        "_foreach_norm = torch._foreach_norm",
    ],
)
def test_the_search_finds(line):
    assert list(private_details(ast.parse(line)))


def test_this_torch_has_everything_that_is_looked_up():
    assert look_up.MISSING == []


def test_there_is_a_sentence_for_each_thing_that_may_be_missing():
    asked = set()
    for path in sorted((SOURCE / "torch_internals").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "look_up"
                and len(node.args) > 1
            ):
                asked.add(node.args[1].value)
    assert len(asked) >= 6
    for language in LANGUAGES:
        assert {f"torch.{feature}" for feature in asked} <= set(sentences(language))


LACKING = {
    "checkpoints": ["_C.DisableTorchFunction"],
    "functions": ["autograd.function.BackwardCFunction"],
    "transforms": ["_C._are_functorch_transforms_active"],
    "operators": ["_library.autograd"],
    "saved": ["_C._autograd._top_saved_tensors_default_hooks"],
    "engine": ["autograd.graph._engine_run_backward"],
    "versions": ["autograd.grad_mode._unsafe_preserve_version_counter"],
}
"""For each feature that has a sentence, what is hidden from it."""
QUIET = {
    "foreach": ["_foreach_norm", "_foreach_add_", "_foreach_mul_", "_foreach_copy_"],
    "fused": ["_fused_adamw_", "_fused_sgd_"],
    "flatten": ["_utils._flatten_dense_tensors", "_utils._unflatten_dense_tensors"],
    "hooks": ["nn.modules.module._has_any_global_hook"],
    "wrappers": ["utils._python_dispatch.is_traceable_wrapper_subclass"],
    "classes": ["nn.modules.dropout._DropoutNd", "nn.modules.batchnorm._BatchNorm"],
    "processor": ["cpu._is_amx_tile_supported", "cpu._is_avx512_bf16_supported"],
}
"""What has another way that needs no sentence."""

WORK = """
import json, operator, os, sys, warnings
import torch, torch._dynamo
from rich.console import Console
from torch import nn

def work(hidden):
    places = [(operator.attrgetter(path.rpartition(".")[0])(torch) if "." in path else torch,
               path.rpartition(".")[2]) for path in hidden]
    kept = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, _ in kept:
        delattr(place, name)
    import clinometer.torch_support
    for place, name, value in kept:  # torch itself needs it
        setattr(place, name, value)
    from clinometer.optim.adamw import AdamW
    from clinometer.optim.clipping import clip_grad_norm_
    from clinometer.torch_internals.look_up import MISSING

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.detach() * 2
        @staticmethod
        def backward(ctx, g):
            return 2 * g

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.rest = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(2, 2)
            self.dropout, self.zeroth = nn.Dropout(0.1), nn.Linear(3, 3)
        def forward(self, x):
            hidden = torch.utils.checkpoint.checkpoint(self.first, self.zeroth(x), use_reentrant=True)
            return self.second(Double.apply(self.dropout(hidden)).tanh())

    torch.manual_seed(0)
    model, x = Model(), torch.randn(5, 3)
    closure = lambda: model(x).square().mean()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        check = clinometer.check_gradients(model, closure)
        found = clinometer.diagnose(model, closure)
    assert found["rest.weight"].cause == "unused", found.render()
    assert found["first.weight"].status == "ok", found.render()
    assert check.healthy and check["first.weight"].passed, check.render()
    optimizer = AdamW(model.parameters(), lr=0.05)
    before = float(closure())
    for _ in range(3):
        optimizer.zero_grad()
        closure().backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert float(closure()) < before
    mine = [str(w.message) for w in told if str(w.message).startswith(f"torch {torch.__version__} ")]
    return MISSING, len(mine)

for feature, hidden in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    if os.fork() == 0:  # each in a process in which clinometer was not imported yet
        try:
            print(json.dumps([feature, *work(hidden)]), flush=True)
        except BaseException as error:
            import traceback
            print(json.dumps([feature, traceback.format_exc()[-1500:], 0]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def without():
    """For each feature of which a detail was hidden: what was noted as missing, and how many sentences."""
    environment = {**os.environ, "CLINOMETER_LANG": "en", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE.parent), *filter(None, sys.path)])
    ran = subprocess.run(
        [sys.executable, "-c", WORK, json.dumps(LACKING | QUIET)],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {feature: rest for feature, *rest in map(json.loads, ran.stdout.splitlines())}


@pytest.mark.parametrize("feature", [*LACKING, *QUIET])
def test_without_a_detail_the_feature_says_so_and_the_rest_works(without, feature):
    assert without[feature] == ([[feature], 1] if feature in LACKING else [[], 0])


def test_the_versions_that_are_named_are_those_that_are_run():
    root = SOURCE.parent.parent
    oldest, pinned, *_ = torch_support.TESTED_TORCH
    assert f"torch=={pinned}\n" in (root / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    run = (root / ".ci" / "run").read_text(encoding="utf-8")
    assert f"\ncompat {oldest} python3.12\n" in run
    assert "\ncompat newest python3.13\n" in run
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={oldest.removesuffix(".0")}"' in project
    for python in torch_support.TESTED_PYTHON:
        assert f"Programming Language :: Python :: {python}" in project
    for language in LANGUAGES:
        page = (root / "docs" / language / "reliability.md").read_text(encoding="utf-8")
        for release in (*torch_support.TESTED_TORCH, *torch_support.TESTED_PYTHON):
            assert release in page, (language, release)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_doctor_says_whether_these_versions_were_tested(language, monkeypatch):
    set_language(language)
    try:
        yes, no = (
            re.split("[:：]", say("torch.tested", torch="2.10.0", python="3.11", tested=tested))[1]
            for tested in (1, 0)
        )
        assert yes != no
        for tested, words in ((True, yes), (False, no)):
            monkeypatch.setattr(doctor, "is_tested", lambda tested=tested: tested)
            console = Console(file=io.StringIO(), width=200)
            doctor.doctor_command(console)
            said = console.file.getvalue()
            assert all(release in said for release in torch_support.TESTED_TORCH)
            assert words.strip() in said
    finally:
        set_language(None)


def test_this_torch_is_among_those_or_says_that_it_is_not():
    assert torch_support.is_tested("2.13.0+cpu", "3.11.7")
    assert not torch_support.is_tested("2.9.1", "3.11.7")
    assert not torch_support.is_tested("2.13.0", "3.10.2")
