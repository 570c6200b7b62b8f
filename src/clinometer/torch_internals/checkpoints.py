"""Checkpoints of torch.utils.checkpoint: their errors, and the function that they run again."""

from __future__ import annotations

from typing import Any

from clinometer.torch_internals.look_up import look_up

_CheckpointError = look_up("utils.checkpoint.CheckpointError")


def is_checkpoint_error(error: BaseException) -> bool:
    """Whether a checkpoint found that its block computed something else the second time."""
    return _CheckpointError is not None and isinstance(error, _CheckpointError)


def recomputed_function(error: BaseException) -> Any:
    """The function that the checkpoint which raised an error was running again; None if it is not seen."""
    trace, found = error.__traceback__, None
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_filename.replace("\\", "/").endswith("torch/utils/checkpoint.py"):
            recompute = getattr(frame.f_locals.get("frame"), "recompute_fn", None)
            if recompute is not None:
                cells = zip(recompute.__code__.co_freevars, recompute.__closure__ or (), strict=True)
                found = next((cell.cell_contents for name, cell in cells if name == "fn"), found)
        trace = trace.tb_next
    return found
