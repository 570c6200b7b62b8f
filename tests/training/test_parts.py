"""A checkpoint written by any number of ranks is read by any other number: each gets its rows."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from clinometer.messages import InputError
from clinometer.training.checkpoints.checkpoint_parts import Stored
from clinometer.training.ranks.rows import rows_of


def written(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> dict:
    """What `count` ranks leave, and the part of state.json that tells of it."""
    whole = {"step": torch.tensor(3.0)}
    files = {}
    for rank in range(count):
        rows = {n: t[slice(*rows_of(len(t), rank, count))].contiguous() for n, t in tensors.items()}
        for kind in ("model", "optimizer"):
            name = f"{kind}-{rank + 1:05}-of-{count:05}.safetensors"
            save_file({**rows, **(whole if rank == 0 else {})}, folder / name)
            files[name] = {}
    shapes = {n: list(t.shape) for n, t in tensors.items()}
    return {"files": files, "parts": {"count": count, "split": {"model": shapes, "optimizer": shapes}}}


@given(
    rows=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    wrote=st.integers(1, 8),
    reads=st.integers(1, 8),
)
def test_every_rank_gets_its_rows_from_whichever_files_have_them(rows, wrote, reads):
    tensors = {f"t{i}": torch.arange(n * 3.0).view(n, 3) + 100 * i for i, n in enumerate(rows)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored = Stored(folder, written(folder, tensors, wrote), "model")
        whole = stored.like({})
        assert float(whole.pop("step")) == 3.0
        assert whole.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(whole[key], tensor)
            for rank in range(reads):
                first, last = rows_of(len(tensor), rank, reads)
                assert torch.equal(stored.rows(key, first, last, list(tensor.shape)), tensor[first:last])


def test_what_does_not_hold_together_is_refused(tmp_path):
    state = written(tmp_path, {"a": torch.zeros(4, 2)}, 2)
    with pytest.raises(InputError) as error:  # a count that no file bears out is not counted to
        Stored(tmp_path, {**state, "parts": {**state["parts"], "count": 10**12}}, "model")
    assert error.value.key == "checkpoint.torn"
    for shape in ([6, 2], [4, 3], [4, 2, 1]):
        split = {"model": {"a": shape}, "optimizer": {}}
        stored = Stored(tmp_path, {**state, "parts": {"count": 2, "split": split}}, "model")
        with pytest.raises(InputError) as error:
            stored.like({})
        assert error.value.key == "checkpoint.foreign", shape
    split = {"model": {"b": [4, 2]}, "optimizer": {}}
    with pytest.raises(InputError):
        Stored(tmp_path, {**state, "parts": {"count": 2, "split": split}}, "model").like({})
