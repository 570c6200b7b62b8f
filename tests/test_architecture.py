"""The arrows of the design: which room may import which."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_rooms_import_only_what_the_design_allows():
    importlinter = pytest.importorskip("importlinter.cli")
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        assert importlinter.lint_imports(config_filename=str(ROOT / ".importlinter"), no_cache=True) == 0
    finally:
        os.chdir(before)
