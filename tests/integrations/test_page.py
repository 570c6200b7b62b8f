"""The page of integrations, its trainers too, which print times and hardware and so show no output."""

import logging
import re
from pathlib import Path

import pytest

from clinometer.record.read.reader import find_runs
from tests.integrations.recorded import info

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPENS_A_RUN_OF_ITS_OWN = ("wandb", "trackio", "swanlab")


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "docs/en/integrations.md").read_text(encoding="utf-8"))


def test_every_block_runs_in_order_with_the_real_packages(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names: dict[str, object] = {}
    for title, code in blocks():
        if "title=" in title:
            (tmp_path / title.split('"')[1]).write_text(code)
        elif not any(f"import {package}" in code for package in OPENS_A_RUN_OF_ITS_OWN):
            exec(compile(code, "integrations.md", "exec"), names)
    steps = {folder.name: info(folder)["last_step"] for folder in find_runs(tmp_path / "runs")}
    assert steps == {"accelerate": 4, "fabric": 8, "trainer": 8, "lightning": 16, "both": 8}
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("code", [code for _, code in blocks()[1:]], ids=lambda code: code.split()[1])
def test_an_example_is_at_most_ten_lines(code: str) -> None:
    assert len([line for line in code.splitlines() if line]) <= 10
