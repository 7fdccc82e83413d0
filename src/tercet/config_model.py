"""The sizes of a model: its two transformers, and the presets that name them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from tercet.config_section import Section, merge

HeadName = Literal["answer", "entailment", "nlvr", "assignment"]


class VisionConfig(Section):
    """The vision transformer."""

    image_size: int = Field(default=256, ge=8, le=16384, description="side of the square input in pixels")
    patch_size: int = Field(default=16, ge=2, le=16384, description="side of a patch in pixels")
    stem: Literal["patch", "convolution"] = Field(
        default="patch",
        description="patch: one linear map of each patch, as published; convolution: residual stages of 3x3 "
        "convolutions down to one vector a patch, which learn shapes from few images",
    )
    pool: Literal["class", "maximum"] = Field(
        default="class",
        description="class: the class token gathers by attention alone, as published; maximum: the largest value of "
        "each channel among the patches is added to it at the end, which begins to learn sooner",
    )
    window: int | None = Field(
        default=None,
        ge=0,
        description="rows and columns that a patch sees around itself; the class token sees every patch, none sees it, "
        "and the fusion encoder reads the patches alone; none: all tokens see all, as published",
    )
    width: int = Field(default=768, ge=8, le=65536, description="channels of a token")
    depth: int = Field(default=12, ge=1, le=1024, description="number of blocks")
    heads: int = Field(default=12, ge=1, le=1024, description="attention heads")
    mlp_ratio: float = Field(default=4.0, gt=0, le=64, description="hidden width of the MLP over the token width")

    @model_validator(mode="after")
    def _divides(self) -> VisionConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.stem == "convolution" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size {self.patch_size} is not a power of 2, which stem convolution needs")
        if self.stem == "convolution" and self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which stem convolution needs")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def first_fused(self) -> int:
        """The first image token that the fusion encoder reads.

        A class token tells what is there and not where: beside patches that know of themselves alone, words would read
        it and learn no attention to the patches.
        """
        return int(self.window is not None)

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Channels of each stage of stem convolution: half as many as the next, and half the width at the end."""
        stages = self.patch_size.bit_length() - 1
        return tuple(max(16, self.width // 2 ** (stages - stage) // 8 * 8) for stage in range(stages))


class TextConfig(Section):
    """The BERT-layout stack: the lower layers encode the text, the upper ones fuse it with the image."""

    vocabulary_size: int = Field(
        default=30522, ge=8, le=10_000_000, description="word pieces; taken from the tokenizer when one is trained"
    )
    max_positions: int = Field(default=512, ge=4, le=1_000_000, description="rows of the position table")
    width: int = Field(default=768, ge=8, le=65536, description="channels of a token")
    mlp_width: int = Field(default=3072, ge=8, le=1_048_576, description="hidden width of the MLP")
    depth: int = Field(default=12, ge=2, le=1024, description="layers of text encoder and fusion encoder together")
    fusion_layer: int = Field(default=6, ge=1, description="index of the first layer with cross-attention to the image")
    heads: int = Field(default=12, ge=1, le=1024, description="attention heads")
    pool: Literal["class", "mean"] = Field(
        default="class",
        description="class: [CLS] gathers by attention, as published; mean: the mean over all tokens takes its place "
        "at the end of the text encoder, which begins to learn sooner",
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="dropout of hidden states and attention while training")
    pad_id: int = Field(default=0, ge=0, description="token id of padding")
    cls_id: int = Field(default=101, ge=0, description="token id of [CLS]")
    sep_id: int = Field(default=102, ge=0, description="token id of [SEP]")
    mask_id: int = Field(default=103, ge=0, description="token id of [MASK]")

    @model_validator(mode="after")
    def _divides(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.fusion_layer >= self.depth:
            raise ValueError(f"fusion_layer {self.fusion_layer} leaves no fusion layers below depth {self.depth}")
        return self


MODEL_SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "small": {
        "vision": {"width": 384, "depth": 12, "heads": 6},
        "text": {"width": 384, "mlp_width": 1536, "depth": 8, "fusion_layer": 4, "heads": 6},
    },
    "tiny": {
        "vision": {"image_size": 64, "patch_size": 8, "width": 128, "depth": 4, "heads": 4},
        "text": {
            "width": 128,
            "mlp_width": 512,
            "depth": 4,
            "fusion_layer": 2,
            "heads": 4,
            "max_positions": 64,
        },
        "embed_dim": 64,
    },
}


# What a preset decides.  The other keys of the model (image and patch size, vocabulary, positions, dropout,
# temperature) belong to the data and the training, and stay when another preset is chosen over a recipe.
PRESET_KEYS: dict[str, tuple[str, ...]] = {
    "vision": ("width", "depth", "heads", "mlp_ratio"),
    "text": ("width", "mlp_width", "depth", "fusion_layer", "heads"),
}


class ModelConfig(Section):
    """A model's sizes.  `size` names a preset; every other key given beside it overrides the preset."""

    size: Literal["base", "small", "tiny"] = Field(
        default="base", description="preset of sizes that the other keys refine"
    )
    vision: VisionConfig = Field(default_factory=VisionConfig, description="the vision transformer")
    text: TextConfig = Field(default_factory=TextConfig, description="text encoder and fusion encoder")
    embed_dim: int = Field(
        default=256, ge=2, le=65536, description="width of the space shared by image_feats and text_feats"
    )
    temperature: float = Field(default=0.07, gt=0, description="start of the learned temperature")
    heads: list[HeadName] = Field(
        default_factory=list, description="parts for downstream tasks; a task adds those that it needs by itself"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        size = data.get("size", "base")
        if not isinstance(size, str) or size not in MODEL_SIZES:
            return data  # the Literal on `size` words the error
        return merge(MODEL_SIZES[size], data)
