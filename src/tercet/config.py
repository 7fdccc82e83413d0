"""The typed configuration tree of a run.

Every field has a default and a one-line meaning, so that `--help` can show both.  A section validates when it is
built and rejects unknown keys.  `tercet.config_io` reads and writes it.
"""

from __future__ import annotations

import re
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

HeadName = Literal["answer", "entailment", "nlvr", "assignment"]
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE]\+?\d+")
OBJECTIVE_NAMES = ("cma", "imc", "lmi", "itm", "mlm")


class Section(BaseModel):
    """A frozen part of the tree that rejects unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_plain_forms(cls, data: Any) -> Any:
        """Accept `none` for None or an empty list, one string for a list of one, `1e5` for a whole number, and a
        section without keys."""
        if not isinstance(data, dict):
            return data
        plain = {}
        for key, value in data.items():
            field = cls.model_fields.get(key)
            annotation = field.annotation if field else None
            if value is None and isinstance(annotation, type) and issubclass(annotation, Section):
                continue
            if isinstance(value, str) and NoneType in get_args(annotation) and value.lower() in ("none", "null"):
                plain[key] = None
            elif get_origin(annotation) is list and value in ("none", "null", ["none"], ["null"]):
                plain[key] = []
            elif isinstance(value, str) and get_origin(annotation) is list:
                plain[key] = [value]
            elif isinstance(value, str) and int in (annotation, *get_args(annotation)) and _EXPONENT.fullmatch(value):
                plain[key] = float(value)
            else:
                plain[key] = value
        return plain


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` updated with `override`, section by section; an empty section changes nothing."""
    merged = dict(base)
    for key, value in override.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        elif value is not None or not isinstance(merged.get(key), dict):
            merged[key] = value
    return merged


