"""The published training step written out plainly: a separate pass for every objective, with nothing shared."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plain import PlainModel
from tercet.config import ObjectivesConfig, OptimConfig, TextConfig


@dataclass
class PlainBatch:
    """A batch of pairs.

    Attributes:
        images: normalised floats `[batch, 3, height, width]`.
        second_views: the same images seen differently.
        input_ids: `[batch, tokens]`.
        attention_mask: bool `[batch, tokens]`.
        masked_ids: `[batch, tokens]` with tokens masked; None masks them in the step.
        labels: `[batch, tokens]`, the masked tokens and -100 elsewhere; None with `masked_ids`.
        negative_images: index of an image for each text; None draws them.
        negative_texts: index of a text for each image; None draws them.
    """

    images: Tensor
    second_views: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    masked_ids: Tensor | None = None
    labels: Tensor | None = None
    negative_images: list[int] | None = None
    negative_texts: list[int] | None = None


class PlainPretraining(nn.Module):
    """Student, teacher and queue as published."""

    image_queue: Tensor
    text_queue: Tensor

    def __init__(self, student: PlainModel, text: TextConfig, config: ObjectivesConfig) -> None:
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.text, self.config = text, config
        embed_dim = student.vision_projection.out_features
        self.register_buffer("image_queue", F.normalize(torch.randn(embed_dim, config.queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(embed_dim, config.queue_size), dim=0))
        self.pointer = 0

    def forward(self, batch: PlainBatch, alpha: float) -> dict[str, Tensor]:
        """`{name: loss}`; the teacher moves and the queue takes the batch on the way."""
        student, teacher = self.student, self.teacher
        with torch.no_grad():
            student.temperature.clamp_(self.config.temperature_min, self.config.temperature_max)
        image_embeds = student.vision(batch.images)
        image_feats = F.normalize(student.vision_projection(image_embeds[:, 0]), dim=-1)
        text_embeds = student.encode_text(batch.input_ids, batch.attention_mask)
        text_feats = F.normalize(student.text_projection(text_embeds[:, 0]), dim=-1)
        with torch.no_grad():
            self.move_teacher()
            teacher_images = teacher.vision(batch.second_views)
            teacher_texts = teacher.encode_text(batch.input_ids, batch.attention_mask)
            patch_feats = F.normalize(teacher.vision_projection(teacher_images), dim=-1)
            word_feats = F.normalize(teacher.text_projection(teacher_texts), dim=-1)
        losses = self.contrast(image_feats, text_feats, patch_feats[:, 0], word_feats[:, 0], alpha)
        losses["lmi"] = self.local(image_feats, text_feats, patch_feats[:, 1:], word_feats[:, 1:], batch.attention_mask)
        with torch.no_grad():
            to_text = image_feats @ word_feats[:, 0].T / student.temperature
            to_image = text_feats @ patch_feats[:, 0].T / student.temperature
        self.enqueue(patch_feats[:, 0], word_feats[:, 0])
        losses["itm"] = self.match(batch, image_embeds, text_embeds, to_text, to_image)
        losses["mlm"] = self.guess(batch, image_embeds, teacher_images, alpha)
        return losses

    @torch.no_grad()
    def move_teacher(self) -> None:
        """EMA, parameter by parameter."""
        momentum = self.config.momentum
        for own, followed in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            own.data = own.data * momentum + followed.data * (1.0 - momentum)

    def contrast(
        self, image_feats: Tensor, text_feats: Tensor, teacher_image: Tensor, teacher_text: Tensor, alpha: float
    ) -> dict[str, Tensor]:
        """`cma` and `imc` against the batch and the queue."""
        temperature = self.student.temperature
        all_images = torch.cat([teacher_image.T, self.image_queue.clone()], dim=1)
        all_texts = torch.cat([teacher_text.T, self.text_queue.clone()], dim=1)
        hard = torch.zeros(len(image_feats), all_images.shape[1], device=image_feats.device)
        hard.fill_diagonal_(1)
        with torch.no_grad():
            to_text = (teacher_image @ all_texts / temperature).softmax(dim=1)
            to_image = (teacher_text @ all_images / temperature).softmax(dim=1)
            text_targets = alpha * to_text + (1 - alpha) * hard
            image_targets = alpha * to_image + (1 - alpha) * hard

        def loss(feats: Tensor, others: Tensor, targets: Tensor) -> Tensor:
            return -(F.log_softmax(feats @ others / temperature, dim=1) * targets).sum(dim=1).mean()

        across = loss(image_feats, all_texts, text_targets) + loss(text_feats, all_images, image_targets)
        within = loss(image_feats, all_images, hard) + loss(text_feats, all_texts, hard)
        return {"cma": across / 2, "imc": within / 2}

    def local(
        self, image_feats: Tensor, text_feats: Tensor, patches: Tensor, words: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """`lmi` of images and of texts."""
        grid = int(patches.shape[1] ** 0.5)
        side = int(grid**0.5)
        maps = patches.reshape(len(patches), grid, grid, -1).permute(0, 3, 1, 2)
        regions = F.avg_pool2d(maps, side, side).flatten(2).transpose(1, 2)
        image_loss = self.local_of(image_feats, regions, regions.new_ones(regions.shape[:2]))
        return (image_loss + self.local_of(text_feats, words, attention_mask[:, 1:].float())) / 2

    def local_of(self, feats: Tensor, locals_: Tensor, mask: Tensor) -> Tensor:
        """Each global feature and each of its own locals, against all locals of all others."""
        batch, count = mask.shape
        temperature = self.student.temperature
        own = (locals_ @ feats[:, :, None]) / temperature
        others = (feats @ locals_.reshape(batch * count, -1).T / temperature)[:, None].expand(-1, count, -1)
        foreign = 1 - torch.eye(batch, device=mask.device)[:, :, None].expand(-1, -1, count)
        allowed = (foreign * mask[None]).reshape(batch, 1, batch * count)
        others = others * allowed + EXCLUDED_LOGIT * (1 - allowed)
        losses = -F.log_softmax(torch.cat([own, others], dim=2), dim=2)[:, :, 0]
        return ((losses * mask).sum(dim=1) / mask.sum(dim=1)).mean()

    @torch.no_grad()
    def enqueue(self, image_feats: Tensor, text_feats: Tensor) -> None:
        """Write the batch over the oldest features."""
        slots = (self.pointer + torch.arange(len(image_feats), device=image_feats.device)) % self.config.queue_size
        self.image_queue[:, slots] = image_feats.T.float()
        self.text_queue[:, slots] = text_feats.T.float()
        self.pointer = (self.pointer + len(image_feats)) % self.config.queue_size

    def match(
        self, batch: PlainBatch, image_embeds: Tensor, text_embeds: Tensor, to_text: Tensor, to_image: Tensor
    ) -> Tensor:
        """`itm`: a pass for the matched pairs and one for the unmatched."""
        mask = batch.attention_mask
        images, texts = batch.negative_images, batch.negative_texts
        images = draw_in_a_loop(to_image) if images is None else images
        texts = draw_in_a_loop(to_text) if texts is None else texts
        matched = self.student.fuse(text_embeds, mask, image_embeds)
        negative_images = torch.stack([image_embeds[index] for index in images])
        negative_texts = torch.stack([text_embeds[index] for index in texts])
        negative_masks = torch.stack([mask[index] for index in texts])
        unmatched = self.student.fuse(
            torch.cat([text_embeds, negative_texts]),
            torch.cat([mask, negative_masks]),
            torch.cat([negative_images, image_embeds]),
        )
        logits = self.student.itm_head(torch.cat([matched[:, 0], unmatched[:, 0]]))
        labels = torch.cat([logits.new_ones(len(mask)), logits.new_zeros(2 * len(mask))]).long()
        return F.cross_entropy(logits, labels)

    def guess(self, batch: PlainBatch, image_embeds: Tensor, teacher_images: Tensor, alpha: float) -> Tensor:
        """`mlm`: student and teacher each through all layers, vocabulary logits at every position."""
        masked_ids, labels = batch.masked_ids, batch.labels
        if masked_ids is None or labels is None:
            masked_ids, labels = mask_tokens(batch.input_ids, self.text, self.config.mlm_probability)
        with torch.no_grad():
            guesses = self.word_logits(self.teacher, masked_ids, batch.attention_mask, teacher_images).softmax(dim=-1)
        logits = self.word_logits(self.student, masked_ids, batch.attention_mask, image_embeds)
        hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        soft = -(F.log_softmax(logits, dim=-1) * guesses).sum(dim=-1)
        return (1 - alpha) * hard + alpha * soft[labels != -100].mean()

    @staticmethod
    def word_logits(model: PlainModel, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> Tensor:
        """`[batch, tokens, vocabulary]`."""
        text_embeds = model.encode_text(input_ids, attention_mask)
        return model.word_logits(model.fuse(text_embeds, attention_mask, image_embeds))


# Logit of a local feature that lmi must not count, as published.
EXCLUDED_LOGIT = -1e4


@torch.no_grad()
def draw_in_a_loop(logits: Tensor) -> list[int]:
    """One column a row in proportion to its softmax, without the diagonal."""
    weights = logits.softmax(dim=1) + 1e-6
    weights.fill_diagonal_(0)
    return [int(torch.multinomial(row, 1).item()) for row in weights]


def mask_tokens(input_ids: Tensor, text: TextConfig, probability: float) -> tuple[Tensor, Tensor]:
    """BERT's masking: `[batch, tokens]` with tokens masked, and the masked tokens (-100 elsewhere)."""

    def chance(value: float) -> Tensor:
        return torch.bernoulli(torch.full(input_ids.shape, value, device=input_ids.device)).bool()

    chosen = chance(probability)
    chosen &= (input_ids != text.pad_id) & (input_ids != text.cls_id)
    labels = input_ids.masked_fill(~chosen, -100)
    replaced = chance(0.8) & chosen
    swapped = chance(0.5) & chosen & ~replaced
    words = torch.randint(text.vocabulary_size, input_ids.shape, device=input_ids.device)
    return torch.where(swapped, words, input_ids.masked_fill(replaced, text.mask_id)), labels


def sum_of_losses(losses: dict[str, Tensor]) -> Tensor:
    """The mean of the contrastive terms, plus matching, plus masking."""
    return (losses["cma"] + losses["imc"] + losses["lmi"]) / 3 + losses["itm"] + losses["mlm"]


def plain_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW one parameter at a time, with the published groups."""
    decayed = [value for value in model.parameters() if value.ndim != 1]
    others = [value for value in model.parameters() if value.ndim == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, foreach=False)
