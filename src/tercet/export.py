"""A trained model for programs without Tercet: ONNX graphs and `torch.export` programs, compared with the model.

```
images ──► vision ──► image_embeds ──► image_kv ──► image_kv ──┐
                  └─► image_feats                              ├──► fusion ──► itm_logits
input_ids, attention_mask ──► text ──► text_embeds ────────────┘
                                   └─► text_feats
```

The keys and values are a graph of their own, since they depend on the image alone: computed once, they serve every
text.  The folder holds each graph as `NAME.onnx` and `NAME.pt2`, the tokenizer, and `export.json` with inputs, outputs
and the preprocessing of images and texts.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim

from tercet.config import DataConfig
from tercet.errors import TercetError
from tercet.files import atomic_folder
from tercet.model.hub import TOKENIZER
from tercet.model.layers import AttentionTap, attention
from tercet.model.tercet import Tercet
from tercet.model.text import CrossAttentionKV, class_rows
from tercet.version import __version__

Format = Literal["onnx", "program"]
FORMATS: tuple[Format, ...] = ("onnx", "program")
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "program": ".pt2"}
FACTS = "export.json"
FORMAT_VERSION = 2
TOLERANCE = 1e-4
MAX_CHECKED = 5  # images, and texts for each, in a random input

# Runs the graph of that name on inputs by name, and gives its outputs in order.
Runner = Callable[[str, Mapping[str, Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        folder: where.
        files: names of the graphs' files.
        differences: for each format the largest difference from the model over all checks; empty without checks.
        checks: random inputs that each format was compared on.
    """

    folder: Path
    files: list[str]
    differences: dict[Format, float]
    checks: int


def export_model(
    model: Tercet, folder: str | Path, formats: Sequence[Format] = FORMATS, checks: int = 10, seed: int = 0
) -> ExportReport:
    """Write the graphs of `model`; nothing is left in `folder` if they disagree with it.

    Args:
        model: on a CPU; exported in evaluation mode and float32.
        folder: a new folder, an empty one, or one of an earlier export, which is replaced.
        formats: `onnx` needs the extra `export`, `program` only torch.
        checks: random inputs of many sizes that every format is compared on.
        seed: of the random inputs.

    Raises:
        TercetError: a library is missing, `folder` holds other files, the disk is full, or a graph disagrees with the
            model.
    """
    folder = Path(folder).expanduser().absolute()
    _check_replaceable(folder)
    if "onnx" in formats:
        _require_onnx()
    training = model.training
    model.eval()
    differences: dict[Format, float] = {}
    try:
        graphs = make_graphs(model)
        with atomic_folder(folder) as partial, _quiet():
            for graph in graphs:
                graph.write(partial, formats)
            files = [graph.name + SUFFIX[kind] for graph in graphs for kind in formats]
            (partial / FACTS).write_text(json.dumps(_facts(model, graphs, files), indent=2) + "\n", "utf-8")
            if model.tokenizer is not None:
                model.tokenizer.save(partial)
            for kind in formats if checks else ():
                run = onnx_runner(partial) if kind == "onnx" else program_runner(partial)
                differences[kind] = largest_difference(model, run, checks, seed)
                if not differences[kind] <= TOLERANCE:
                    raise TercetError(
                        f"the {kind} graphs differ from the model by up to {differences[kind]:.1e}; {folder} was not "
                        "written. Please report this with the model's config.json"
                    )
    finally:
        model.train(training)
    return ExportReport(folder, files, differences, checks)


