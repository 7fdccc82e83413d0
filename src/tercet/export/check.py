"""Exported graphs against the model that they came from, on random inputs of many sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tercet.model.tercet import Tercet
from tercet.model.text import class_rows

MOST = 5  # images, and texts of each, in a random input


class Runner(Protocol):
    """Runs the graphs of a folder."""

    def run(self, name: str, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The outputs of the graph `name`, in their order."""
        ...


class OnnxRunner:
    """ONNX files, by onnxruntime on the CPU."""

    def __init__(self, folder: Path) -> None:
        from onnxruntime import InferenceSession

        self._sessions: dict[str, Any] = {
            file.stem: InferenceSession(str(file), providers=["CPUExecutionProvider"]) for file in folder.glob("*.onnx")
        }

    def run(self, name: str, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """As `Runner.run`."""
        arrays = {key: value.numpy() for key, value in inputs.items()}
        return [torch.from_numpy(array) for array in self._sessions[name].run(None, arrays)]


class ProgramRunner:
    """Files of `torch.export`."""

    def __init__(self, folder: Path) -> None:
        self._programs = {file.stem: load_program(file) for file in folder.glob("*.pt2")}

    def run(self, name: str, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """As `Runner.run`."""
        with torch.no_grad():
            outputs = self._programs[name](**inputs)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def load_program(file: Path) -> torch.nn.Module:
    """A file of `torch.export` as a module, which takes its inputs by name.

    The tracer writes down that images and pairs are not equal in number, because it saw that in its example; what it
    traced does not depend on it, so that guards are not asked.
    """
    return torch.export.load(file).module(check_guards=False)


@torch.no_grad()
def check_graphs(model: Tercet, runner: Runner, count: int, seed: int = 0) -> float:
    """The largest difference between what the graphs give and what the model's own methods give.

    Differences are absolute where a tensor's values stay within 1, and relative to its largest value beyond.

    Args:
        model: in evaluation mode, on the CPU.
        runner: the graphs; each gets what the one before it gave, so that differences add up as in use.
        count: random inputs; the number of images, of texts and of their tokens changes from one to the next.
        seed: what they follow from.
    """
    draw = torch.Generator().manual_seed(seed)
    return max(
        (_difference(ours, theirs) for _ in range(count) for ours, theirs in _outputs(model, runner, draw)),
        default=0.0,
    )


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or not bool(torch.isfinite(theirs).all()):
        return float("inf")
    return ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)).item()


def _outputs(model: Tercet, runner: Runner, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """What the model and the graphs give for one random input, pair by pair."""
    images, texts, tokens = _sizes(model, draw)
    pixels = _draw_pixels(model, images, draw)
    input_ids, attention_mask = _draw_texts(model, images * texts, tokens, draw)

    image_embeds = model.encode_image(pixels)
    text_embeds = model.encode_text(input_ids, attention_mask.bool())
    memory = model.project_kv(image_embeds)
    fused = model.fuse(text_embeds, attention_mask.bool(), memory, class_rows(text_embeds))[:, 0]

    their_images, image_feats = runner.run("vision", {"images": pixels})
    their_texts, text_feats = runner.run("text", {"input_ids": input_ids, "attention_mask": attention_mask})
    (image_memory,) = runner.run("memory", {"image_embeds": their_images})
    pairs = {"text_embeds": their_texts, "attention_mask": attention_mask}
    grouped = {name: value.unflatten(0, (images, texts)) for name, value in pairs.items()}
    logits = runner.run("fusion", {**grouped, "image_memory": image_memory})

    heads = [model.itm_head] + ([] if model.entailment_head is None else [model.entailment_head])
    real = attention_mask.bool()  # what stands at padding is never read
    return [
        (image_embeds, their_images),
        (model.project_image(image_embeds[:, 0]), image_feats),
        (text_embeds[real], their_texts[real]),
        (model.project_text(text_embeds[:, 0]), text_feats),
        *((head(fused), theirs.flatten(0, 1)) for head, theirs in zip(heads, logits, strict=True)),
    ]


def _sizes(model: Tercet, draw: torch.Generator) -> tuple[int, int, int]:
    """Numbers of images, of texts for each, and of tokens."""
    longest = min(model.config.text.max_positions, 64)
    images, texts = (int(torch.randint(1, MOST + 1, (), generator=draw)) for _ in range(2))
    return images, texts, int(torch.randint(1, longest + 1, (), generator=draw))


def _draw_pixels(model: Tercet, images: int, draw: torch.Generator) -> Tensor:
    size = model.config.vision.image_size
    return torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=draw)


def _draw_texts(model: Tercet, texts: int, tokens: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids `[texts, tokens]` of texts of all lengths, and their mask, both int64."""
    text = model.config.text
    input_ids = torch.randint(0, text.vocabulary_size, (texts, tokens), generator=draw)
    input_ids[:, 0] = text.cls_id
    lengths = torch.randint(1, tokens + 1, (texts, 1), generator=draw)
    mask = torch.arange(tokens)[None] < lengths
    return torch.where(mask, input_ids, text.pad_id), mask.long()
