"""Pre-training: the five objectives over one batch, with no work that no enabled objective needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tercet.config import ObjectivesConfig
from tercet.data.loader import Batch
from tercet.model.layers import ImageMemory, JoinedMemory
from tercet.model.tercet import Tercet
from tercet.model.text import FusionEncoder, class_rows
from tercet.objectives.contrast import (
    Candidates,
    cross_modal,
    gather_candidates,
    intra_modal,
    same_image,
    similarity,
)
from tercet.objectives.features import FeatureQueue, Features, Teacher, extract_features
from tercet.objectives.local import local_global, pool_patches
from tercet.objectives.masking import MaskedTexts, hide_words, masked_language
from tercet.objectives.matching import Negatives, draw_negatives, matching
from tercet.tasks.task import Task


@dataclass
class PairBatch:
    """A batch of pairs on the device.

    Attributes:
        images: `[batch, 3, height, width]`, the student's view.
        second_views: the teacher's view of the same images; None when nothing reads it.
        input_ids: `[batch, tokens]`.
        attention_mask: bool `[batch, tokens]`.
        image_ids: `[batch]`, the same for all captions of one image.
        masked: the texts with hidden words; None without masked language modelling.
    """

    images: Tensor
    second_views: Tensor | None
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor
    masked: MaskedTexts | None = None


@dataclass
class PairOutput:
    """What a step gives.

    Attributes:
        losses: `{name: loss}` of the enabled objectives.
        image_feats: what the queue takes of the images, `[batch, embed_dim]`; None without a queue.
        text_feats: the same for the texts.
    """

    losses: dict[str, Tensor]
    image_feats: Tensor | None = None
    text_feats: Tensor | None = None


@dataclass
class TeacherView:
    """What the teacher says of a batch, all without gradient.

    Attributes:
        features: of the second view and the text; None when nothing contrasts.
        mlm_logits: its guesses of the hidden words `[masked, vocabulary]`; None when nothing reads them.
    """

    features: Features | None
    mlm_logits: Tensor | None


class Pretraining(Task):
    """Student, teacher and queue, and the losses of a batch of pairs (arXiv 2202.10401).

    A step is `begin_step`, `forward` and, once the losses proved finite, `remember`.
    """

    def __init__(
        self, student: Tercet, config: ObjectivesConfig, published: bool = False, match_ids: bool = True
    ) -> None:
        """Build teacher and queue for `student`.

        Args:
            student: the model to train.
            config: weights of the losses, teacher and queue.
            published: keep the published defects (see `docs/parity.md`).
            match_ids: captions of one image are positives of one another; the published pre-training makes every pair
                its own only positive.
        """
        super().__init__()
        self.student = student
        self.config = config
        self.published = published
        self.match_ids = match_ids
        self.enabled = frozenset(config.enabled)
        self.contrasts = bool(self.enabled & {"cma", "imc", "lmi"})
        self.teaches_words = config.teacher and "mlm" in self.enabled and config.alpha > 0
        needs_teacher = config.teacher and (self.contrasts or self.teaches_words)
        self.teacher = Teacher(student, fused=self.teaches_words) if needs_teacher else None
        # Only cma and imc compare with the queue.
        reads_queue = self.teacher is not None and bool(self.enabled & {"cma", "imc"})
        queue_size = config.queue_size if reads_queue else 0
        self.queue = FeatureQueue(queue_size, student.config.embed_dim) if queue_size else None
        self._freeze_unread()

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of the enabled objectives."""
        return self.config.enabled

    def _freeze_unread(self) -> None:
        """Parameters that no enabled loss reaches take no gradient, so that no optimizer or all-reduce waits for it."""
        fuses = bool(self.enabled & {"itm", "mlm"})
        unread: list[nn.Module | nn.Parameter] = list(self.student.task_parts())
        if not fuses:
            unread.append(self.student.fusion)
        if "itm" not in self.enabled:
            unread.append(self.student.itm_head)
        if "mlm" not in self.enabled:
            unread.append(self.student.mlm_head)
        if not self.contrasts:
            unread += [self.student.vision_projection, self.student.text_projection, self.student.temperature]
        for part in unread:
            part.requires_grad_(False)

    def prepare(self, batch: Batch, device: torch.device, seed: int) -> PairBatch:
        """The host's part of a step: hide words as `seed` says, and send the batch to `device`."""
        masked = None
        if "mlm" in self.enabled:
            generator = torch.Generator().manual_seed(seed)
            text = self.student.config.text
            probability = self.config.mask_probability
            masked = hide_words(batch.input_ids, batch.attention_mask, probability, text, generator).to(device)
        batch = batch.to(device)
        return PairBatch(
            images=batch.images,
            second_views=batch.second_views,
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            image_ids=batch.image_ids,
            masked=masked,
        )

    @torch.no_grad()
    def begin_step(self) -> None:
        """Clamp the temperature and move the teacher towards the student, once before the batches of a step."""
        self.student.temperature.clamp_(self.config.temperature_min, self.config.temperature_max)
        if self.teacher is not None:
            self.teacher.update(self.student, self.config.momentum)

    def forward(self, batch: PairBatch, alpha: float, negatives: Negatives | None = None) -> PairOutput:
        """Losses of a batch.

        Args:
            batch: the pairs.
            alpha: weight of the teacher's soft targets now; it rises over the first epoch.
            negatives: hard negatives already drawn; None draws them.
        """
        features, masked_embeds = self._student_features(batch)
        teacher = self._teacher_view(batch, alpha)
        losses: dict[str, Tensor] = {}
        seen = teacher and teacher.features
        with torch.autocast(features.image_feats.device.type, enabled=False):
            if self.contrasts:
                losses |= self._contrastive_losses(batch, features, seen, alpha)
            if "itm" in self.enabled and negatives is None:
                negatives = self._draw_negatives(batch, features, seen)
        losses |= self._fused_losses(batch, features, masked_embeds, teacher, negatives, alpha)
        if self.queue is None or teacher is None or teacher.features is None:
            return PairOutput(losses)
        return PairOutput(losses, teacher.features.image_feats, teacher.features.text_feats)

    @torch.no_grad()
    def remember(self, batch: PairBatch, output: PairOutput) -> None:
        """Put the teacher's features of a finished batch into the queue."""
        if self.queue is not None and output.image_feats is not None and output.text_feats is not None:
            self.queue.enqueue(output.image_feats, output.text_feats, batch.image_ids)

    def _positive_ids(self, batch: PairBatch) -> Tensor | None:
        return batch.image_ids if self.match_ids else None

    def _student_features(self, batch: PairBatch) -> tuple[Features, Tensor | None]:
        """Features of the clean texts, and `text_embeds` of the masked ones, `[batch, tokens, width]`."""
        image_embeds = self.student.encode_image(batch.images, self.config.patch_drop)
        masked_ids = None if batch.masked is None else batch.masked.input_ids
        text_embeds, masked_embeds = encode_texts(self.student, batch.attention_mask, [batch.input_ids, masked_ids])
        assert text_embeds is not None
        return extract_features(self.student, image_embeds, text_embeds, batch.attention_mask), masked_embeds

    @torch.no_grad()
    def _teacher_view(self, batch: PairBatch, alpha: float) -> TeacherView | None:
        if self.teacher is None or batch.second_views is None:
            return None
        model = self.teacher.model
        masked = batch.masked if self.teaches_words and alpha > 0 else None
        if not self.contrasts and masked is None:
            return None
        image_embeds = model.encode_image(batch.second_views)
        texts = encode_texts(
            model,
            batch.attention_mask,
            [
                batch.input_ids if self.contrasts else None,
                None if masked is None else masked.input_ids,
            ],
        )
        features, mlm_logits = None, None
        if texts[0] is not None:
            features = extract_features(model, image_embeds, texts[0], batch.attention_mask)
        if texts[1] is not None and masked is not None:
            memory = model.remember(image_embeds, count_readers(batch, 0, masked))
            fused = model.fuse(texts[1], batch.attention_mask, memory, masked.rows)
            mlm_logits = model.mlm_logits(fused.flatten(0, 1)[masked.chosen])
        return TeacherView(features, mlm_logits)

    def _candidates(self, batch: PairBatch, features: Features, teacher: Features | None) -> Candidates:
        source = teacher or features
        return gather_candidates(
            source.image_feats,
            source.text_feats,
            self._positive_ids(batch),
            self.queue,
            exclude_empty=not self.published,
        )

    def _contrastive_losses(
        self, batch: PairBatch, features: Features, teacher: Features | None, alpha: float
    ) -> dict[str, Tensor]:
        temperature = self.student.temperature
        losses: dict[str, Tensor] = {}
        candidates = self._candidates(batch, features, teacher)
        if "cma" in self.enabled:
            believed = (None, None) if teacher is None else (teacher.image_feats, teacher.text_feats)
            pair = cross_modal(features.image_feats, features.text_feats, *believed, candidates, temperature, alpha)
            losses["cma"] = torch.stack(pair).mean()
        if "imc" in self.enabled:
            pair = intra_modal(features.image_feats, features.text_feats, candidates, temperature)
            losses["imc"] = torch.stack(pair).mean()
        if "lmi" in self.enabled and teacher is not None:
            losses["lmi"] = torch.stack(self.local_losses(batch, features, teacher)).mean()
        return losses

    def local_losses(self, batch: PairBatch, features: Features, teacher: Features) -> tuple[Tensor, Tensor]:
        """`lmi` of the images and of the texts, `[]` each."""
        assert self.teacher is not None
        model, temperature = self.teacher.model, self.student.temperature
        ids = None if self.published else self._positive_ids(batch)
        same = same_image(ids, features.image_feats.shape[0], features.image_feats.device)
        with torch.no_grad():
            patches = model.project_image(teacher.image_embeds[:, 1:].float())
            regions = pool_patches(patches, self.config.local_grid, self.published)
            words = model.project_text(teacher.text_embeds[:, 1:].float())
        image_loss = local_global(features.image_feats, regions, temperature, same)
        text_mask = batch.attention_mask[:, 1:].bool()
        text_loss = local_global(features.text_feats, words, temperature, same, text_mask)
        return image_loss, text_loss

    @torch.no_grad()
    def _draw_negatives(self, batch: PairBatch, features: Features, teacher: Features | None) -> Negatives:
        others = teacher or features
        temperature = self.student.temperature
        return draw_negatives(
            image_logits=similarity(features.image_feats, others.text_feats, temperature),
            text_logits=similarity(features.text_feats, others.image_feats, temperature),
            same=same_image(self._positive_ids(batch), features.image_feats.shape[0], features.image_feats.device),
        )

    def _fused_losses(
        self,
        batch: PairBatch,
        features: Features,
        masked_embeds: Tensor | None,
        teacher: TeacherView | None,
        negatives: Negatives | None,
        alpha: float,
    ) -> dict[str, Tensor]:
        """`itm` and `mlm`: every pass through the lower fusion layers in one batch, reading one image memory."""
        passes = FusionPasses()
        memory = None
        if self.enabled & {"itm", "mlm"}:
            matching_passes = 0 if negatives is None else 3
            memory = self.student.remember(features.image_embeds, count_readers(batch, matching_passes, batch.masked))
        if memory is not None and negatives is not None:
            passes.add_matching(features, memory, negatives)
        if memory is not None and masked_embeds is not None:
            passes.add(masked_embeds, batch.attention_mask, memory)
        if not passes.parts:
            return {}
        fusion = self.student.fusion
        hidden = passes.lower(fusion)
        losses: dict[str, Tensor] = {}
        pairs = 0
        if negatives is not None:
            pairs = 3 * features.image_feats.shape[0]
            rows = class_rows(hidden[:pairs])
            fused = fusion.last(hidden[:pairs], passes.attention_mask[:pairs], passes.memory(0, 2), rows)
            logits = self.student.itm_head(fused[:, 0]).float()
            losses["itm"] = matching(published_order(logits), negatives)
        if masked_embeds is not None and batch.masked is not None:
            rows = batch.masked.rows
            fused = fusion.last(hidden[pairs:], batch.attention_mask, passes.memory(-1), rows)
            logits = self.student.mlm_logits(fused.flatten(0, 1)[batch.masked.chosen])
            guesses = None if teacher is None else teacher.mlm_logits
            losses["mlm"] = masked_language(logits, batch.masked.labels, guesses, alpha)
        return losses


