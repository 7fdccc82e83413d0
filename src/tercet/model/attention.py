"""Scaled dot-product attention over heads.  The only place that calls PyTorch's."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tercet.model.dropout import drop

# cuDNN's attention is the fastest for images and for a batch of texts that reads them, but it plans anew for every
# shape, which takes a third of a second.  Masked texts, and the few rows of a last layer, come in many.
PLANNED_QUERIES = 16
UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class AttentionTap:
    """Keeps the attention weights of one layer, with their graph, for heatmaps.

    Attributes:
        weights: softmax probabilities `[batch, heads, queries, keys]` of the last pass; None before it.
    """

    weights: Tensor | None = None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    tap: AttentionTap | None = None,
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query: `[batch, heads, queries, head_width]`.
        key: `[batch, heads, keys, head_width]`.
        value: `[batch, heads, keys, head_width]`.
        mask: bool, broadcastable to `[batch, heads, queries, keys]`; True where a query may look.
        dropout: probability of dropping an attention weight.
        tap: where to keep the weights; written out step by step then, since the fused kernels do not return them.

    Returns:
        `[batch, heads, queries, head_width]`.
    """
    # No fused CPU kernel drops weights; what PyTorch falls back to scales queries and keys apart and copies both.
    written_out = tap is not None or (dropout > 0 and query.device.type == "cpu")
    if not written_out:
        if mask is None and _learns_in_bf16_on_a_cpu(query):
            return _Attention.apply(query, key, value)
        # An exported program must not learn how many queries there were.
        chooses = query.device.type == "cuda" and not torch.compiler.is_exporting()
        unplanned = chooses and (mask is not None or query.shape[2] < PLANNED_QUERIES)
        with sdpa_kernel(UNPLANNED) if unplanned else contextlib.nullcontext():
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    weights = attention_weights(query * query.shape[-1] ** -0.5, key, mask)
    if tap is not None:
        tap.weights = weights
    return drop(weights, dropout) @ value


def _learns_in_bf16_on_a_cpu(query: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.requires_grad
        and torch.is_grad_enabled()
    )


class _Attention(torch.autograd.Function):
    """Attention in bf16 by the CPU's fused kernel, and its gradients by the kernel for fp32.

    That for bf16 converts tile by tile and took half as long again (`docs/performance.md`); its gradients are rounded
    to bf16 on the way, these at the end alone.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        ctx.save_for_backward(query, key, value, attended, logsumexp)
        return attended

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor, ...]:
        query, key, value, attended, logsumexp = ctx.saved_tensors
        whole = (part.float() for part in (gradients[0], query, key, value, attended))
        of_whole = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*whole, logsumexp, 0.0, False)
        return tuple(gradient.to(query.dtype) for gradient in of_whole)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the keys, `[..., queries, keys]`.

    Args:
        query: `[..., queries, head_width]`, already scaled.
        key: `[..., keys, head_width]`.
        mask: bool, broadcastable to the result; True where a query may look.
    """
    logits = query @ key.transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1)


def split_heads(hidden: Tensor, heads: int) -> Tensor:
    """`[batch, tokens, width]` to `[batch, heads, tokens, head_width]`."""
    return hidden.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(hidden: Tensor) -> Tensor:
    """`[batch, heads, tokens, head_width]` to `[batch, tokens, width]`."""
    return hidden.transpose(1, 2).flatten(2)
