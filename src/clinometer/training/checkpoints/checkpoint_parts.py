"""The tensors of a checkpoint, however many ranks wrote it, whole or as a rank of any number holds them.

Ranks that hold tensors in rows (FSDP2) write their own rows, each in one file of a kind:

    model-00001-of-00003.safetensors, …     rank 0 has rows [0, c) of each split tensor, rank 1 [c, 2c), …
                                            with c = ⌈rows / 3⌉, and what is not split
    state.json                              "parts": how many there are, and the whole shape of what is split

Why not torch.distributed.checkpoint's own files: its planner sends pickled objects between ranks and its
`.metadata` is a pickle, also beside safetensors files; reading one can run code that somebody else wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from clinometer.messages import InputError
from clinometer.training.ranks.rows import rows_of


def split_shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The whole shapes of those that are DTensors, all of them split by rows over one mesh."""
    found = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "device_mesh"):
            distributed: Any = tensor
            (placement,) = distributed.placements
            assert placement.is_shard(0), placement
            found[name] = list(tensor.shape)
    return found


class Stored:
    """Tensors of one kind, "model" or "optimizer", in a checkpoint with this state.json.

    Raises `InputError` if a file does not hold what state.json lists.
    """

    def __init__(self, path: Path, state: Mapping[str, Any], kind: str) -> None:
        self._path, self._kind = path, kind
        parts = state.get("parts")
        self._count = 1 if parts is None else int(parts["count"])
        self._split: dict[str, list[int]] = {} if parts is None else parts["split"][kind]
        self._whole = parts is None
        if self._count * 2 != len(state["files"]):
            raise InputError("checkpoint.torn", path=path / "state.json")
        self._open: dict[Path, Any] = {}

    def file(self, rank: int) -> Path:
        if self._whole:
            return self._path / f"{self._kind}.safetensors"
        return self._path / f"{self._kind}-{rank + 1:05}-of-{self._count:05}.safetensors"

    def shapes(self) -> dict[str, list[int]]:
        """The whole shape of every tensor, by its name; none is read."""
        file = self._opened(0)
        here = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return here | self._split

    def like(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor; those that belong to a DTensor of `held`, by name or "<name>.<key>", in its parts."""
        if self._whole:
            if not any(hasattr(tensor, "device_mesh") for tensor in held.values()):
                try:
                    return load_file(self.file(0))
                except SafetensorError as error:  # the hash was right: it was written so
                    raise InputError("checkpoint.malformed", path=self.file(0), what=error) from None
            file = self._opened(0)
            shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return {key: self._one(key, shape, _owner(key, held)) for key, shape in shapes.items()}
        file = self._opened(0)
        whole = [key for key in file.keys() if key not in self._split]  # noqa: SIM118
        found = {key: file.get_tensor(key) for key in whole}
        return found | {key: self._one(key, shape, _owner(key, held)) for key, shape in self._split.items()}

    def _one(self, key: str, shape: list[int], owner: Tensor | None) -> Tensor:
        if owner is None or not hasattr(owner, "device_mesh") or list(owner.shape) != shape:
            return self.rows(key, 0, shape[0], shape) if shape else self._read(0, key, None)
        from torch.distributed.tensor import DTensor

        distributed: Any = owner
        mesh = distributed.device_mesh
        first, last = rows_of(shape[0], mesh.get_local_rank(), mesh.size())
        part = self.rows(key, first, last, shape).to(owner.device)
        return DTensor.from_local(
            part, mesh, distributed.placements, run_check=False, shape=owner.shape, stride=owner.stride()
        )

    def rows(self, key: str, first: int, last: int, shape: list[int]) -> Tensor:
        """Rows [first, last) of a tensor of that whole shape, from whichever files have them."""
        pieces = []
        for rank in range(self._count):
            begin, end = rows_of(shape[0], rank, self._count)
            low, high = max(first, begin), min(last, end)
            if low < high or (rank == 0 and first == last):
                piece = self._read(
                    rank, key, slice(low - begin, max(low, high) - begin) if low < high else slice(0, 0)
                )
                if list(piece.shape[1:]) != shape[1:] or len(piece) != max(0, high - low):
                    raise InputError("checkpoint.foreign", path=self.file(rank), what=key)
                pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read(self, rank: int, key: str, rows: slice | None) -> Tensor:
        try:
            file = self._opened(rank)
            return file.get_tensor(key) if rows is None else file.get_slice(key)[rows]
        except (SafetensorError, KeyError):
            raise InputError("checkpoint.foreign", path=self.file(rank), what=key) from None

    def _opened(self, rank: int) -> Any:
        path = self.file(rank)
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, "pt")
            except (SafetensorError, OSError):
                raise InputError("checkpoint.torn", path=path) from None
        return self._open[path]


def _owner(key: str, held: Mapping[str, Tensor]) -> Tensor | None:
    return held.get(key, held.get(key.rpartition(".")[0]))