@dataclass(frozen=True)
class Graph:
    """A part of a model, ready to be exported.

    Attributes:
        name: of its files.
        module: what is exported.
        inputs: example tensors by name; none of their dynamic axes is 0 or 1 long.
        axes: for each input the names of its first axes, which are dynamic.
        outputs: names of what it gives.
        max_tokens: the largest length of the axis `tokens`.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    max_tokens: int

    def write(self, folder: Path, formats: Sequence[Format]) -> None:
        """Trace the module and write its files."""
        names = dict.fromkeys(axis for axes in self.axes.values() for axis in axes)
        dims = {name: Dim(name, min=1, max=self.max_tokens if name == "tokens" else None) for name in names}
        shapes = {name: {index: dims[axis] for index, axis in enumerate(axes)} for name, axes in self.axes.items()}
        with torch.no_grad():
            program = torch.export.export(self.module.eval(), (), kwargs=self.inputs, dynamic_shapes=shapes)
        if "onnx" in formats:
            written = torch.onnx.export(
                program,
                input_names=list(self.inputs),
                output_names=list(self.outputs),
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
            assert written is not None
            written.save(folder / f"{self.name}.onnx")
        if "program" in formats:
            torch.export.save(program, folder / f"{self.name}.pt2")

    def describe(self) -> dict[str, Any]:
        """Inputs with types and shapes, and outputs."""
        inputs = {
            name: {
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": [*self.axes[name], *value.shape[len(self.axes[name]) :]],
            }
            for name, value in self.inputs.items()
        }
        return {"inputs": inputs, "outputs": list(self.outputs)}


class VisionGraph(nn.Module):
    """The image encoder and its projection."""

    def __init__(self, model: Tercet) -> None:
        super().__init__()
        self.encoder, self.projection = model.vision, model.vision_projection

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 `[images, 3, size, size]` to `image_embeds` `[images, 1 + patches, vision_width]` and unit vectors
        `image_feats` `[images, embed_dim]`."""
        image_embeds = self.encoder(images)
        return image_embeds, nn.functional.normalize(self.projection(image_embeds[:, 0]), dim=-1)


class TextGraph(nn.Module):
    """The text encoder and its projection."""

    def __init__(self, model: Tercet) -> None:
        super().__init__()
        self.encoder, self.projection = model.text, model.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """int64 `input_ids` and `attention_mask` `[texts, tokens]` to `text_embeds` `[texts, tokens, width]` and unit
        vectors `text_feats` `[texts, embed_dim]`."""
        text_embeds = self.encoder(input_ids, attention_mask)
        return text_embeds, nn.functional.normalize(self.projection(text_embeds[:, 0]), dim=-1)


