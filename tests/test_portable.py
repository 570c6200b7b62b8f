"""What other systems lack is not asked for: every module loads without it, and what uses it does without."""

import subprocess
import sys

SCRIPT = """
import importlib, os, pkgutil, signal, sys
import anywidget, rich.console, torch, uvicorn
from pathlib import Path

for name in ("fcntl", "grp", "posix", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "getuid", "geteuid", "sched_getaffinity", "sched_setaffinity", "sysconf",
             "uname", "register_at_fork", "wait3", "killpg", "getpgid", "setsid", "mkfifo", "fchmod"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGCHLD", "setitimer"):
    if hasattr(signal, name):
        delattr(signal, name)

absent = lambda path: str(path).startswith(("/proc", "/sys"))
real_open, real_read = open, Path.read_text
def read_text(self, *args, **kwargs):
    if absent(self):
        raise FileNotFoundError(self)
    return real_read(self, *args, **kwargs)
Path.read_text = read_text

import clinometer
for module in pkgutil.walk_packages(clinometer.__path__, "clinometer."):
    if module.name.rpartition(".")[2] not in ("__main__", "transformers", "lightning"):  # seconds to load
        importlib.import_module(module.name)

from clinometer.lm.decoding import _room_for
from clinometer.monitoring.environment import environment, memory_in_use
from clinometer.record.format.filesystem import is_network
from clinometer.record.format.process import is_alive, this_process
from clinometer.text.encoding import _locked
from clinometer.commands.doctor import _memory_bytes
from clinometer.training.run.out_of_memory import _limit_and_taken
from clinometer.training.run.run_folder import describe_environment

assert memory_in_use(None) is None
assert _memory_bytes() == 0
assert _limit_and_taken("cpu") == (1, 0)
assert _room_for([torch.zeros(3)])
assert this_process()["started"] is None
assert is_network(Path.cwd()) is False
assert describe_environment()["packages"]["clinometer"] == clinometer.__version__
with _locked(Path("lock")) as held:
    assert held is False
model = torch.nn.Linear(2, 2)
with clinometer.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), "run") as watch:
    model(torch.ones(1, 2)).sum().backward()
print("fine")
"""


def test_every_module_loads_and_a_run_is_written_without_what_only_unix_has(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
