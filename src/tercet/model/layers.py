"""Attention, MLP and the layers of both transformers."""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

EMBEDDING_STD = 0.02  # of ViT's and BERT's embedding tables at the start, whatever the width
BASE_WIDTH = 768

# cuDNN's attention is the fastest on a GPU, but it takes a third of a second to plan each new shape.  Masked texts and
# the few rows of a last layer come in many shapes.
MIN_PLANNED_QUERIES = 16
UNPLANNED_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

MIN_ONEDNN_WORK = 1 << 24  # multiplications below which starting a oneDNN kernel costs more than it saves


def init_std(width: int) -> float:
    """Standard deviation of the matrices of a stack at the start: 0.02 at the published width of 768, as published.

    The deviation of a product grows with the square root of the width.  Narrow models are scaled up, so that their
    queries find their keys as soon as those of the base model do.
    """
    return EMBEDDING_STD * (BASE_WIDTH / width) ** 0.5


def take_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """The tokens at `rows` `[batch, slots]` of `hidden` `[batch, tokens, width]`: `[batch, slots, width]`."""
    return hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


class Encoder(nn.Module):
    """A stack of layers with optional activation checkpointing.

    Attributes:
        grad_checkpointing: keep only each layer's input for the backward pass and compute the layer again there.
            Values, gradients and random draws stay the same.
    """

    grad_checkpointing: bool = False

    def run(self, layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`layer` of `inputs`."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


def set_grad_checkpointing(model: nn.Module, enabled: bool = True) -> None:
    """Switch activation checkpointing of every encoder within `model`."""
    for module in model.modules():
        if isinstance(module, Encoder):
            module.grad_checkpointing = enabled


class Linear(nn.Linear):
    """`torch.nn.Linear`, whose large fp32 products go to oneDNN on CPUs that are not Intel's; see `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return linear(input, self.weight, self.bias)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by oneDNN for large fp32 products on a CPU that is not Intel's.

    PyTorch gives these to MKL.  On an AMD EPYC a whole training step is 1.11 times faster by oneDNN; on Intel's own
    processors oneDNN took up to twice as long (`docs/performance.md`).

    Args:
        hidden: `[..., in_features]`.
        weight: `[out_features, in_features]`.
        bias: `[out_features]`.
    """
    if not _suits_onednn(hidden, weight):
        return F.linear(hidden, weight, bias)
    return _OneDnnLinear.apply(hidden, weight, bias)


@functools.cache
def is_intel() -> bool:
    """Whether the processor is Intel's."""
    cpuinfo = Path("/proc/cpuinfo")
    return "GenuineIntel" in (cpuinfo.read_text("utf-8") if cpuinfo.is_file() else platform.processor())


def _suits_onednn(hidden: Tensor, weight: Tensor) -> bool:
    return (
        # First, so that a graph traced for any size learns nothing of a size.
        not torch.compiler.is_compiling()
        and hidden.dtype == weight.dtype == torch.float32
        and hidden.device.type == "cpu"
        and hidden.numel() * weight.shape[0] >= MIN_ONEDNN_WORK
        and not torch.is_autocast_enabled("cpu")
        and type(weight) in (Tensor, nn.Parameter)
        and type(hidden) is Tensor
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
        and not is_intel()
    )


def _onednn_product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # What torch.compile emits for a linear map on a CPU; it has no name in torch.nn.functional.
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return _onednn_product(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        flat = gradients[0].reshape(-1, weight.shape[0])
        of_hidden = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_hidden = _onednn_product(flat, weight.t()).view_as(hidden)
        if ctx.needs_input_grad[1]:
            of_weight = _onednn_product(flat.t(), hidden.reshape(-1, weight.shape[1]).t())
        if ctx.needs_input_grad[2]:
            of_bias = flat.sum(dim=0)
        return of_hidden, of_weight, of_bias


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
        mask: bool, broadcastable to `[batch, heads, queries, keys]`; True where a query may attend.
        dropout: probability of dropping an attention weight.
        tap: where to keep the weights; computed step by step then, since the fused kernels do not return them.

    Returns:
        `[batch, heads, queries, head_width]`.
    """
    if tap is None:
        # An exported program must not learn how many queries there were.
        on_gpu = query.device.type == "cuda" and not torch.compiler.is_exporting()
        unplanned = on_gpu and (mask is not None or query.shape[2] < MIN_PLANNED_QUERIES)
        with sdpa_kernel(UNPLANNED_BACKENDS) if unplanned else contextlib.nullcontext():
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    tap.weights = attention_weights(query * query.shape[-1] ** -0.5, key, mask)
    return F.dropout(tap.weights, dropout) @ value


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the keys, `[..., queries, keys]`.

    Args:
        query: `[..., queries, head_width]`, already scaled.
        key: `[..., keys, head_width]`.
        mask: bool, broadcastable to the result; True where a query may attend.
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


class TokenCache:
    """Keys and values of the tokens that a causal decoder has read, so that only new ones are computed.

    Attributes:
        keys_values: for each layer, keys and values `[batch, heads, read_tokens, head_width]`.
    """

    def __init__(self, keys_values: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.keys_values = list(keys_values)

    def __len__(self) -> int:
        return self.keys_values[0][0].shape[2] if self.keys_values else 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens to those of `layer`, and return all of them."""
        if layer == len(self.keys_values):
            self.keys_values.append((key, value))
        else:
            old_key, old_value = self.keys_values[layer]
            self.keys_values[layer] = (torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2))
        return self.keys_values[layer]

    def select(self, index: Tensor) -> TokenCache:
        """A cache of the texts at `index` `[batch]`, in that order; extending it leaves this one unchanged."""
        return TokenCache(
            [(key.index_select(0, index), value.index_select(0, index)) for key, value in self.keys_values]
        )


class SelfAttention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = Linear(width, 3 * width)
        self.output = Linear(width, width)
        self.tap: AttentionTap | None = None

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        queries: Tensor | None = None,
        cache: TokenCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attend within `hidden`.

        Args:
            hidden: `[batch, tokens, width]`.
            mask: bool, broadcastable to `[batch, 1, slots or tokens, tokens]`, True where a token may be attended to;
                with a cache, its last dimension counts the cached tokens too.
            queries: `[batch, slots, width]`, the rows to compute; None computes all of them.
            cache: tokens before `hidden` that may be attended to as well; `hidden` is added to it.
            layer: index of this layer in the cache.

        Returns:
            `[batch, slots or tokens, width]`.
        """
        if queries is None:
            query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        else:
            width = hidden.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            query = linear(queries, weight[:width], bias[:width])
            key, value = linear(hidden, weight[width:], bias[width:]).chunk(2, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))
        if cache is not None:
            key, value = cache.extend(layer, key, value)
        dropout = self.dropout if self.training else 0.0
        return self.output(merge_heads(attention(query, key, value, mask, dropout, self.tap)))


class Mlp(nn.Module):
    """Two linear maps around an exact (erf) GELU."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden_width)
        self.down = Linear(hidden_width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[batch, tokens, width]` to the same."""
        return self.down(F.gelu(self.up(hidden)))


class VisionBlock(nn.Module):
    """Pre-norm transformer block of the vision transformer."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, tokens, width]` to the same; `mask` as in `attention`."""
        hidden = hidden + self.attention(self.attention_norm(hidden), mask)
        return hidden + self.mlp(self.mlp_norm(hidden))
