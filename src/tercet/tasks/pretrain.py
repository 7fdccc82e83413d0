"""Pre-training: the five objectives over one batch, with no work that no enabled objective needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tercet.config import ObjectivesConfig
from tercet.data.loader import Batch
from tercet.data.order import mix
from tercet.distributed import RankLayout
from tercet.model.memory import ImageMemory
from tercet.model.tercet import Tercet
from tercet.objectives.contrast import (
    cross_modal,
    gather_candidates,
    intra_modal,
    same_image,
    similarity,
)
from tercet.objectives.features import FeatureQueue, Features, Teacher, extract_features
from tercet.objectives.local import local_global, pool_patches
from tercet.objectives.masking import masked_language
from tercet.objectives.matching import Negatives, draw_negatives, gumbel_noise, matching
from tercet.tasks.fusion_passes import (
    FusionPasses,
    count_readers,
    encode_texts,
    finish,
    gather_features,
    published_order,
)
from tercet.tasks.pair_batch import Hiding, PairBatch, lay_out
from tercet.tasks.task import Task


@dataclass
class PairOutput:
    """What a step gives.

    Attributes:
        losses: `{name: loss}` of the enabled objectives.
        sound: bool `[]`, whether the features of the pairs here are finite.
        image_feats: what the queue takes of the images of all ranks, `[batch, embed_dim]`; None without a queue.
        text_feats: the same for the texts.
    """

    losses: dict[str, Tensor]
    sound: Tensor
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

    A step is `begin_step`, `forward` and, with the gradients at hand, `remember`.
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
        """The host's part of a step: hide words as `seed` says, and send the batch to `device`; see `lay_out`."""
        probability = self.config.mlm_probability if "mlm" in self.enabled else None
        second = self.config.second_text_mask if self.teacher is not None and self.contrasts else 0.0
        hiding = Hiding(probability, second)
        gather = self.config.gather_negatives
        return lay_out(batch, device, seed, self.student.config.text, hiding, gather, by_id=self.match_ids)

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
        others = self._others(batch, seen or features)
        with torch.autocast(features.image_feats.device.type, enabled=False):
            if self.contrasts:
                losses |= self._contrastive_losses(batch, features, seen, others, alpha)
            if "itm" in self.enabled and negatives is None:
                negatives = self._draw_negatives(batch, features, others)
        losses |= self._fused_losses(batch, features, masked_embeds, teacher, negatives, alpha)
        sound = torch.stack([feats.isfinite().all() for feats in _own_feats(features, seen)]).all()
        if self.queue is None or seen is None:
            return PairOutput(losses, sound)
        return PairOutput(losses, sound, *others)

    def is_sound(self, output: PairOutput) -> Tensor:
        """Bool `[]`, whether the features of this rank's pairs are finite."""
        return output.sound

    @torch.no_grad()
    def remember(self, batch: PairBatch, output: PairOutput, taken: Tensor | None = None) -> None:
        """Put the teacher's features of a batch whose step was taken into the queue."""
        if self.queue is not None and output.image_feats is not None and output.text_feats is not None:
            self.queue.enqueue(output.image_feats, output.text_feats, batch.all_image_ids, taken)

    def _positive_ids(self, batch: PairBatch) -> Tensor | None:
        return batch.all_image_ids if self.match_ids else None

    def _gathers(self, batch: PairBatch) -> bool:
        """Whether negatives are found among the pairs of several ranks."""
        return self.config.gather_negatives and len(batch.spread.sizes) > 1

    def _pool(self, batch: PairBatch) -> RankLayout:
        """What negatives are drawn among: the pairs of all ranks, or those of this one."""
        return batch.spread if self._gathers(batch) else RankLayout((len(batch.images),))

    def _same_in_pool(self, batch: PairBatch, by_id: bool) -> Tensor:
        """Bool `[batch, pool]`: which pairs of the pool show a pair's own image."""
        pool = self._pool(batch)
        ids = batch.all_image_ids if self._gathers(batch) else batch.image_ids
        return same_image(ids if by_id else None, pool.total, batch.images.device)[pool.rows]

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
                batch.second_ids if self.contrasts else None,
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

    def _others(self, batch: PairBatch, features: Features) -> tuple[Tensor, Tensor]:
        """What a batch is compared with and draws from: `image_feats` and `text_feats` of every rank, of the teacher's
        features where there is one, or of this rank alone where nothing reads the others'."""
        feats = (features.image_feats, features.text_feats)
        if not (self.contrasts or self._gathers(batch)):
            return feats
        return batch.spread.gather(feats[0]), batch.spread.gather(feats[1])

    def _contrastive_losses(
        self,
        batch: PairBatch,
        features: Features,
        teacher: Features | None,
        others: tuple[Tensor, Tensor],
        alpha: float,
    ) -> dict[str, Tensor]:
        temperature = self.student.temperature
        losses: dict[str, Tensor] = {}
        ids, rows = self._positive_ids(batch), batch.spread.rows
        candidates = gather_candidates(*others, ids, self.queue, exclude_empty=not self.published, rows=rows)
        if "cma" in self.enabled:
            believed = (None, None) if teacher is None else (teacher.image_feats, teacher.text_feats)
            feats = (features.image_feats, features.text_feats)
            sigmoid = self.config.alignment == "sigmoid"
            pair = cross_modal(*feats, *believed, candidates, temperature, alpha, batch.count("pairs"), sigmoid)
            losses["cma"] = torch.stack(pair).mean()
        if "imc" in self.enabled:
            feats = (features.image_feats, features.text_feats)
            pair = intra_modal(*feats, candidates, temperature, batch.count("pairs"))
            losses["imc"] = torch.stack(pair).mean()
        if "lmi" in self.enabled and teacher is not None:
            losses["lmi"] = torch.stack(self.local_losses(batch, features, teacher)).mean()
        return losses

    def local_losses(self, batch: PairBatch, features: Features, teacher: Features) -> tuple[Tensor, Tensor]:
        """`lmi` of the images and of the texts, `[]` each."""
        assert self.teacher is not None
        model, temperature = self.teacher.model, self.student.temperature
        pool = self._pool(batch)
        same = self._same_in_pool(batch, by_id=self.match_ids and not self.published)
        with torch.no_grad():
            patches = model.project_image(teacher.image_embeds[:, 1:].float())
            regions = pool.gather(pool_patches(patches, self.config.local_grid, self.published))
            words = pool.gather(model.project_text(teacher.text_embeds[:, 1:].float()))
            mask = pool.gather(batch.attention_mask[:, 1:].bool())
        pairs, worded = batch.count("pairs"), batch.count("worded")
        image_loss = local_global(features.image_feats, regions, temperature, same, None, pool.start, pairs)
        text_loss = local_global(features.text_feats, words, temperature, same, mask, pool.start, worded)
        return image_loss, text_loss

    @torch.no_grad()
    def _draw_negatives(self, batch: PairBatch, features: Features, others: tuple[Tensor, Tensor]) -> Negatives:
        pool = self._pool(batch)
        # All of them, or of the gathered ones those of this rank.
        images, texts = (feats if len(feats) == pool.total else feats[batch.spread.rows] for feats in others)
        temperature = self.student.temperature
        device = features.image_feats.device
        # Drawn for the whole pool on every rank that shares it, so that its rows get the same wherever they are.
        seed = mix(batch.seed, 0 if self._gathers(batch) else batch.spread.start)
        generator = torch.Generator(device).manual_seed(seed)
        noise = gumbel_noise((2, pool.total, pool.total), device, generator)
        return draw_negatives(
            image_logits=similarity(features.image_feats, texts, temperature),
            text_logits=similarity(features.text_feats, images, temperature),
            same=self._same_in_pool(batch, by_id=self.match_ids),
            noise=noise[:, pool.rows],
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
        masked = batch.masked if masked_embeds is not None else None
        if not self.enabled & {"itm", "mlm"} or (negatives is None and masked is None):
            return {}
        student, passes = self.student, FusionPasses()
        matching_passes = 0 if negatives is None else 2 if self._gathers(batch) else 3
        memory = student.remember(features.image_embeds, count_readers(batch, matching_passes, masked))
        readers: list[Tensor] = []
        unmatched: list[tuple[list[Tensor], ImageMemory]] = []
        if negatives is not None:
            texts = passes.add_texts(features.text_embeds, features.attention_mask)
            others, images = self._unmatched(batch, features, negatives, passes, memory)
            readers, unmatched = [texts, others], [([texts], images)]
        if masked_embeds is not None:
            readers.append(passes.add_texts(masked_embeds, batch.attention_mask))
        for own_texts, images in [(readers, memory), *unmatched]:
            passes.add_pairs(own_texts, images)
        own, *negative_images = passes.lower(student.fusion)
        losses: dict[str, Tensor] = {}
        if negatives is not None:
            fused = finish(student.fusion, [own.of_texts(slice(2)), *negative_images])
            logits = student.itm_head(fused[:, 0])
            losses["itm"] = matching(published_order(logits), negatives, batch.count("judged"))
        if masked is not None:
            fused = finish(student.fusion, [own.of_texts(slice(-1, None))], masked.rows)
            logits = student.mlm_logits(fused.flatten(0, 1)[masked.chosen])
            guesses = None if teacher is None else teacher.mlm_logits
            losses["mlm"] = masked_language(logits, masked.labels, guesses, alpha, batch.count("hidden"))
        return losses

    def _unmatched(
        self,
        batch: PairBatch,
        features: Features,
        negatives: Negatives,
        passes: FusionPasses,
        memory: ImageMemory,
    ) -> tuple[Tensor, ImageMemory]:
        """The negative text of every image, as indices `[batch]` into `passes`, and the negative images.

        The texts of `batch` are the first of `passes`.
        """
        if not self._gathers(batch):
            return negatives.texts, memory.select(negatives.images)
        everyone = gather_features(features, batch.spread)
        others = passes.add_texts(everyone.text_embeds[negatives.texts], everyone.attention_mask[negatives.texts])
        images = everyone.image_embeds[negatives.images]
        return others, self.student.remember(images, count_readers(batch, 1, None))


def _own_feats(features: Features, teacher: Features | None) -> list[Tensor]:
    seen = [features] if teacher is None else [features, teacher]
    return [feats.detach() for part in seen for feats in (part.image_feats, part.text_feats)]
