"""Small files that claim to be, or would become, enormous: for each a reader's name and what makes it so."""

from __future__ import annotations

import json
import sqlite3
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGE = 1 << 60


def _text(name: str, content: str | bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)

    return make


def _json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """`name` may be a pattern; `change` edits the value in place or returns another."""

    def make(folder: Path) -> None:
        (file,) = folder.glob(name)
        value = json.loads(file.read_bytes())
        changed = change(value)
        file.write_text(json.dumps(value if changed is None else changed))

    return make


def _header(
    name: str, header: bytes, *, length: int | None = None, body: bytes = b""
) -> Callable[[Path], None]:
    """A safetensors file with that header, which says of itself that it is `length` bytes."""

    def make(folder: Path) -> None:
        (file,) = folder.glob(name)
        file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)

    return make


def _replay_of(shape: list[int]) -> Callable[[Path], None]:
    """Three tensors of that shape and of no bytes."""
    told = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    kinds = ("before", "after", "grad")
    header = json.dumps({f"token_embeddings.weight.{kind}": told for kind in kinds}).encode()
    return _header("tensors.safetensors", header)


def _tensor(shape: list[int], end: int) -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    return json.dumps({"token_embeddings.weight": entry}).encode()


def _sql(*statements: str | Callable[[sqlite3.Connection], None]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        connection = sqlite3.connect(folder / "run.sqlite")
        for statement in statements:
            connection.execute(statement) if isinstance(statement, str) else statement(connection)
        connection.commit()
        connection.close()

    return make


def _bytes_at(name: str, at: int, data: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at : at + len(data)] = data
        (folder / name).write_bytes(content)

    return make


def _instead(table: str, definition: str) -> tuple[str, ...]:
    return f"DROP TABLE {table}", definition


def _many_tensors(connection: sqlite3.Connection) -> None:
    """A thousand steps that stand far apart and hold nothing, of 200,000 tensors."""
    connection.execute("DELETE FROM tensors")
    connection.executemany(
        "INSERT INTO tensors VALUES (?, 'w', '[1]', '', 1, 0, 0, '', 0, 0)", ((i,) for i in range(200_000))
    )
    connection.execute("DELETE FROM steps")
    for table in ("16", "256", "4096"):
        connection.execute(f"DELETE FROM rollup_{table}")
        connection.execute(f"DELETE FROM scalar_rollup_{table}")
    connection.executemany("INSERT INTO steps VALUES (?, 0, x'', x'')", ((i * 3,) for i in range(1, 3000)))


def _zeros_in_histograms(connection: sqlite3.Connection) -> None:
    blob = struct.pack("<IB", 1 << 31, 8) + zlib.compress(bytes(128 << 20), 9)
    connection.execute("UPDATE histograms SET counts = ?", (blob,))


def _generated(expression: str) -> tuple[str, ...]:
    """Steps whose statistics are computed by SQLite when they are read."""
    return (
        "ALTER TABLE steps RENAME TO old",
        "CREATE TABLE steps (step INTEGER PRIMARY KEY, time REAL NOT NULL, scalars BLOB NOT NULL,"
        f" statistics BLOB GENERATED ALWAYS AS ({expression}) VIRTUAL)",
        "INSERT INTO steps (step, time, scalars) SELECT step, time, scalars FROM old",
        "DROP TABLE old",
    )


def _config_llama(**fields: Any) -> Callable[[Path], None]:
    return _json("config.json", lambda value: value.update(fields))


def _index_of_many(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    places = {f"w{i}": f"model-{i:06}.safetensors" for i in range(50_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _digits(count: int) -> str:
    return "9" * count


BOMBS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a TOML number of a million digits": (
        "config",
        _text("config.toml", f"[training]\nsteps = {_digits(10**6)}\n"),
    ),
    "a TOML hexadecimal number of a million digits": (
        "config",
        _text("config.toml", f"[training]\nsteps = 0x{'f' * 10**6}\n"),
    ),
    "TOML brackets without end": ("config", _text("config.toml", f"[training]\nsteps = {'[' * 10**6}")),
    "TOML keys without end": ("config", _text("config.toml", f"a{'.a' * 20_000} = 1\n")),
    "a model of 2^60 layers": ("config", _text("config.toml", f"[model]\nnum_layers = {HUGE}\n")),
    "a tokenizer with an id of 2^60": (
        "tokenizer",
        _json("tokenizer.json", lambda t: t["model"]["vocab"].update(zzz=HUGE)),
    ),
    "a tokenizer with an added id of 2^31": (
        "tokenizer",
        _json("tokenizer.json", lambda t: t["added_tokens"][0].update(id=2**31)),
    ),
    "a tokenizer that pads to 2^40": (
        "tokenizer",
        _json(
            "tokenizer.json",
            lambda t: t.update(
                padding={
                    "strategy": {"Fixed": 2**40},
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "a",
                }
            ),
        ),
    ),
    "a tokenizer of 200,000 equal merges": (
        "tokenizer",
        _json("tokenizer.json", lambda t: t["model"].update(merges=[["a", "b"]] * 200_000)),
    ),
    "a tokenizer whose pattern backtracks without end": (
        "tokenizer",
        _json(
            "tokenizer.json",
            lambda t: t.update(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [
                        {
                            "type": "Split",
                            "pattern": {"Regex": "(?:[a-z ]|[a-z ])*!"},
                            "behavior": "Isolated",
                            "invert": False,
                        },
                        {
                            "type": "ByteLevel",
                            "add_prefix_space": False,
                            "trim_offsets": True,
                            "use_regex": False,
                        },
                    ],
                }
            ),
        ),
    ),
    "JSON brackets without end": ("tokenizer", _text("tokenizer.json", "[" * 10**6)),
    "JSON objects without end": ("tokenizer", _text("tokenizer.json", '{"model":' * 10**6)),
    "a JSON number of a million digits": (
        "tokenizer",
        _text("tokenizer.json", f'{{"model": {{"vocab": {{"a": {_digits(10**6)}}}}}}}'),
    ),
    "300,000 equal merges of GPT-2": ("gpt2", _text("merges.txt", "#version: 0.2\n" + "a b\n" * 300_000)),
    "a shard of 2^60 tokens": ("shards", _json("header.json", lambda h: h["train"][0].update(tokens=HUGE))),
    "the same shard thirty thousand times": (
        "shards",
        _json("header.json", lambda h: h.update(train=h["train"] * 30_000)),
    ),
    "a vocabulary of 2^60": ("shards", _json("header.json", lambda h: h.update(vocab_size=HUGE))),
    "a safetensors header of 2^60 bytes": (
        "checkpoint",
        _header("*/model.safetensors", b"{}", length=HUGE),
    ),
    "a safetensors header of 99 MB that is not there": (
        "checkpoint",
        _header("*/model.safetensors", b"{}", length=99_000_000),
    ),
    "a tensor of 2^60 entries": (
        "checkpoint",
        _header("*/model.safetensors", _tensor([2**30, 2**30], 4 * HUGE)),
    ),
    "a tensor whose size overflows": (
        "checkpoint",
        _header("*/model.safetensors", _tensor([2**32, 2**32], 0)),
    ),
    "a tensor of 2^60 rows of nothing": (
        "checkpoint",
        _header("*/model.safetensors", _tensor([HUGE, 0], 0)),
    ),
    "safetensors brackets without end": ("checkpoint", _header("*/model.safetensors", b"[" * 10**6)),
    "a checkpoint of 2^60 parts": (
        "checkpoint",
        _json(
            "*/state.json", lambda s: s.update(parts={"count": HUGE, "split": {"model": {}, "optimizer": {}}})
        ),
    ),
    "a checkpoint of 99,999 parts that are not there": (
        "checkpoint",
        _json(
            "*/state.json",
            lambda s: s.update(parts={"count": 99_999, "split": {"model": {}, "optimizer": {}}}),
        ),
    ),
    "parts with tensors of 2^60 rows": (
        "checkpoint",
        _json(
            "*/state.json",
            lambda s: s.update(
                parts={
                    "count": 1,
                    "split": {"model": {"token_embeddings.weight": [HUGE, 2]}, "optimizer": {}},
                }
            ),
        ),
    ),
    "a generator's state without end": (
        "checkpoint",
        _json("*/state.json", lambda s: s["random"].update(cpu="00" * 10**6)),
    ),
    "a run's model of 2^60 layers": (
        "run",
        _json("checkpoints/*/state.json", lambda s: s["model"].update(num_layers=HUGE)),
    ),
    "a run's model of 2^60 positions": (
        "run",
        _json("checkpoints/*/state.json", lambda s: s["model"].update(context_length=HUGE)),
    ),
    "a run's model of 2^60 tokens": (
        "run",
        _json("checkpoints/*/state.json", lambda s: s["model"].update(vocab_size=HUGE)),
    ),
    "a run's model of 2^60 heads": (
        "run",
        _json("checkpoints/*/state.json", lambda s: s["model"].update(num_heads=HUGE, d_model=2 * HUGE)),
    ),
    "a metrics row of brackets": ("run", _text("metrics.jsonl", "[" * 10**6 + "\n")),
    "a metrics row with a number of a million digits": (
        "run",
        _text("metrics.jsonl", f'{{"step": {_digits(10**6)}}}\n'),
    ),
    "a Llama of 2^60 layers": ("llama", _config_llama(num_hidden_layers=HUGE)),
    "a Llama of 2^60 positions": ("llama", _config_llama(max_position_embeddings=HUGE)),
    "a Llama of 2^60 tokens": ("llama", _config_llama(vocab_size=HUGE)),
    "a Llama of 2^60 heads": (
        "llama",
        _config_llama(num_attention_heads=HUGE, hidden_size=2 * HUGE, num_key_value_heads=1, head_dim=2),
    ),
    "a Llama in 50,000 files that are not there": ("llama", _index_of_many),
    "a replay of 2^60 columns of nothing": ("replay", _replay_of([0, HUGE])),
    "a replay of 2^60 rows of nothing": ("replay", _replay_of([HUGE, 0])),
    "a replay whose step is brackets": ("replay", _text("step.json", "[" * 10**6)),
    "a run file of 2^32 pages": ("record", _bytes_at("run.sqlite", 28, struct.pack(">I", 2**32 - 1))),
    "a run file with a page of 64 KiB": ("record", _bytes_at("run.sqlite", 16, b"\x00\x01")),
    "a run file whose free pages never end": (
        "record",
        _bytes_at("run.sqlite", 32, struct.pack(">II", 2, 2**32 - 1)),
    ),
    "statistics that are a gigabyte of zeros each": ("record", _sql(*_generated("zeroblob(1000000000)"))),
    "statistics that are half a gigabyte of zeros each": ("record", _sql(*_generated("zeroblob(500000000)"))),
    "200,000 tensors of empty steps": ("record", _sql(_many_tensors)),
    "histograms that unfold to 128 MB": ("record", _sql(_zeros_in_histograms)),
    "a view that recurses without end": (
        "record",
        _sql(
            "ALTER TABLE scalar_names RENAME TO old",
            "CREATE VIEW scalar_names AS WITH RECURSIVE r(id) AS (SELECT 0 UNION ALL SELECT id + 1 FROM r)"
            " SELECT id, 'n' || id AS name, 0 AS since FROM r",
        ),
    ),
    "an index with a condition of a gigabyte": (
        "record",
        _sql("CREATE INDEX i ON steps (step) WHERE length(zeroblob(1000000000)) > step"),
    ),
    "statistics that must pass a check of a gigabyte": (
        "record",
        _sql(
            "CREATE TABLE new (step INTEGER PRIMARY KEY, time REAL, scalars BLOB, statistics BLOB,"
            " CHECK (length(randomblob(1000)) > 0))",
            "INSERT INTO new SELECT * FROM steps",
            "DROP TABLE steps",
            "ALTER TABLE new RENAME TO steps",
        ),
    ),
    "a name that is no text in the schema": (
        "record",
        _sql("PRAGMA writable_schema = ON", "UPDATE sqlite_master SET sql = CAST(x'80818283' AS TEXT)"),
    ),
    "a trigger": (
        "record",
        _sql("CREATE TRIGGER t AFTER INSERT ON steps BEGIN SELECT zeroblob(1000000000); END"),
    ),
    "steps that are a virtual table": (
        "record",
        _sql(*_instead("steps", "CREATE VIRTUAL TABLE steps USING fts5(step, time, scalars, statistics)")),
    ),
    "records every 2^60 steps": ("record", _sql(f"UPDATE meta SET value = '{HUGE}' WHERE key = 'every'")),
    "a step of 2^62": ("record", _sql(f"UPDATE steps SET step = {2**62} WHERE step = 40")),
    "one document of 8 MB in one line": ("corpus", _text("corpus.txt", "a" * (8 << 20))),
    "end-of-text a million times": ("corpus", _text("corpus.txt", "<|endoftext|>" * 10**6 + "a")),
}
