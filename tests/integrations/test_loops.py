"""Two lines in anybody's loop: the run file they leave holds what the loop did, and the loop did the same."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import clinometer
from clinometer.messages import InputError
from clinometer.record.read.reader import RunFile, find_runs

PLAIN = """
import torch
from torch import nn
{first}
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
{second}
for step in range(20):
    x = torch.randn(32, 8)
    loss = nn.functional.mse_loss(model(x), x[:, :4])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item().hex())
"""

NANOGPT_LIKE = """
import torch
from torch import nn
from torch.nn import functional as F
{first}

torch.manual_seed(1)
V, S, D, H = 65, 32, 32, 4

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(S, D)
        self.h = nn.ModuleList(Block() for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, ids, targets):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, V), targets.view(-1))

model = GPT()
decay = [p for p in model.parameters() if p.dim() >= 2]
rest = [p for p in model.parameters() if p.dim() < 2]
groups = [dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]
optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
{second}
text = torch.randint(0, V, (4096,)).sort().values
for step in range(12):
    for micro in range(2):
        starts = torch.randint(0, 4000, (4,))
        ids = torch.stack([text[i : i + S] for i in starts])
        loss = model(ids, torch.stack([text[i + 1 : i + S + 1] for i in starts])) / 2
        loss.backward()
        print(loss.item().hex())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
"""

TRANSFORMERS = """
import torch, transformers
{first}
torch.manual_seed(0)
config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=32)
model = transformers.GPT2LMHeadModel(config)
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
{second}
for step in range(6):
    ids = torch.randint(0, 50, (2, 16))
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item().hex())
"""


def run(script: str, folder: Path, watched: bool) -> subprocess.CompletedProcess:
    lines = ("import clinometer", "clinometer.watch(model, optimizer)") if watched else ("", "")
    path = folder / "my_script.py"
    path.write_text(textwrap.dedent(script).replace("{first}", lines[0]).replace("{second}", lines[1]))
    return subprocess.run([sys.executable, path.name], cwd=folder, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    ("script", "tensors", "steps"), [(PLAIN, 4, 20), (NANOGPT_LIKE, 28, 12), (TRANSFORMERS, 28, 6)]
)
def test_two_lines_record_a_script_and_change_none_of_its_bits(
    tmp_path: Path, script: str, tensors: int, steps: int
) -> None:
    bare = run(script, tmp_path, watched=False)
    watched = run(script, tmp_path, watched=True)
    assert watched.stdout == bare.stdout
    said = [line for line in watched.stderr.splitlines() if line not in bare.stderr.splitlines()]
    assert len(said) == 1, watched.stderr  # where it is written, and no alert
    assert "clinometer view runs/my_script-1" in said[0].replace("\\", "/")
    (folder,) = find_runs(tmp_path / "runs")
    file = RunFile.open(folder)
    info = file.info()
    assert (info["state"], info["last_step"], info["tensor_count"]) == ("done", steps, tensors)
    printed = [float.fromhex(line) for line in bare.stdout.split()]
    parts = len(printed) // steps
    losses = np.array(printed).reshape(steps, parts).sum(1)
    recorded = file.scalars(["loss"])["loss"]["mean"]
    np.testing.assert_allclose(recorded, losses, rtol=1e-6)
    statistics = np.stack([file.row(step)["statistics"] for step in range(1, steps + 1)])
    assert statistics.shape == (steps, tensors, 8)
    assert (statistics[:, :, 0] > 0).mean() > 0.9  # gradients
    assert (statistics[:, :, 5] > 0).mean() > 0.9  # updates


@pytest.mark.parametrize(
    ("last_line", "state"),
    [
        ("", "done"),
        ("raise SystemExit(0)", "done"),
        ("try: raise ValueError\nexcept ValueError: pass", "done"),
        ("raise ValueError('an end')", "failed"),
        ("raise KeyboardInterrupt", "stopped"),
    ],
)
def test_the_run_file_says_how_the_program_ended(tmp_path: Path, last_line: str, state: str) -> None:
    script = PLAIN.format(first="import clinometer", second="clinometer.watch(model, optimizer)")
    (tmp_path / "my_script.py").write_text(script + last_line)
    subprocess.run([sys.executable, "my_script.py"], cwd=tmp_path, capture_output=True, check=False)
    info = RunFile.open(tmp_path / "runs" / "my_script-1").info()
    assert (info["state"], info["last_step"]) == (state, 20)


def test_a_script_from_standard_input_has_a_run_too(tmp_path: Path) -> None:
    script = PLAIN.format(first="import clinometer", second="clinometer.watch(model, optimizer)")
    subprocess.run(
        [sys.executable, "-"], input=script, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert RunFile.open(tmp_path / "runs" / "run-1").info()["last_step"] == 20


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_folder_that_holds_a_run_is_refused_and_the_run_is_kept(tmp_path: Path, capsys) -> None:
    model, optimizer = model_and_optimizer()
    with clinometer.watch(model, optimizer, tmp_path / "run"):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    with pytest.raises(InputError) as raised:
        clinometer.watch(model, optimizer, str(tmp_path / "run"))
    assert str(tmp_path / "run") in str(raised.value)
    assert RunFile.open(tmp_path / "run").info()["last_step"] == 1


def test_something_that_is_no_optimizer_leaves_no_live_run_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        clinometer.watch(nn.Linear(2, 2), "adam", tmp_path / "run")
    assert RunFile.open(tmp_path / "run").info()["state"] != "live"
    with pytest.raises(InputError):
        clinometer.watch(*model_and_optimizer(), to=[3])


def test_several_places_hear_the_same_numbers(tmp_path: Path) -> None:
    class Kept:
        def __init__(self) -> None:
            self.steps = []

        def begin(self, run): ...
        def tensors(self, tensors): ...
        def step(self, step, time, scalars, statistics):
            self.steps.append((step, statistics.copy()))

        def histograms(self, step, counts): ...
        def alert(self, alert): ...
        def weights(self, step, rows): ...
        def event(self, step, time, kind, data): ...
        def close(self, state): ...

    kept = Kept()
    model, optimizer = model_and_optimizer()
    with clinometer.watch(model, optimizer, [tmp_path / "run", kept], config={"lr": 0.1}, name="mine"):
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
    file = RunFile.open(tmp_path / "run")
    assert file.info()["config"] == {"lr": 0.1}
    assert file.info()["name"] == "mine"
    assert [step for step, _ in kept.steps] == [1, 2, 3]
    for step, statistics in kept.steps:
        np.testing.assert_array_equal(file.row(step)["statistics"], statistics)


def test_an_alert_is_printed_once_and_stands_in_the_file(tmp_path: Path, capsys) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with clinometer.watch(model, optimizer, tmp_path / "run"):
        for _ in range(40):
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            model[1].zero_grad()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "no optimizer moves them: 1.weight, 1.bias" in said[1]
    (alert,) = RunFile.open(tmp_path / "run").alerts()
    assert (alert["cause"], alert["tensors"]) == ("not-in-optimizer", ["1.weight", "1.bias"])