class VisionConfig(Section):
    """The vision transformer."""

    image_size: int = Field(default=256, ge=8, le=16384, description="side of the square input in pixels")
    patch_size: int = Field(default=16, ge=2, le=16384, description="side of a patch in pixels")
    stem: Literal["patch", "convolution"] = Field(
        default="patch",
        description="patch: one linear map of each patch, as published; convolution: residual stages of 3x3 "
        "convolutions down to one vector a patch, which learns shapes from few images",
    )
    pool: Literal["class", "maximum"] = Field(
        default="class",
        description="class: the class token alone, as published; maximum: plus the maximum over the patches of each "
        "channel, which begins to learn sooner",
    )
    window: int | None = Field(
        default=None,
        ge=0,
        description="how many rows and columns around itself a patch attends to; the class token attends to every "
        "patch, no patch to it, and the fusion encoder reads the patches alone; none: full attention, as published",
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

        With windowed patches it skips the class token: words would read that one and learn no attention to patches.
        """
        return int(self.window is not None)

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Channels of each stage of the convolution stem: doubling, up to half the width."""
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
        description="class: [CLS], as published; mean: the mean over all tokens replaces it at the end of the text "
        "encoder, which begins to learn sooner",
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
        "text": {"width": 128, "mlp_width": 512, "depth": 4, "fusion_layer": 2, "heads": 4, "max_positions": 64},
        "embed_dim": 64,
    },
}
# What a preset decides.  The other keys of the model (image and patch size, vocabulary, positions, dropout,
# temperature) belong to the data and the training, and stay when another preset is chosen on top of a recipe.
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
    embed_dim: int = Field(default=256, ge=2, le=65536, description="width of image_feats and text_feats")
    temperature: float = Field(default=0.07, gt=0, description="start of the learned temperature")
    heads: list[HeadName] = Field(
        default_factory=list, description="heads for downstream tasks; a task adds those that it needs by itself"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        size = data.get("size", "base")
        if not isinstance(size, str) or size not in MODEL_SIZES:
            return data  # the Literal on `size` reports it
        return merge(MODEL_SIZES[size], data)


class ObjectivesConfig(Section):
    """How the model learns.  A weight of 0 switches a loss off, and the work that only it needs with it."""

    cma: float = Field(default=1.0, ge=0, description="weight of cross-modal alignment (image to text and back)")
    imc: float = Field(
        default=1.0, ge=0, description="weight of intra-modal contrast (image to its other view, text to its twin)"
    )
    lmi: float = Field(default=1.0, ge=0, description="weight of local-global mutual information")
    itm: float = Field(default=1.0, ge=0, description="weight of image-text matching with hard negatives")
    mlm: float = Field(default=1.0, ge=0, description="weight of masked language modelling")
    teacher: bool = Field(default=True, description="keep an EMA teacher; without one only cma, itm and mlm can be on")
    momentum: float = Field(default=0.995, ge=0, le=1, description="EMA momentum of the teacher")
    alpha: float = Field(default=0.4, ge=0, le=1, description="weight of the teacher's soft targets in cma and mlm")
    alpha_warmup: float = Field(default=1.0, ge=0, description="epochs over which alpha rises from 0")
    queue_size: int = Field(default=65536, ge=0, description="features kept from earlier batches as further negatives")
    gather_negatives: bool = Field(
        default=False, description="several ranks: itm and lmi find negatives among the pairs of all of them"
    )
    mlm_probability: float = Field(default=0.15, ge=0, le=1, description="share of word pieces that mlm masks")
    patch_drop: float = Field(
        default=0.0, ge=0, lt=1, description="share of the student's image patches dropped at random, as in FLIP"
    )
    temperature_min: float = Field(default=0.001, gt=0, description="lower clamp of the temperature")
    temperature_max: float = Field(default=0.5, gt=0, description="upper clamp of the temperature")

    @model_validator(mode="after")
    def _consistent(self) -> ObjectivesConfig:
        if not any(getattr(self, name) for name in OBJECTIVE_NAMES):
            raise ValueError(f"every objective is off; give one of {', '.join(OBJECTIVE_NAMES)} a weight above 0")
        if not self.teacher and (self.imc or self.lmi):
            raise ValueError("imc and lmi read the teacher; set teacher: true, or imc: 0 and lmi: 0")
        if not self.teacher and self.queue_size:
            raise ValueError("the queue holds the teacher's features; set queue_size: 0 when teacher is false")
        return self

    @property
    def enabled(self) -> tuple[str, ...]:
        """Names of the objectives with a weight above 0, in the order of the paper."""
        return tuple(name for name in OBJECTIVE_NAMES if getattr(self, name))


class DataConfig(Section):
    """Where the pairs are and how they become batches."""

    train: list[str] = Field(default_factory=list, description="training sources: files, folders, globs or URLs")
    validation: list[str] = Field(default_factory=list, description="sources to evaluate on while training")
    test: list[str] = Field(default_factory=list, description="sources to evaluate on at the end")
    image_root: str | None = Field(
        default=None, description="folder that relative image paths start from; default the source's own"
    )
    image_column: str = Field(default="image", description="column or key that holds the image")
    caption_column: str = Field(default="caption", description="column or key that holds the caption")
    caption_choice: Literal["random", "each"] = Field(
        default="random",
        description="an image with several captions: one at random an epoch, or every pair once an epoch",
    )
    max_words: int = Field(default=30, ge=1, description="words of a caption that are kept")
    max_tokens: int = Field(default=25, ge=2, description="word pieces of a caption that are kept, [CLS] included")
    tokenizer: str | None = Field(
        default=None, description="tokenizer.json, vocab.txt or a folder of one; default: train one on the captions"
    )
    tokenizer_size: int = Field(default=8192, ge=64, description="word pieces of a tokenizer trained on the captions")
    tokenizer_texts: list[str] = Field(
        default_factory=list,
        description="further texts that a new tokenizer is trained on, as TASK=SOURCE (vqa=questions.json): those of "
        "the tasks that the model is to be fine-tuned for",
    )
    workers: int = Field(default=2, ge=0, description="processes that read and augment")
    cache_folder: str | None = Field(
        default=None, description="folder for copies of remote shards; default: shards in TERCET_CACHE"
    )
    cache_gigabytes: float = Field(
        default=100.0, gt=0, description="size of that cache; the least recently used copies are dropped first"
    )
    references: str | None = Field(
        default=None, description="grounding: the official refs (JSON, or refs(unc).p) that hold the boxes of ref_ids"
    )
    instances: str | None = Field(
        default=None, description="grounding: COCO's instances.json, which the refs' annotation ids point into"
    )
    detections: str | None = Field(
        default=None, description="grounding: JSON of a detector's boxes to choose from, {image: [[x, y, w, h], ...]}"
    )
    augment: Literal["full", "light", "whole", "none"] = Field(
        default="full",
        description="full: as published; light: crop and flip; whole: as full without the crop; none: resize only",
    )
    crop_scale: tuple[float, float] = Field(
        default=(0.2, 1.0), description="share of the area that a random crop keeps"
    )
    flip: bool = Field(default=True, description="mirror half of the views; off where captions tell left from right")
    pixel_limit: int = Field(default=89_478_485, ge=1, description="images with more pixels are rejected")
    share_images: bool = Field(
        default=False,
        description="tasks of samples: all samples of an image in one step, its image encoded once for them; "
        "batch_size then counts images",
    )


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(default=1e-4, gt=0, description="peak learning rate")
    min_lr: float = Field(default=1e-5, ge=0, description="learning rate at the end of the cosine")
    warmup_lr: float = Field(default=1e-5, ge=0, description="learning rate of the first step")
    warmup_steps: int = Field(default=2000, ge=0, description="steps from warmup_lr to lr")
    schedule: Literal["cosine", "constant", "published"] = Field(
        default="cosine", description="cosine by step, constant after the warm-up, or the published step/epoch hybrid"
    )
    warmup_epochs: int = Field(default=20, ge=0, description="published schedule: its warm-up, in hundreds of steps")
    weight_decay: float = Field(default=0.02, ge=0, description="decoupled weight decay of matrices")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first moment decay")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's second moment decay")
    epsilon: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    clip_norm: float | None = Field(default=1.0, gt=0, description="largest norm of the gradient; none: no clipping")
    grad_accum_steps: int = Field(default=1, ge=1, description="batches whose gradients are averaged before a step")


