"""What the READMEs show runs, and says what they say it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(readme):
    return re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_python_of_the_readme_runs_and_the_planted_line_is_found(readme, tmp_path):
    instrument, watched, model = blocks(readme)
    for code in (instrument, watched, model):
        path = tmp_path / "model.py"
        path.write_text(code, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, path],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if code is watched:
            assert (tmp_path / "runs" / "model-1" / "run.sqlite").exists()
        if code is instrument:
            line = code.splitlines().index("        h = h.detach()") + 1
            shown = (ROOT / readme).read_text(encoding="utf-8")
            for text in (f"model.py:{line}", "✗ 4 "):
                assert text in done.stdout
                assert text in shown


def test_both_readmes_link_to_files_that_exist():
    for readme in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / readme).read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (ROOT / target).exists(), f"{readme}: {target}"
