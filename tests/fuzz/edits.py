"""Files from a hostile or careless hand: a good one, edited. Strategies of hypothesis, so failures shrink."""

from __future__ import annotations

import copy
import json
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SHARE = st.floats(0, 1, exclude_max=True)
"""A place, as a share of what there is: it stays meaningful when the file is another."""

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [0, -1, 1, 2, 7, 255, 65_536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30]
    ),
    st.sampled_from([0.0, -0.0, 0.5, -1.5, 1e-320, 1e38, 1e300, float("inf"), float("-inf"), float("nan")]),
    st.sampled_from(
        ["", " ", "..", "../../x", "/etc/passwd", "\x00", "\n", "nan", "1e9", "😀", "a" * 5000, "{x}"]
    ),
    st.text(max_size=8),
    st.integers(),
    st.just([]),
    st.just({}),
    st.just([[]]),
    st.just({"": {}}),
    st.just([0] * 50),
)
"""A JSON value where another was expected."""

ODD_BYTES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"\x00" * 16, b"\xff" * 16, b"[" * 3000, b'{"a":' * 3000, b"\xef\xbb\xbf", b"\r\n", b'"', b"\\"]
    ),
)

_byte_edit = st.one_of(
    st.tuples(st.just("flip"), SHARE, st.integers(0, 7)),
    st.tuples(st.just("cut"), SHARE, st.none()),
    st.tuples(st.just("remove"), SHARE, st.integers(1, 64)),
    st.tuples(st.just("insert"), SHARE, ODD_BYTES),
    st.tuples(st.just("replace"), SHARE, ODD_BYTES),
    st.tuples(st.just("repeat"), SHARE, st.integers(1, 4000)),
)
BYTE_EDITS = st.lists(_byte_edit, min_size=1, max_size=5)

_value_edit = st.tuples(
    st.sampled_from(["set", "set", "set", "delete", "rename", "add", "wrap"]),
    st.lists(SHARE, min_size=1, max_size=8),
    ODD,
)
VALUE_EDITS = st.lists(_value_edit, min_size=1, max_size=3)


def edited_bytes(data: bytes, edits: list[tuple[str, float, Any]]) -> bytes:
    """`data` with each edit made in turn."""
    content = bytearray(data)
    for kind, share, what in edits:
        at = int(len(content) * share)
        if kind == "flip" and content:
            content[at] ^= 1 << what
        elif kind == "cut":
            del content[at:]
        elif kind == "remove":
            del content[at : at + what]
        elif kind == "insert":
            content[at:at] = what
        elif kind == "replace":
            content[at : at + len(what)] = what
        elif kind == "repeat":
            content[at:at] = content[at : at + what]
    return bytes(content)


def edited_value(value: Any, edits: list[tuple[str, list[float], Any]]) -> Any:
    """A tree of JSON values with other values, other keys, without some or with more of them."""
    value = copy.deepcopy(value)
    for kind, path, value_of in edits:
        odd = copy.deepcopy(value_of)  # the next edit may change it
        holder: Any = None
        key: Any = None
        node = value
        for share in path:
            places = (
                list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            )
            if not places:
                break
            holder, key = node, places[int(len(places) * share)]
            node = holder[key]
        if holder is None:
            value = odd
        elif kind == "set":
            holder[key] = odd
        elif kind == "delete":
            del holder[key]
        elif kind == "wrap":
            holder[key] = [node]
        elif isinstance(holder, dict):
            holder[str(odd)[:40]] = holder.pop(key) if kind == "rename" else odd
        else:
            holder.append(odd)
    return value


def edited_json(data: bytes, edits: list[tuple[str, list[float], Any]]) -> bytes:
    return json.dumps(edited_value(json.loads(data), edits)).encode("utf-8", "surrogatepass")


def edited_safetensors(data: bytes, edits: list[tuple[str, list[float], Any]]) -> bytes:
    """The header edited as JSON and its length put right, so that the edit is what a reader meets."""
    (length,) = struct.unpack("<Q", data[:8])
    header = edited_json(data[8 : 8 + length], edits)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


FILE_EDITS = st.one_of(
    st.tuples(st.just("bytes"), BYTE_EDITS),
    st.tuples(st.just("values"), VALUE_EDITS),
    st.tuples(st.just("all"), ODD_BYTES),
)
"""How one file is changed: byte by byte, by its values, or for something else altogether."""


def edited_file(data: bytes, how: tuple[str, Any], by_value: Callable[[bytes, Any], bytes]) -> bytes:
    kind, edits = how
    if kind == "all":
        return edits
    return edited_bytes(data, edits) if kind == "bytes" else by_value(data, edits)


def as_bytes(data: bytes, _: Any) -> bytes:
    """A file without values of its own: only its bytes are edited."""
    return data


SQL_EDITS = st.lists(
    st.tuples(
        SHARE, SHARE, SHARE, st.one_of(ODD, ODD_BYTES).filter(lambda v: not isinstance(v, (list, dict)))
    ),
    min_size=1,
    max_size=4,
)


def edit_database(path: Path, edits: list[tuple[float, float, float, Any]]) -> None:
    """Other values in cells of a SQLite file: well-formed, and not what the reader expects."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    try:
        tables = sorted(
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if not name.startswith("sqlite_")
        )
        for table_at, column_at, row_at, value in edits:
            table = tables[int(len(tables) * table_at)]
            columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
            column = columns[int(len(columns) * column_at)]
            (rows,) = connection.execute(f'SELECT COUNT(*) FROM "{table}"').fetchone()
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                value = float(value)
            if isinstance(value, str):
                value = value.encode("utf-8", "replace").decode()
            where = f'rowid = (SELECT rowid FROM "{table}" LIMIT 1 OFFSET {int(rows * row_at)})'
            try:
                connection.execute(f'UPDATE "{table}" SET "{column}" = ? WHERE {where}', (value,))
            except sqlite3.Error:  # a rule of the schema forbids it, or a table without rowid
                try:
                    connection.execute(f'UPDATE "{table}" SET "{column}" = ?', (value,))
                except sqlite3.Error:
                    continue
        connection.commit()
    finally:
        connection.close()
