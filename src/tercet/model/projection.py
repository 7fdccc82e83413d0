"""How many image tokens there are, and when they are worth keys and values; arithmetic alone, without torch."""

from __future__ import annotations


def pays_to_project(readers: int, image_tokens: int, width: int, image_width: int, heads: int) -> bool:
    """Whether keys and values of an image cost fewer FLOPs than taking its readers to the image instead.

    Args:
        readers: text tokens, over all passes, that read the image in a layer.
        image_tokens: tokens of the image.
        width: channels of the text.
        image_width: channels of the image.
        heads: attention heads; each takes its readers to the image on its own.
    """
    projecting = image_tokens * image_width * width + readers * image_tokens * width
    return projecting <= readers * (width * image_width + heads * image_tokens * image_width)


def kept_patches(patches: int, drop: float) -> int:
    """How many of an image's patches are left when a share `drop` of them is taken away; one at least."""
    return max(1, round(patches * (1 - drop)))
