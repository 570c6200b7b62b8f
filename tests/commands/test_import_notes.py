"""An imported model that was smaller than it becomes here: it is said."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from clinometer.commands import import_


@pytest.mark.parametrize(
    ("description", "grouped", "tied"),
    [
        ({"num_attention_heads": 8}, False, False),
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}, False, False),
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, True, False),
        ({"num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True}, True, True),
    ],
)
def test_what_grows_when_it_is_imported_is_said(monkeypatch, tmp_path, description, grouped, tied):
    (tmp_path / "config.json").write_text(json.dumps(description), encoding="utf-8")
    monkeypatch.setattr(import_, "import_run", lambda *_: SimpleNamespace(path=tmp_path / "run"))
    console = Console(file=io.StringIO(), width=300)
    assert import_.import_command(console, tmp_path, tmp_path / "run", "x.txt") == 0
    said = console.file.getvalue()
    assert (f"shares {description.get('num_key_value_heads')} key and value head" in said) is grouped
    assert ("are one tensor" in said) is tied
