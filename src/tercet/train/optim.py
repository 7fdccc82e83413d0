"""Parameter groups, the optimizer, and learning rate and alpha as functions of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tercet.config import ObjectivesConfig, OptimConfig
from tercet.distributed import Ranks, is_sharded, local_part

# The published warm-up moves once every so many steps, within the first epoch only.
PUBLISHED_WARMUP_STRIDE = 100
# Position tables and single tokens are not maps between spaces; decaying them only pulls them to 0.
UNDECAYED = ("class_token", "position_embed", "temperature")


def decays(name: str, parameter: nn.Parameter, published: bool) -> bool:
    """Whether weight decay applies to a parameter.

    By default matrices alone decay.  The published grouping exempts vectors and biases only, so that position
    embeddings, class token and temperature do decay there.
    """
    if published:
        return parameter.ndim != 1 and not name.endswith(".bias")
    return parameter.ndim > 1 and not any(part in name for part in UNDECAYED)


def build_optimizer(model: nn.Module, config: OptimConfig, published: bool) -> torch.optim.AdamW:
    """AdamW over the parameters that take a gradient: those that decay, those that do not, and the scalars.

    Scalars have a group of their own because FSDP does not shard them, and a fused step takes tensors of one kind.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = (parameter.ndim == 0, not decays(name, parameter, published))
            groups.setdefault(group, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[number, spared], "weight_decay": 0.0 if spared else config.weight_decay}
            for number, spared in sorted(groups)
        ],
        lr=config.warmup_lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """Norm of all gradients together, `[]`, on their device; of sharded ones, over the shards of all ranks."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    shards = [local_part(gradient) for gradient in gradients if is_sharded(gradient)]
    norm = _norm([gradient for gradient in gradients if not is_sharded(gradient)])
    if not shards:
        return norm
    squares = _norm(shards).square()
    return (norm.to(squares).square() + Ranks().sum(squares)).sqrt()


def _norm(gradients: list[Tensor]) -> Tensor:
    if not gradients or any(gradient.device.type != "cpu" for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients, foreach=True)
    # PyTorch's norm reads memory at a third of the rate that a product does on a CPU.
    flat = [gradient.flatten() for gradient in gradients]
    return torch.stack([one.dot(one) for one in flat]).sum().sqrt()


def step_clipped(optimizer: torch.optim.Optimizer, grad_norm: Tensor, limit: float | None) -> None:
    """Step with gradients clipped to a norm of `limit`; change nothing where their norm is not finite.

    The fused kernel scales while it reads the gradients, which saves the passes over them that clipping would take,
    and decides on the device whether to step, so that the host does not wait.

    Args:
        optimizer: of `build_optimizer`.
        grad_norm: `[]`, of `gradient_norm`.
        limit: the largest norm; None does not clip.
    """
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    if any(gradient is not None and is_sharded(gradient) for gradient in gradients):
        # A step of DTensors does not take the plain tensors below.
        if not bool(torch.isfinite(grad_norm)):
            return
        if limit is not None:
            shards = [local_part(gradient) for gradient in gradients if gradient is not None]
            torch._foreach_mul_(shards, (limit / grad_norm).clamp(max=1.0))  # pyright: ignore[reportPrivateImportUsage]
    else:
        # As torch.amp's scaler sets them: what the fused step divides gradients by, and whether to skip it.
        optimizer.grad_scale = None if limit is None else (grad_norm / limit).clamp(min=1.0)  # type: ignore[attr-defined]
        optimizer.found_inf = (~torch.isfinite(grad_norm)).float()  # type: ignore[attr-defined]
    optimizer.step()


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of a step.

    Args:
        config: the schedule.
        step: from 0, over the whole run.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: epochs in the run.
    """
    if config.schedule == "published":
        return _published_learning_rate(config, step, steps_per_epoch, epochs)
    if step < config.warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    total = max(1, steps_per_epoch * epochs - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / total)
    return _cosine(config, progress)


def _published_learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The published hybrid: a warm-up in strides of 100 steps within epoch 0, then a cosine by epoch.

    The rate set after step `i` is first used at step `i + 1`; a short first epoch cuts the warm-up off.
    """
    epoch, index = divmod(step, steps_per_epoch)
    if epoch > 0:
        return _cosine(config, epoch / epochs)
    strides = min(max(0, index - 1) // PUBLISHED_WARMUP_STRIDE, config.warmup_epochs)
    if config.warmup_epochs and strides < config.warmup_epochs:
        return config.warmup_lr + strides * (config.lr - config.warmup_lr) / config.warmup_epochs
    return config.lr


def _cosine(config: OptimConfig, progress: float) -> float:
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def alpha_at(config: ObjectivesConfig, step: int, steps_per_epoch: int) -> float:
    """Weight of the teacher's soft targets at a step: it rises linearly over the first `alpha_warmup` epochs."""
    ramp = config.alpha_warmup * steps_per_epoch
    return config.alpha if step >= ramp else config.alpha * step / ramp
