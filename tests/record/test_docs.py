"""docs/*/run-file.md says what the file is, and its code runs."""

import re
import sqlite3
from pathlib import Path

import pytest

from clinometer.record.format import schema
from clinometer.vocabulary import STATISTICS
from tests.record.running import recorded

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_code_runs_and_every_table_and_column_is_described(tmp_path, language):
    text = (DOCS / language / "run-file.md").read_text(encoding="utf-8")
    recorded(tmp_path, 5)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        values = {"folder": tmp_path}
        exec(compile(block, "run-file.md", "exec"), values)
        assert values["run"].info()["state"] == "done"  # pyright: ignore
    connection = sqlite3.connect(tmp_path / "run.sqlite")
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (table,) in tables:
        if not re.fullmatch(r"scalar_rollup_(256|4096)", table):
            assert f"`{table}`" in text, table
        for _, column, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
            assert re.search(rf"\b{column}\b", text, re.ASCII), (table, column)
    for name in (*STATISTICS, *schema.WEIGHT_FIELDS):
        assert name in text, name
    assert f"{schema.ABSENT:X}" in text
    assert f"{schema.APPLICATION_ID:X}" in text
    assert re.search(rf"(version|版本) {schema.VERSION}\b", text.replace("\n", " "))
