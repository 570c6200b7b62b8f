"""The reader of replayed steps: every view of a tensor equals a plain computation on the whole of it."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from clinometer.record.replays.replays import KINDS, Replay, replayed_steps, weight_key

SHAPES = {
    "matrix": (37, 23),
    "vector": (50,),
    "scalar": (),
    "cube": (5, 4, 6),
    "empty": (0, 3),
    "new": (3, 2),
}


@pytest.fixture
def replay(tmp_path, monkeypatch):
    """A hand-written folder; `new` has its first step, `vector` is SGD's, `scalar` has no state."""
    monkeypatch.setenv("CLINOMETER_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    tensors, state = {}, {}
    for name, shape in SHAPES.items():
        for key in ("before", "after", "grad"):
            tensors[f"{name}.{key}"] = rng.normal(size=shape).astype(np.float32)
        kept = {"vector": ["momentum_buffer"], "scalar": []}.get(name, ["exp_avg", "exp_avg_sq"])
        state[name] = kept
        for key in kept:
            if name != "new":
                tensors[f"{name}.{key}"] = rng.normal(size=shape).astype(np.float32)
    return write(tmp_path / "run" / "replays" / "step-00000137", tensors, state)


def write(path, tensors, state, **info):
    path.mkdir(parents=True)
    save_file(tensors, path / "tensors.safetensors")
    size = (path / "tensors.safetensors").stat().st_size
    info = {
        "format": 1,
        "names": list(state),
        "state": state,
        "files": {"tensors.safetensors": {"bytes": size}},
    } | info
    (path / "step.json").write_text(json.dumps(info))
    found = Replay.at(path)
    assert found is not None
    return found, tensors


def plain(tensors, name, kind):
    """The tensor as float64, two-dimensional."""
    if kind == "update":
        whole = tensors[f"{name}.after"].astype(np.float64) - tensors[f"{name}.before"]
    elif kind == "weight":
        whole = tensors[f"{name}.after"]
    elif kind == "exp_avg" and f"{name}.momentum_buffer" in tensors:
        whole = tensors[f"{name}.momentum_buffer"]
    else:
        whole = tensors.get(f"{name}.{kind}", np.zeros(SHAPES[name]))
    whole = whole.astype(np.float64)
    return whole.reshape(whole.shape[0] if whole.ndim else 1, math.prod(whole.shape[1:]))


def has(name, kind):
    return not (kind == "exp_avg_sq" and name == "vector") and not (
        kind.startswith("exp") and name == "scalar"
    )


@pytest.mark.parametrize("name", [n for n in SHAPES if n != "empty"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(256, 256), (7, 5), (1, 1), (50, 2), (2, 50)])
def test_blocks_are_plain_means_and_single_entries_are_signed(replay, name, kind, height, width):
    found, tensors = replay
    if not has(name, kind):
        with pytest.raises(KeyError):
            found.matrix(name, kind)
        return
    for rows, cols in ((None, None), ((1, 30), (2, 21)), ((0, 1), (0, 1))):
        whole = plain(tensors, name, kind)
        told = found.matrix(name, kind, rows, cols, height=height, width=width)
        r0, r1, c0, c1 = *told["rows"], *told["cols"]
        assert (
            (r0, r1) == (0, whole.shape[0])
            if rows is None
            else (min(rows[0], len(whole)), min(rows[1], len(whole)))
        )
        part = whole[r0:r1, c0:c1]
        values, (down, across) = told["values"], told["block"]
        assert values.dtype == np.float32
        assert values.shape[0] <= height
        assert values.shape[1] <= width
        assert values.shape == (math.ceil(part.shape[0] / down), math.ceil(part.shape[1] / across))
        for i in range(values.shape[0]):
            for j in range(values.shape[1]):
                block = part[i * down : (i + 1) * down, j * across : (j + 1) * across]
                wanted = block[0, 0] if down == across == 1 else np.abs(block).mean()
                assert values[i, j] == pytest.approx(wanted, rel=1e-6)
        assert told["shape"] == list(SHAPES[name])
        if part.size:
            index, value = tuple(told["largest"]["index"]), told["largest"]["value"]
            assert abs(value) == np.abs(part).max()
            assert len(index) == len(SHAPES[name])
            assert whole.reshape(SHAPES[name])[index] == value
        else:
            assert told["largest"] is None


def test_an_empty_tensor_has_an_empty_matrix(replay):
    told = replay[0].matrix("empty", "grad")
    assert told["values"].size == 0
    assert told["largest"] is None


def test_an_entry_that_is_not_a_number_is_the_largest(tmp_path):
    grad = np.arange(12, dtype=np.float32).reshape(3, 4)
    grad[1, 2] = np.nan
    tensors = {f"w.{key}": grad for key in ("before", "after", "grad")}
    found, _ = write(tmp_path / "step-00000001", tensors, {"w": []})
    told = found.matrix("w", "grad", height=2, width=2)
    assert told["largest"]["index"] == [1, 2]
    assert math.isnan(told["largest"]["value"])
    assert np.isnan(told["values"]).sum() == 1


@pytest.mark.parametrize(
    ("name", "index"),
    [("matrix", (36, 22)), ("vector", (49,)), ("scalar", ()), ("cube", (4, 3, 5)), ("new", (2, 1))],
)
def test_an_entry_is_what_the_file_holds(replay, name, index):
    found, tensors = replay
    told = found.entry(name, index)
    for key in ("before", "after", "grad"):
        assert told[key] == float(tensors[f"{name}.{key}"][index])
    assert told["exp_avg"] == (
        float(plain(tensors, name, "exp_avg").reshape(SHAPES[name])[index]) if has(name, "exp_avg") else None
    )
    assert (told["exp_avg_sq"] is None) == (not has(name, "exp_avg_sq"))
    if name == "new":  # before its first step an optimizer's moments are zero
        assert told["exp_avg"] == told["exp_avg_sq"] == 0.0
    for wrong in ((*index, 0), tuple(i + 1 for i in index) or (1,), tuple(-1 for _ in index) or (0, 0)):
        with pytest.raises(IndexError):
            found.entry(name, wrong)


def test_what_is_not_there_is_none_or_a_key_error(replay, tmp_path):
    found, _ = replay
    run = tmp_path / "run"
    assert replayed_steps(run) == [137]
    assert replayed_steps(tmp_path / "nowhere") == []
    assert Replay.open(run, 137).names == list(SHAPES)
    assert Replay.open(run, 136) is None
    assert found.weight("matrix", (0, 0)) is None
    for name, kind in (("matrices", "grad"), ("matrix", "gradient"), ("matrix", "before.x")):
        with pytest.raises(KeyError):
            found.matrix(name, kind)


def test_a_weight_is_found_by_name_and_index_and_no_name_is_a_path(replay):
    found, _ = replay
    (found.path / "weights").mkdir()
    for name, index in (("matrix", (3, 5)), ("../../../etc/passwd", (0,)), ("", ())):
        key = weight_key(name, index)
        assert len(key) == 21
        assert "/" not in key
        (found.path / "weights" / key).write_text(json.dumps({"name": name, "index": list(index)}))
        assert found.weight(name, index)["name"] == name
    assert found.weight("matrix", (3, 6)) is None


@pytest.mark.parametrize("damage", ["cut", "no step.json", "not JSON", "format", "no tensors"])
def test_what_is_not_whole_is_not_opened(replay, damage):
    path = replay[0].path
    step, tensors = path / "step.json", path / "tensors.safetensors"
    match damage:
        case "cut":
            tensors.write_bytes(tensors.read_bytes()[:-1])
        case "no step.json":
            step.unlink()
        case "not JSON":
            step.write_text("{")
        case "format":
            step.write_text(step.read_text().replace('"format": 1', '"format": 2'))
        case "no tensors":
            tensors.unlink()
    assert Replay.open(path.parent.parent, 137) is None


def test_a_replay_pruned_while_it_is_looked_at_is_a_key_error(replay):
    found, _ = replay
    (found.path / "tensors.safetensors").unlink()
    with pytest.raises(KeyError):
        found.matrix("matrix", "grad")
    with pytest.raises(KeyError):
        found.entry("matrix", (0, 0))


def with_shares(path, shares, norms):
    """A replay of len(shares) tensors, and what each token adds to them."""
    names = list("abcdefgh")[: len(shares)]
    tensors = {f"{name}.before": np.zeros(2, np.float32) for name in names}
    path.mkdir(parents=True)
    save_file({"shares": np.asarray(shares, np.float32)}, path / "tokens.safetensors")
    save_file(tensors, path / "tensors.safetensors")
    files = {p.name: {"bytes": p.stat().st_size} for p in path.iterdir()}
    told = {"format": 1, "names": names, "files": files}
    told["tensors"] = {name: {"grad_norm": norm} for name, norm in zip(names, norms, strict=True)}
    (path / "step.json").write_text(json.dumps(told))
    return Replay.at(path)


def test_a_token_tells_the_tensors_it_added_most_to_strongest_first(tmp_path):
    shares = np.arange(5 * 2 * 3, dtype=np.float64).reshape(5, 2, 3)
    shares[0, 1, 2], shares[3, 1, 2] = np.inf, np.nan
    found = with_shares(tmp_path / "step-00000001", shares, [2.0, 0.0, 34.0, 1.0, "Infinity"])
    assert found.token(1, 2) == [
        {"name": "a", "norm": math.inf, "share": None},
        {"name": "e", "norm": 29.0, "share": None},
        {"name": "c", "norm": 17.0, "share": 0.5},
        {"name": "b", "norm": 11.0, "share": None},
    ]
    assert [one["name"] for one in found.token(0, 1, most=2)] == ["e", "d"]
    for place in ((2, 0), (0, 3), (-1, 0), (0, -1)):
        with pytest.raises(IndexError):
            found.token(*place)


def test_an_earlier_replay_does_not_say_what_a_token_moved_and_half_a_file_is_none(replay, tmp_path):
    assert not replay[0].by_token
    assert replay[0].token(0, 0) is None
    found = with_shares(tmp_path / "step-00000001", np.ones((2, 2, 2)), [1.0, 1.0])
    tokens = found.path / "tokens.safetensors"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    assert Replay.at(found.path) is None
    tokens.unlink()
    assert Replay.at(found.path) is None
    with pytest.raises(KeyError):  # pruned since
        found.token(0, 0)


def test_the_reader_needs_no_torch():
    code = "import sys, clinometer.record.replays.replays; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_large_matrix_is_read_fast(tmp_path):
    import time

    big = np.random.default_rng(0).normal(size=(20_000, 768)).astype(np.float32)
    found, _ = write(
        tmp_path / "step-00000001", {f"w.{k}": big for k in ("before", "after", "grad")}, {"w": []}
    )
    began = time.process_time()
    told = found.matrix("w", "grad", rows=(5_000, 5_200), cols=(100, 300))
    zoomed = time.process_time() - began
    assert np.array_equal(told["values"], big[5_000:5_200, 100:300])
    began = time.process_time()
    found.matrix("w", "update")
    whole = time.process_time() - began
    assert zoomed < 1.0, zoomed  # milliseconds of computing
    assert whole < 10.0, whole
