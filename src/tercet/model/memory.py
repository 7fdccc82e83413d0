"""An image memory for layers that so few text tokens read that projecting every image token would cost more."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tercet.model.dropout import drop
from tercet.model.layers import AttentionTap, ImageMemory, attention_weights


class LeanMemory(ImageMemory):
    """Keys and values for the first layers, and the image tokens themselves for the others.

    A logit is `q . (K x) = (K' q) . x`, and a value `sum p (V x) = V (sum p x)`: the matrices can act on the few text
    tokens instead of the many image tokens.  The bias of the keys adds the same to all logits of a query, which the
    softmax takes out again.

    Attributes:
        image_embeds: `[images, image_tokens, image_width]`.
        key_values: for each of the other layers the weight `[2 * width, image_width]` and bias `[2 * width]`.
    """

    def __init__(
        self,
        image_embeds: Tensor,
        keys_values: Sequence[tuple[Tensor, Tensor]],
        key_values: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(keys_values)
        self.image_embeds = image_embeds
        self.key_values = list(key_values)

    def __len__(self) -> int:
        return self.image_embeds.shape[0]

    def select(self, index: Tensor) -> LeanMemory:
        """The images that `index` `[images]` names, in that order."""
        projected = super().select(index).keys_values
        return LeanMemory(self.image_embeds.index_select(0, index), projected, self.key_values)

    def detach(self) -> LeanMemory:
        """The same memory without its graph."""
        return LeanMemory(
            self.image_embeds.detach(),
            super().detach().keys_values,
            [(weight.detach(), bias.detach()) for weight, bias in self.key_values],
        )

    def attend(self, layer: int, query: Tensor, dropout: float, tap: AttentionTap | None) -> Tensor:
        """As `ImageMemory.attend`."""
        if layer < len(self.keys_values):
            return super().attend(layer, query, dropout, tap)
        weight, bias = self.key_values[layer - len(self.keys_values)]
        pairs, heads, queries, head_width = query.shape
        images, image_tokens, _ = self.image_embeds.shape
        key_weight, value_weight = weight.unflatten(0, (2, heads, head_width)).unbind(0)
        # [heads, pairs * queries, image_width], then every head of every pair as one more reader of the image.
        asked = (query.transpose(0, 1).flatten(1, 2) * head_width**-0.5) @ key_weight
        asked = asked.unflatten(1, (images, -1)).transpose(0, 1).flatten(1, 2)
        weights = attention_weights(asked, self.image_embeds)
        if tap is not None:
            tap.weights = weights.view(images, heads, -1, image_tokens)
        weights = drop(weights, dropout)
        seen = (weights @ self.image_embeds).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
        # Dropped weights no longer sum to 1, so that the bias has to be weighed as well.
        mass = weights.sum(dim=-1).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1).unsqueeze(-1)
        values = seen @ value_weight.transpose(1, 2) + mass * bias.unflatten(0, (2, heads, 1, head_width))[1]
        return values.unflatten(1, (pairs, queries)).transpose(0, 1)