class TrainConfig(Section):
    """The loop."""

    epochs: int = Field(default=30, ge=1, description="passes over the data")
    max_steps: int | None = Field(default=None, ge=1, description="stop after this many steps, whatever epochs says")
    batch_size: int = Field(default=64, ge=1, description="pairs a batch, over all ranks together")
    seed: int = Field(default=0, ge=0, description="every random choice follows from this and the step")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes CUDA where there is one")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto takes bf16 where the device has it natively"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="several ranks: each holds the whole model, or a part of every layer"
    )
    compile: bool = Field(default=False, description="torch.compile the encoders' layers, once for all text lengths")
    grad_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass instead of keeping them: less memory"
    )
    log_every: int = Field(default=10, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every: int = Field(default=500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints that are kept")
    evaluate_every: int | None = Field(
        default=None, ge=1, description="steps between evaluations on data.validation; none: only at the end"
    )
    max_bad_steps: int = Field(default=10, ge=1, description="non-finite steps in a row after which the run gives up")


class EvaluateConfig(Section):
    """Retrieval evaluation."""

    rerank: int = Field(default=128, ge=0, description="candidates that the fusion encoder re-ranks; 0: none")
    batch_size: int = Field(default=64, ge=1, description="images or texts a batch")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="auto takes bf16 where the device has it natively; cosines and logits of classes stay fp32",
    )
    int8: bool = Field(default=False, description="encoders in int8, on a CPU: faster, a little less exact")
    limit: int | None = Field(default=None, ge=1, description="evaluate on the first so many images only")
    heatmap: Literal["itm", "itc", "answer"] = Field(
        default="itm",
        description="grounding: read the fusion encoder's cross-attention, the image's own attention, or "
        "cross-attention for the answers to heatmap_questions",
    )
    heatmap_layer: int | None = Field(
        default=None,
        ge=0,
        description="grounding: layer that is read, from 0; default two thirds up, as published; for answers the last",
    )
    heatmap_questions: list[str] = Field(
        default=["what is {}?"],
        min_length=1,
        description="grounding by answers: questions with {} for the expression, whose heatmaps are added up",
    )
    heatmap_blur: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="grounding: weight of the patches beside a patch in its heat, 0 as published; where something "
        "spans several patches, its hottest may lie at its edge",
    )


class VqaConfig(Section):
    """Visual question answering."""

    answers: str | None = Field(
        default=None,
        description="file of answers to choose from, JSON list or one a line; default: the commonest of the training",
    )
    answer_count: int = Field(
        default=3128, ge=1, description="how many of the commonest training answers, where no file is named"
    )
    open_list: bool = Field(
        default=False, description="allow questions without a right answer in the file; they count as wrong"
    )
    inference: Literal["auto", "rank", "generate"] = Field(
        default="auto", description="rank a list of answers, or generate freely; auto ranks where there is a list"
    )
    candidates: int = Field(default=128, ge=1, description="answers scored in full, selected by their first word piece")
    beams: int = Field(default=3, ge=1, description="beam search width of generation; 1 is greedy")
    length_penalty: float = Field(
        default=1.0, description="power of the length that a generated answer's log-probability is divided by"
    )
    max_answer_tokens: int = Field(default=12, ge=1, description="word pieces of a generated answer")
    max_words: int = Field(default=50, ge=1, description="words of a question that are kept in evaluation")


class ClassifyConfig(Section):
    """Classification by the names of classes, and by a linear probe on frozen features."""

    templates: list[str] = Field(
        default_factory=lambda: ["{}", "a photo of {}", "a picture of {}"],
        description="sentences with {} where the name of a class goes; their features are averaged",
    )
    train: list[str] = Field(
        default_factory=list, description="labelled images that the linear probe learns from; none: no probe"
    )
    shots: list[int] = Field(
        default_factory=lambda: [1, 2, 4, 8, 16],
        description="training images a class for a probe; numbers larger than a class are skipped",
    )
    draws: int = Field(default=3, ge=1, description="random selections of images that a probe's accuracy averages over")


class Config(Section):
    """A run."""

    name: str = Field(default="run", description="name of the run; its folder when `output` is not given is runs/NAME")
    task: Literal["pretrain", "retrieval", "vqa", "entailment", "nlvr_pretrain", "nlvr", "grounding"] = Field(
        default="pretrain", description="what is trained"
    )
    output: str | None = Field(default=None, description="run folder; default runs/NAME")
    init: str | None = Field(default=None, description="model folder or hub id to start from; default: random weights")
    compat: Literal["tercet", "published"] = Field(
        default="tercet", description="'published' reproduces the published code's defects as well"
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="sizes")
    objectives: ObjectivesConfig = Field(default_factory=ObjectivesConfig, description="losses, teacher and queue")
    data: DataConfig = Field(default_factory=DataConfig, description="pairs")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="optimizer and schedule")
    train: TrainConfig = Field(default_factory=TrainConfig, description="the loop")
    vqa: VqaConfig = Field(default_factory=VqaConfig, description="visual question answering")
    classify: ClassifyConfig = Field(default_factory=ClassifyConfig, description="classification, in evaluation")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="retrieval evaluation")