class FusionPasses:
    """Pairs of several passes, collected to go through the fusion encoder as one batch.

    Attributes:
        texts: the texts that pairs consist of, `[texts, tokens, width]` each; every text once.
        masks: their attention masks, `[texts, tokens]` each.
        indices: for the pairs of each pass the indices of their texts, `[pairs]` each.
        parts: the memory of each pass and the number of pairs that read it.
    """

    def __init__(self) -> None:
        self.texts: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.parts: list[tuple[ImageMemory, int]] = []

    def add(self, text_embeds: Tensor, attention_mask: Tensor, memory: ImageMemory) -> None:
        """Add `[pairs, tokens, width]` texts that read `memory`."""
        self._add_pairs(self._add_texts(text_embeds, attention_mask), memory)

    def add_matching(self, features: Features, memory: ImageMemory, negatives: Negatives) -> None:
        """Add each image with its own and its negative text, side by side, then each text with its negative image."""
        texts = self._add_texts(features.text_embeds, features.attention_mask)
        self._add_pairs(torch.stack([texts, texts[negatives.texts]], dim=1).flatten(), memory)
        self._add_pairs(texts, memory.select(negatives.images))

    def _add_texts(self, text_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Their indices."""
        before = sum(text.shape[0] for text in self.texts)
        self.texts.append(text_embeds)
        self.masks.append(attention_mask)
        return torch.arange(before, before + text_embeds.shape[0], device=text_embeds.device)

    def _add_pairs(self, texts: Tensor, memory: ImageMemory) -> None:
        self.indices.append(texts)
        self.parts.append((memory, texts.shape[0]))

    def lower(self, fusion: FusionEncoder) -> Tensor:
        """All pairs through the lower fusion layers, `[pairs, tokens, width]`."""
        return fusion.lower(torch.cat(self.texts), torch.cat(self.masks), self.memory(0), torch.cat(self.indices))

    @property
    def attention_mask(self) -> Tensor:
        """The masks of all pairs, `[pairs, tokens]`."""
        return torch.cat(self.masks)[torch.cat(self.indices)]

    def memory(self, first: int, last: int | None = None) -> ImageMemory:
        """The memories of the passes from `first` up to `last`."""
        return JoinedMemory(self.parts[first:last])


def count_readers(batch: PairBatch, matching_passes: int, masked: MaskedTexts | None) -> tuple[int, int]:
    """Text tokens that read an image in a lower fusion layer and in the last one, where few rows are computed."""
    tokens = batch.input_ids.shape[1]
    slots = 0 if masked is None else masked.rows.shape[1]
    return tokens * (matching_passes + (masked is not None)), matching_passes + slots


def published_order(logits: Tensor) -> Tensor:
    """Rows of `add_matching` `[3 * batch, 2]` as matched pairs, negative images, negative texts."""
    pairs = logits.shape[0] // 3 * 2
    matched, negative_texts = logits[:pairs:2], logits[1:pairs:2]
    return torch.cat([matched, logits[pairs:], negative_texts])


def encode_texts(model: Tercet, attention_mask: Tensor, texts: list[Tensor | None]) -> list[Tensor | None]:
    """`text_embeds` `[batch, tokens, width]` of several readings of one batch of texts, through the encoder together.

    Args:
        model: student or teacher.
        attention_mask: `[batch, tokens]`, the same for every reading.
        texts: input ids `[batch, tokens]`; None stays None.
    """
    given = [ids for ids in texts if ids is not None]
    embeds = iter(model.encode_text(torch.cat(given), attention_mask.repeat(len(given), 1)).chunk(len(given)))
    return [None if ids is None else next(embeds) for ids in texts]
