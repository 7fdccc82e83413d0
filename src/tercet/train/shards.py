"""A model in pieces: FSDP2, where each rank holds a part of every layer, of its gradient and of its moments."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tercet.model.folder import empty_model
from tercet.model.tercet import Tercet
from tercet.ranks import Ranks

# Lists of layers that are called one after the other and so are whole one at a time.  The fusion layers are not among
# them: all their keys and values are computed before the first one runs.
LAYERS = ("vision.blocks", "text.layers")


def shard(task: nn.Module) -> nn.Module:
    """Cut every parameter of `task` into as many parts as there are ranks, in place, and keep this rank's.

    The layers of the image and the text encoder are put together one at a time as they are needed, of student and
    teacher alike; what is left (embeddings, fusion layers, heads) for the length of a step.

    Args:
        task: on its device, the same on every rank.
    """
    device = next(task.parameters()).device.type
    mesh = init_device_mesh(device, (Ranks().world,))
    # A number cannot be cut.
    whole = {parameter for parameter in task.parameters() if parameter.ndim == 0}
    for name, part in task.named_modules():
        if isinstance(part, nn.ModuleList) and name.endswith(LAYERS):
            for layer in part:
                fully_shard(layer, mesh=mesh)
    fully_shard(task, mesh=mesh, ignored_params=whole)
    return task


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of a module are in pieces."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@torch.no_grad()
def reduce_whole(module: nn.Module) -> None:
    """Average over the ranks the gradients that FSDP leaves alone: those of parameters that are not in pieces."""
    for parameter in module.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= Ranks().world


@torch.no_grad()
def whole_model(model: Tercet) -> Tercet:
    """`model` itself, or where it is in pieces a copy put together on every rank, to measure or to save."""
    if not is_sharded(model):
        return model
    copy = empty_model(model.config)
    weights = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }
    copy.load_state_dict(weights, assign=True)
    copy.to(next(model.parameters()).device)
    copy.tokenizer, copy.answers, copy.objectives = model.tokenizer, model.answers, model.objectives
    copy.train(model.training)
    return copy
