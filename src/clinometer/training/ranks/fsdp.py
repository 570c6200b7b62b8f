"""FSDP2 for the language model: each rank holds a part of every weight, and gathers a block to compute it.

Weights are float32 and are gathered as float32; autocast then makes bfloat16 of them where one process does,
so that the numbers are those of one process. Weights outside of the blocks (embeddings, last norm, head) are
one group, gathered from the beginning of a step to its end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clinometer.lm.model import TransformerLM, draw_weights
from clinometer.lm.transformer_config import TransformerConfig
from clinometer.training.ranks.rows import rows_of
from clinometer.training.ranks.world import World


def sharded_model(config: TransformerConfig, generator: torch.Generator, world: World) -> TransformerLM:
    """`TransformerLM(config, generator)` in parts: no rank ever holds more than one whole weight."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    with torch.device("meta"):
        model = TransformerLM(config)
    for block in model.layers:
        fully_shard(block, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)
    register_fsdp_forward_method(model, "loss")
    model.to_empty(device=world.device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in draw_weights(config, generator):
            keep_part(parameters[name], weight)
    return model


def keep_part(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's rows of `whole` into a parameter that is split by rows."""
    first, last = rows_here(parameter)
    part: Any = parameter
    part.to_local().copy_(whole[first:last])


def rows_here(parameter: Tensor) -> tuple[int, int]:
    """First and last (exclusive) row of a tensor split by rows that this rank holds."""
    distributed: Any = parameter
    mesh = distributed.device_mesh
    return rows_of(parameter.shape[0], mesh.get_local_rank(), mesh.size())