class ImageKVGraph(nn.Module):
    """Keys and values of every fusion layer."""

    def __init__(self, model: Tercet) -> None:
        super().__init__()
        self.fusion = model.fusion

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`[images, 1 + patches, vision_width]` to `image_kv`
        `[images, layers, 2, heads, image_tokens, head_width]`, keys before values."""
        layers = self.fusion.project_kv(image_embeds).keys_values
        return torch.stack([torch.stack([key, value], dim=1) for key, value in layers], dim=1)


class FusionGraph(nn.Module):
    """The fusion encoder and the heads that read its `[CLS]`."""

    def __init__(self, model: Tercet) -> None:
        super().__init__()
        self.fusion, self.heads = model.fusion, nn.ModuleList(_heads(model))

    def forward(self, text_embeds: Tensor, attention_mask: Tensor, image_kv: Tensor) -> tuple[Tensor, ...]:
        """Fuse every image with its own texts.

        Args:
            text_embeds: `[images, texts, tokens, width]`; one image with many texts, or many with one each.
            attention_mask: int64 `[images, texts, tokens]`.
            image_kv: `[images, layers, 2, heads, image_tokens, head_width]`.

        Returns:
            `itm_logits` `[images, texts, 2]`, class 1 a match, and of a model fine-tuned for entailment
            `entailment_logits` `[images, texts, 3]`.
        """
        images, texts = text_embeds.shape[:2]
        hidden, mask = text_embeds.flatten(0, 1), attention_mask.flatten(0, 1)
        fused = self.fusion(hidden, mask, _StackedKV(image_kv, texts), class_rows(hidden))[:, 0]
        return tuple(head(fused.unflatten(0, (images, texts))) for head in self.heads)


class _StackedKV(CrossAttentionKV):
    """Keys and values as one tensor, read by equally many texts of every image.

    `CrossAttentionKV` branches on whether there are as many pairs as images, which a graph for any number cannot.
    """

    def __init__(self, stacked: Tensor, texts: int) -> None:
        super().__init__([layer.unbind(1) for layer in stacked.unbind(1)])  # pyright: ignore[reportArgumentType]
        self.texts = texts

    def attend(self, layer: int, query: Tensor, dropout: float = 0.0, tap: AttentionTap | None = None) -> Tensor:
        """As `CrossAttentionKV.attend`."""
        key, value = self.keys_values[layer]
        queries = query.shape[2]
        folded = query.unflatten(0, (key.shape[0], self.texts)).transpose(1, 2).flatten(2, 3)
        seen = attention(folded, key, value, self.mask, dropout, tap)
        return seen.unflatten(2, (self.texts, queries)).transpose(1, 2).flatten(0, 1)


def _heads(model: Tercet) -> list[nn.Module]:
    """What is exported on top of the fusion encoder."""
    return [head for head in (model.itm_head, model.entailment_head) if head is not None]


def make_graphs(model: Tercet) -> list[Graph]:
    """The four graphs of a model in evaluation mode, in the order in which they feed one another."""
    config, text = model.config, model.config.text
    images, texts, tokens = 2, 3, min(5, text.max_positions)
    size, vision_tokens = config.vision.image_size, 1 + config.vision.grid**2
    embeds = torch.zeros(images, vision_tokens, config.vision.width)
    layers, head_width = text.depth - text.fusion_layer, text.width // text.heads
    pair_inputs = {
        "text_embeds": torch.zeros(images, texts, tokens, text.width),
        "attention_mask": torch.ones(images, texts, tokens, dtype=torch.int64),
        "image_kv": torch.zeros(images, layers, 2, text.heads, vision_tokens - config.vision.first_fused, head_width),
    }
    ids = {name: torch.ones(texts, tokens, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    pixels = {"images": torch.zeros(images, 3, size, size, dtype=torch.uint8)}
    pairs = ("images", "texts", "tokens")
    pair_axes = {"text_embeds": pairs, "attention_mask": pairs, "image_kv": ("images",)}
    logits = ("itm_logits", "entailment_logits")[: len(_heads(model))]
    parts: list[tuple[str, nn.Module, dict[str, Tensor], dict[str, tuple[str, ...]], tuple[str, ...]]] = [
        ("vision", VisionGraph(model), pixels, {"images": ("images",)}, ("image_embeds", "image_feats")),
        ("text", TextGraph(model), ids, dict.fromkeys(ids, ("texts", "tokens")), ("text_embeds", "text_feats")),
        ("image_kv", ImageKVGraph(model), {"image_embeds": embeds}, {"image_embeds": ("images",)}, ("image_kv",)),
        ("fusion", FusionGraph(model), pair_inputs, pair_axes, logits),
    ]
    return [Graph(*part, max_tokens=text.max_positions) for part in parts]


def onnx_runner(folder: Path) -> Runner:
    """ONNX files, by onnxruntime on the CPU."""
    from onnxruntime import InferenceSession

    cpu = ["CPUExecutionProvider"]
    sessions: dict[str, Any] = {file.stem: InferenceSession(str(file), providers=cpu) for file in folder.glob("*.onnx")}

    def run(name: str, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        arrays = {key: value.numpy() for key, value in inputs.items()}
        return [torch.from_numpy(array) for array in sessions[name].run(None, arrays)]

    return run


def program_runner(folder: Path) -> Runner:
    """Files of `torch.export`.

    Without guards: the tracer notes that its example had fewer images than pairs, which the graph does not need.
    """
    programs = {file.stem: torch.export.load(file).module(check_guards=False) for file in folder.glob("*.pt2")}

    def run(name: str, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            outputs = programs[name](**inputs)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    return run


@torch.no_grad()
def largest_difference(model: Tercet, run: Runner, count: int, seed: int = 0) -> float:
    """The largest difference between the graphs' outputs and the model's, on random inputs of many sizes.

    It is absolute where a tensor's values stay within 1, and relative to its largest value beyond.

    Args:
        model: in evaluation mode, on the CPU.
        run: runs the graphs; each gets the outputs of the one before it, so that differences add up as in use.
        count: random inputs, with other numbers of images, texts and tokens each.
        seed: of the inputs.
    """
    generator, worst = torch.Generator().manual_seed(seed), 0.0
    for _ in range(count):
        for ours, theirs in _outputs(model, run, generator):
            if ours.shape != theirs.shape or not bool(torch.isfinite(theirs).all()):
                return float("inf")
            worst = max(worst, ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)).item())
    return worst


def _outputs(model: Tercet, run: Runner, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """The outputs of model and graphs for one random input, pair by pair."""
    text, size = model.config.text, model.config.vision.image_size

    def sample(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    images, texts, tokens = sample(MAX_CHECKED), sample(MAX_CHECKED), sample(min(text.max_positions, 64))
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    input_ids = torch.randint(0, text.vocabulary_size, (images * texts, tokens), generator=generator)
    input_ids[:, 0] = text.cls_id
    real = torch.arange(tokens)[None] < torch.randint(1, tokens + 1, (images * texts, 1), generator=generator)
    input_ids, mask = torch.where(real, input_ids, text.pad_id), real.long()

    image_embeds, text_embeds = model.encode_image(pixels), model.encode_text(input_ids, real)
    fused = model.fuse(text_embeds, real, model.project_kv(image_embeds), class_rows(text_embeds))[:, 0]

    their_images, image_feats = run("vision", {"images": pixels})
    their_texts, text_feats = run("text", {"input_ids": input_ids, "attention_mask": mask})
    (image_kv,) = run("image_kv", {"image_embeds": their_images})
    pairs = {"text_embeds": their_texts, "attention_mask": mask}
    grouped = {name: value.unflatten(0, (images, texts)) for name, value in pairs.items()}
    logits = run("fusion", {**grouped, "image_kv": image_kv})
    return [
        (image_embeds, their_images),
        (model.project_image(image_embeds[:, 0]), image_feats),
        (text_embeds[real], their_texts[real]),  # what stands at padding is never read
        (model.project_text(text_embeds[:, 0]), text_feats),
        *((head(fused), theirs.flatten(0, 1)) for head, theirs in zip(_heads(model), logits, strict=True)),
    ]


def _facts(model: Tercet, graphs: Sequence[Graph], files: Sequence[str]) -> dict[str, Any]:
    data, config = DataConfig(), model.config
    return {
        "library": "tercet",
        "library_version": __version__,
        "format_version": FORMAT_VERSION,
        "files": list(files),
        "graphs": {graph.name: graph.describe() for graph in graphs},
        "image": {"size": config.vision.image_size, "colours": "RGB", "resampling": "bicubic", "dtype": "uint8"},
        "text": {
            "lower_case": True,
            "to_space": "-/",
            "to_nothing": ",.'!?\"()*#:;~",
            "max_words": data.max_words,
            "max_tokens": min(data.max_tokens, config.text.max_positions),
            "pad_id": config.text.pad_id,
        },
        "temperature": model.temperature.item(),
        "model": config.model_dump(mode="json"),
    }


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxruntime  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        message = f"ONNX graphs need {error.name}; pip install 'tercet[export]', or give --format program"
        raise TercetError(message) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about itself and about libraries that are not there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message=r"# The axis name: ")
            yield
    finally:
        logger.setLevel(level)


def _check_replaceable(folder: Path) -> None:
    """Replacing a folder deletes what is in it, so only exports and empty folders are replaced."""
    if folder.exists() and not folder.is_dir():
        raise TercetError(f"{folder} is a file; choose a new folder for the export")
    suffixes = (*SUFFIX.values(), ".data")
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.name not in (FACTS, TOKENIZER) and entry.suffix not in suffixes:
            raise TercetError(f"{folder} holds other files ({entry.name}); choose a new folder, not to lose them")
