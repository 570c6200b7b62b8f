"""A test that signals, kills, forks or limits a process does so to one that it has started itself.

In pytest's own process a signal that comes late, or a limit that stays, ends a worker and all its tests.
Such code stands in modules that are run as `python -m tests.…`, or in the text of a script.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FORBIDDEN = {
    "os": {"_exit", "abort", "fork", "forkpty"},
    "signal": {"alarm", "pthread_kill", "raise_signal", "setitimer", "signal"},
    "resource": {"prlimit", "setrlimit"},
    "faulthandler": {"dump_traceback_later", "_sigsegv", "_sigabrt"},
}
OF_ANOTHER = {"kill", "killpg", "pidfd_open"}
"""Of `os`: allowed where the first argument is a process's `pid`."""


def test_no_test_signals_kills_forks_or_limits_pytests_own_process():
    modules = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in TESTS.rglob("*.py")}
    assert len(modules) > 150
    assert dangers(modules) == []


def name_of(path):
    return ".".join(("tests", *path.relative_to(TESTS).with_suffix("").parts)).removesuffix(".__init__")


def dangers(modules):
    """What test files do to their own process, themselves or by calling another module's function."""
    found = {}
    calls = {}
    for module, tree in modules.items():
        names = imported(tree)
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in tree.body:
            if isinstance(node, ast.If) and "__main__" in ast.dump(node.test):
                continue
            key = module, getattr(node, "name", "<module>")
            found.setdefault(key, []).extend(forbidden(node, names))
            calls.setdefault(key, set()).update(
                (module, name) if module_of is None and name in functions else (module_of, name)
                for module_of, name in called(node, names)
            )
    while True:  # until no function is found any more that calls one that does it
        more = {
            key: [f"{m}.{n}" for m, n in calls[key] if found.get((m, n))] for key in found if not found[key]
        }
        more = {key: value for key, value in more.items() if value}
        if not more:
            break
        found.update(more)
    return [
        f"{module}.{function}: {what}"
        for (module, function), reasons in found.items()
        if module.rpartition(".")[2].startswith(("test_", "conftest"))
        for what in reasons
    ]


def imported(tree):
    """What the names of a module stand for: (module, name), with no name for a module itself."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: (alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return names


def meant(part, names):
    """(module, name) that a name or an attribute stands for; no module for one of the same file."""
    if isinstance(part, ast.Name):
        return names.get(part.id, (None, part.id))
    if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in names:
        module, name = names[part.value.id]
        return module if name is None else f"{module}.{name}", part.attr
    return None


def called(node, names):
    return {found for part in ast.walk(node) if (found := meant(part, names)) is not None}


def forbidden(node, names):
    found = set()
    for part in ast.walk(node):
        module, name = meant(part, names) or (None, None)
        if name in FORBIDDEN.get(module, ()):
            found.add(f"{module}.{name}")
        if not isinstance(part, ast.Call):
            continue
        found |= {"preexec_fn" for word in part.keywords if word.arg == "preexec_fn"}
        if isinstance(part.func, ast.Attribute) and part.func.attr == "get_context":
            found |= {"fork" for given in part.args if getattr(given, "value", None) == "fork"}
        module, name = meant(part.func, names) or (None, None)
        if module == "os" and name in OF_ANOTHER and getattr(part.args[0], "attr", None) != "pid":
            found.add(f"os.{name}")
    return sorted(found)


@pytest.mark.parametrize(
    "line",
    [
        "import os\ndef test_x(): os.kill(os.getpid(), 15)",
        "import os\ndef test_x(): os.kill(0, 15)",
        "import os\ndef test_x(): os._exit(0)",
        "import os\ndef test_x(): os.fork()",
        "from os import fork\ndef test_x(): fork()",
        "def test_x():\n    import signal\n    signal.raise_signal(2)",
        "import signal as s\ndef test_x(): s.signal(s.SIGTERM, s.SIG_IGN)",
        "import resource\ndef test_x(): resource.setrlimit(resource.RLIMIT_AS, (1, 1))",
        "import subprocess\ndef test_x(): subprocess.run(['a'], preexec_fn=print)",
        "import multiprocessing\ndef test_x(): multiprocessing.get_context('fork')",
        "from tests.helper import die\ndef test_x(): die()",
        "from tests import helper\ndef test_x(): helper.die()",
        "from tests.helper import die\ndef send(): die()\ndef test_x(): send()",
    ],
)
def test_the_search_finds_what_it_is_for(line):
    helper = "import os\ndef die(): os._exit(1)\nif __name__ == '__main__': die()"
    assert dangers({"tests.test_a": ast.parse(line), "tests.helper": ast.parse(helper)})


@pytest.mark.parametrize(
    "line",
    [
        "import os\ndef test_x(process): os.kill(process.pid, 15)",
        "import os, signal\ndef test_x(process): os.killpg(process.pid, signal.SIGINT)",
        "from tests import helper\ndef test_x(): helper.fine()",
        "from tests.helper import fine\ndef test_x(): fine()",
        "def test_x(): run('import os; os._exit(1)')",
    ],
)
def test_another_process_may_be_signalled(line):
    helper = "import os\ndef die(): os._exit(1)\ndef fine(): pass\nif __name__ == '__main__': die()"
    assert dangers({"tests.test_a": ast.parse(line), "tests.helper": ast.parse(helper)}) == []
