"""Pre-training: the five objectives over one batch, with no work that no enabled objective needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tercet.config import ObjectivesConfig, TextConfig
from tercet.data.batch import Batch, to_device
from tercet.data.order import mix
from tercet.distributed import RankLayout, Ranks
from tercet.model.tercet import Tercet
from tercet.model.text import CrossAttentionKV, JoinedKV, class_rows
from tercet.objectives.contrast import cross_modal, gather_candidates, intra_modal, same_image, similarity
from tercet.objectives.local import local_global, pool_patches
from tercet.objectives.loss import distilled_cross_entropy
from tercet.objectives.masking import MaskedTexts, mask_tokens
from tercet.objectives.matching import Negatives, gumbel_noise, matching, sample_negatives
from tercet.objectives.state import FeatureQueue, Teacher
from tercet.tasks.task import Task, TaskOutput

ENCODERS = ("vision", "text", "vision_projection", "text_projection")
PUBLISHED_RETRIEVAL_REGIONS = 4  # along a side, whatever the image's size


@dataclass
class PairBatch:
    """A batch of pairs on the device, or the part of it that this rank has.

    Attributes:
        images: `[batch, 3, height, width]`, the student's view.
        second_views: the teacher's view of the same images; None when nothing reads it.
        input_ids: `[batch, tokens]`.
        attention_mask: bool `[batch, tokens]`.
        image_ids: `[batch]`, the same for all captions of one image.
        masked: the texts with masked tokens; None without masked language modelling.
        spread: how the whole batch is spread over the ranks; by default all of it is here.
        all_image_ids: `image_ids` of the whole batch.
        counts: what the losses divide by, see `collate`; without an entry by as many as there are here.
        seed: what the step draws on the device follows from it.
    """

    images: Tensor
    second_views: Tensor | None
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor
    masked: MaskedTexts | None = None
    spread: RankLayout = None  # type: ignore[assignment] - set below
    all_image_ids: Tensor = None  # type: ignore[assignment] - set below
    counts: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.spread is None:
            self.spread = RankLayout((len(self.images),))
        if self.all_image_ids is None:
            self.all_image_ids = self.image_ids


@dataclass
class TeacherOutput:
    """What the teacher says of a batch, without gradient; None where no enabled loss reads it.

    Attributes:
        image_feats: unit vectors `[batch, embed_dim]` of the second view.
        text_feats: unit vectors `[batch, embed_dim]`.
        region_feats: `[batch, regions, embed_dim]`, pooled from the patches.
        token_feats: unit vectors `[batch, tokens - 1, embed_dim]`.
        mlm_logits: vocabulary logits of the masked tokens `[masked, vocabulary]`.
    """

    image_feats: Tensor | None = None
    text_feats: Tensor | None = None
    region_feats: Tensor | None = None
    token_feats: Tensor | None = None
    mlm_logits: Tensor | None = None


@dataclass
class PairOutput(TaskOutput):
    """What a step gives.

    Attributes:
        losses: `{name: loss}` of the enabled objectives.
        sound: bool `[]`, whether the features of the pairs here are finite.
        image_feats: the teacher's, of the images of all ranks, `[batch, embed_dim]`; None without a queue to fill.
        text_feats: the same for the texts.
    """

    losses: dict[str, Tensor]
    sound: Tensor
    image_feats: Tensor | None = None
    text_feats: Tensor | None = None


class Pretraining(Task):
    """Student, teacher and queue, and the losses of a batch of pairs (arXiv 2202.10401).

    A step is `begin_step`, `forward` and, once the gradients are known, `enqueue`.
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
        self.distills_mlm = config.teacher and "mlm" in self.enabled and config.alpha > 0
        self.teacher = None
        if config.teacher and (self.contrasts or self.distills_mlm):
            self.teacher = Teacher(student, (*ENCODERS, "fusion", "mlm_head") if self.distills_mlm else ENCODERS)
        self.queue = None
        if self.teacher is not None and self.enabled & {"cma", "imc"} and config.queue_size:
            self.queue = FeatureQueue(config.queue_size, student.config.embed_dim)
        self._freeze_unread()

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of the enabled objectives."""
        return self.config.enabled

    def _freeze_unread(self) -> None:
        """Parameters that no enabled loss reaches take no gradient, so that no optimizer or all-reduce waits for it."""
        student = self.student
        unread: list[nn.Module | nn.Parameter] = list(student.task_parts())
        if not self.enabled & {"itm", "mlm"}:
            unread.append(student.fusion)
        if "itm" not in self.enabled:
            unread.append(student.itm_head)
        if "mlm" not in self.enabled:
            unread.append(student.mlm_head)
        if not self.contrasts:
            unread += [student.vision_projection, student.text_projection, student.temperature]
        for part in unread:
            part.requires_grad_(False)

    def prepare(self, batch: Batch, device: torch.device, seed: int) -> PairBatch:
        """The host's part of a step: mask tokens as `seed` says, and send the batch to `device`; see `collate`."""
        probability = self.config.mlm_probability if "mlm" in self.enabled else None
        gather = self.config.gather_negatives
        return collate(batch, device, seed, self.student.config.text, probability, gather, self.match_ids)

    @torch.no_grad()
    def begin_step(self) -> None:
        """Clamp the temperature and move the teacher towards the student, once before the batches of a step."""
        self.student.temperature.clamp_(self.config.temperature_min, self.config.temperature_max)
        if self.teacher is not None:
            self.teacher.update(self.student, self.config.momentum)

    def forward(self, batch: PairBatch, alpha: float, negatives: Negatives | None = None) -> PairOutput:
        """The enabled losses of a batch (arXiv 2202.10401, sections 3.1 to 3.5).

        Args:
            batch: the pairs.
            alpha: weight of the teacher's soft targets now; it rises over the first epoch.
            negatives: hard negatives already drawn; None draws them.
        """
        student, enabled, counts = self.student, self.enabled, batch.counts
        temperature = student.temperature

        image_embeds = student.encode_image(batch.images, self.config.patch_drop)  # [batch, 1 + patches, vision_width]
        text_embeds, masked_embeds = encode_texts(student, batch, masked=batch.masked is not None)
        image_feats = student.project_image(image_embeds[:, 0])  # [batch, embed_dim], unit length
        text_feats = student.project_text(text_embeds[:, 0])
        teacher = self._ask_teacher(batch, alpha)
        # What pairs are compared with: the teacher's features where there is one, of all ranks where a loss reads them.
        own = image_feats, text_feats
        if teacher.image_feats is not None and teacher.text_feats is not None:
            own = teacher.image_feats, teacher.text_feats
        sound = torch.stack([feats.detach().isfinite().all() for feats in (image_feats, text_feats, *own)]).all()
        all_feats = own
        if self.contrasts or self._gathers(batch):
            all_feats = batch.spread.gather(own[0]), batch.spread.gather(own[1])

        losses: dict[str, Tensor] = {}
        with torch.autocast(image_feats.device.type, enabled=False):
            if enabled & {"cma", "imc"}:
                ids = batch.all_image_ids if self.match_ids else None
                candidates = gather_candidates(*all_feats, ids, self.queue, not self.published, batch.spread.rows)
                pairs = counts.get("pairs")
                if "cma" in enabled:
                    targets = None if self.teacher is None else own
                    losses["cma"] = cross_modal(image_feats, text_feats, candidates, temperature, pairs, targets, alpha)
                if "imc" in enabled:
                    losses["imc"] = intra_modal(image_feats, text_feats, candidates, temperature, pairs)
            if "lmi" in enabled:
                losses["lmi"] = self._local_losses(batch, image_feats, text_feats, teacher)
            if "itm" in enabled and negatives is None:
                negatives = self._sample_negatives(batch, image_feats, text_feats, all_feats)

        if enabled & {"itm", "mlm"}:
            itm_logits, mlm_logits = self._fuse(batch, image_embeds, text_embeds, masked_embeds, negatives)
            if itm_logits is not None and negatives is not None:
                losses["itm"] = matching(itm_logits, negatives.valid, counts.get("judged"))
            if mlm_logits is not None and batch.masked is not None:
                labels = batch.masked.labels
                losses["mlm"] = distilled_cross_entropy(
                    mlm_logits, labels, teacher.mlm_logits, alpha, counts.get("masked")
                )
        return PairOutput(losses, sound, *(all_feats if self.queue is not None else ()))

    def is_sound(self, output: PairOutput) -> Tensor:
        """Bool `[]`, whether the features of this rank's pairs are finite."""
        return output.sound

    @torch.no_grad()
    def enqueue(self, batch: PairBatch, output: PairOutput, taken: Tensor | None = None) -> None:
        """Put the teacher's features of a batch whose step was taken into the queue."""
        if self.queue is not None and output.image_feats is not None and output.text_feats is not None:
            self.queue.enqueue(output.image_feats, output.text_feats, batch.all_image_ids, taken)

    @torch.no_grad()
    def _ask_teacher(self, batch: PairBatch, alpha: float) -> TeacherOutput:
        """The second view and the same texts, through what an enabled loss reads of the teacher."""
        output = TeacherOutput()
        masked = batch.masked if self.distills_mlm and alpha > 0 else None
        if self.teacher is None or batch.second_views is None or not (self.contrasts or masked):
            return output
        model = self.teacher.model
        image_embeds = model.encode_image(batch.second_views)
        text_embeds, masked_embeds = encode_texts(model, batch, self.contrasts, masked is not None)
        if text_embeds is not None:
            output.image_feats = model.project_image(image_embeds[:, 0])
            output.text_feats = model.project_text(text_embeds[:, 0])
            if "lmi" in self.enabled:
                side = PUBLISHED_RETRIEVAL_REGIONS if self.published and self.match_ids else None
                output.region_feats = pool_patches(model.project_image(image_embeds[:, 1:]), side, self.published)
                output.token_feats = model.project_text(text_embeds[:, 1:])
        if masked is not None and masked_embeds is not None:
            fused = model.fuse(masked_embeds, batch.attention_mask, model.project_kv(image_embeds), masked.rows)
            output.mlm_logits = model.mlm_logits(fused.flatten(0, 1)[masked.chosen])
        return output

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

    def _local_losses(
        self, batch: PairBatch, image_feats: Tensor, text_feats: Tensor, teacher: TeacherOutput
    ) -> Tensor:
        """`lmi`: the mean of that of the images and that of the texts, `[]`."""
        assert teacher.region_feats is not None and teacher.token_feats is not None
        pool, temperature, counts = self._pool(batch), self.student.temperature, batch.counts
        same = self._same_in_pool(batch, by_id=self.match_ids and not self.published)
        regions, tokens = pool.gather(teacher.region_feats), pool.gather(teacher.token_feats)
        mask = pool.gather(batch.attention_mask[:, 1:])
        images = local_global(image_feats, regions, temperature, same, None, pool.start, counts.get("pairs"))
        texts = local_global(text_feats, tokens, temperature, same, mask, pool.start, counts.get("worded"))
        return (images + texts) / 2

    @torch.no_grad()
    def _sample_negatives(
        self, batch: PairBatch, image_feats: Tensor, text_feats: Tensor, others: tuple[Tensor, Tensor]
    ) -> Negatives:
        """Hard negatives of the pairs here, among `others`: image and text features of this rank or of all of them."""
        pool, temperature, device = self._pool(batch), self.student.temperature, image_feats.device
        images, texts = (feats if len(feats) == pool.total else feats[batch.spread.rows] for feats in others)
        # Drawn for the whole pool on every rank that shares it, so that its rows get the same wherever they are.
        seed = mix(batch.seed, 0 if self._gathers(batch) else batch.spread.start)
        noise = gumbel_noise((2, pool.total, pool.total), device, torch.Generator(device).manual_seed(seed))
        return sample_negatives(
            image_logits=similarity(image_feats, (texts,), temperature),
            text_logits=similarity(text_feats, (images,), temperature),
            same=self._same_in_pool(batch, by_id=self.match_ids),
            noise=noise[:, pool.rows],
        )

    def _fuse(
        self,
        batch: PairBatch,
        image_embeds: Tensor,
        text_embeds: Tensor,
        masked_embeds: Tensor | None,
        negatives: Negatives | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """`itm_logits` `[3 * batch, 2]`, in the order that `matching` reads, and `mlm_logits` `[masked, vocabulary]`.

        All passes read keys and values that are projected once, and go through the lower fusion layers as one batch.
        """
        student, mask = self.student, batch.attention_mask
        own = student.project_kv(image_embeds)
        passes: list[tuple[Tensor, Tensor, CrossAttentionKV]] = []
        if negatives is not None:
            if self._gathers(batch):
                gather = batch.spread.gather
                texts, texts_mask = gather(text_embeds)[negatives.texts], gather(mask)[negatives.texts]
                images = student.project_kv(gather(image_embeds)[negatives.images])
            else:
                texts, texts_mask = text_embeds[negatives.texts], mask[negatives.texts]
                images = own.select(negatives.images)
            passes += [(text_embeds, mask, own), (text_embeds, mask, images), (texts, texts_mask, own)]
        if masked_embeds is not None:
            passes.append((masked_embeds, mask, own))
        masks = torch.cat([mask for _, mask, _ in passes])
        kv = [(kv, len(mask)) for _, mask, kv in passes]
        hidden = student.fusion.lower(torch.cat([embeds for embeds, _, _ in passes]), masks, JoinedKV(kv))

        # The last layer computes [CLS] for matching, and the masked positions for masked language modelling.
        itm_logits, mlm_logits = None, None
        if negatives is not None:
            matched = slice(3 * len(mask))
            rows = class_rows(hidden[matched])
            fused = student.fusion.last(hidden[matched], masks[matched], JoinedKV(kv[:3]), rows)
            itm_logits = student.itm_head(fused[:, 0])
        if masked_embeds is not None and batch.masked is not None:
            fused = student.fusion.last(hidden[-len(mask) :], mask, own, batch.masked.rows)
            mlm_logits = student.mlm_logits(fused.flatten(0, 1)[batch.masked.chosen])
        return itm_logits, mlm_logits


def encode_texts(
    model: Tercet, batch: PairBatch, clean: bool = True, masked: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """`text_embeds` `[batch, tokens, width]` of the clean and of the masked texts, through the encoder together."""
    ids = [batch.input_ids] * clean + ([batch.masked.input_ids] if masked and batch.masked is not None else [])
    embeds = list(model.encode_text(torch.cat(ids), batch.attention_mask.repeat(len(ids), 1)).chunk(len(ids)))
    return embeds.pop(0) if clean else None, embeds.pop() if embeds else None


def collate(
    batch: Batch,
    device: torch.device,
    seed: int,
    text: TextConfig,
    mask_probability: float | None,
    gather: bool,
    by_id: bool,
) -> PairBatch:
    """Mask tokens, and send the batch to `device`.

    The losses divide by what a rank has on average: `pairs`, texts that are `worded` (more than `[CLS]`), `masked`
    tokens, and pairs `judged` by matching, negatives included.  The ranks exchange these numbers host to host, so that
    no device is waited for.

    Args:
        batch: the pairs that this rank read.
        device: where the step runs.
        seed: the same on every rank.
        text: names the special ids.
        mask_probability: of each token; None without masked language modelling.
        gather: negatives are found among the pairs of all ranks.
        by_id: pairs of one image are no negatives of one another.
    """
    ranks = Ranks()
    worded = int(batch.attention_mask[:, 1:].any(dim=1).sum())
    sizes, tokens, words = ranks.gather_tensor(torch.tensor([len(batch), batch.input_ids.shape[1], worded])).unbind(1)
    spread = RankLayout(tuple(sizes.tolist()), ranks.rank)
    longest = int(tokens.max())
    masked = None
    if mask_probability is not None:
        generator = torch.Generator().manual_seed(seed)
        whole = (spread.total, longest)
        masked = mask_tokens(
            batch.input_ids, batch.attention_mask, mask_probability, text, generator, whole, spread.start
        )
    padded_ids = F.pad(batch.image_ids, (0, max(spread.sizes) - len(batch)))
    labels = 0 if masked is None else len(masked.labels)
    numbers = ranks.gather_tensor(torch.cat([torch.tensor([labels]), padded_ids]))
    image_ids = [row[1 : 1 + size] for row, size in zip(numbers, spread.sizes, strict=True)]
    all_image_ids = torch.cat(image_ids)
    pools = [all_image_ids] if gather else image_ids
    counts = {
        "pairs": spread.total,
        "worded": int(words.sum()),
        "masked": int(numbers[:, 0].sum()),
        "judged": sum(_count_judged(ids if by_id else None, len(ids)) for ids in pools),
    }
    if gather:  # texts of all ranks are padded to one length, so that they can be gathered
        more = (0, longest - batch.input_ids.shape[1])
        batch = dataclasses.replace(
            batch,
            input_ids=F.pad(batch.input_ids, more, value=text.pad_id),
            attention_mask=F.pad(batch.attention_mask, more, value=False),
        )
        if masked is not None:
            masked = dataclasses.replace(masked, input_ids=F.pad(masked.input_ids, more, value=text.pad_id))
    batch = to_device(batch, device)
    return PairBatch(
        images=batch.images,
        second_views=batch.second_views,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        image_ids=batch.image_ids,
        masked=None if masked is None else masked.to(device),
        spread=spread,
        all_image_ids=all_image_ids.to(device, non_blocking=True),
        counts={name: (count or 1) / ranks.world for name, count in counts.items()},
        seed=seed,
    )


def _count_judged(image_ids: Tensor | None, pairs: int) -> int:
    """How many pairs matching judges where negatives are drawn among `pairs`: every matched one, and two unmatched ones
    for each that has a negative."""
    same = same_image(image_ids, pairs, torch.device("cpu"))
    return pairs + 2 * int((~same.all(dim=1)).sum())
