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
from tercet.model.text import CrossAttentionKV, FusionEncoder, JoinedKV, class_rows
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
        layout: layout of the whole batch over the ranks; by default all of it is here.
        pool: layout of the pairs that `itm` and `lmi` draw negatives from: those of this rank, or `layout`.
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
    layout: RankLayout = None  # type: ignore[assignment] - set below
    pool: RankLayout = None  # type: ignore[assignment] - set below
    all_image_ids: Tensor = None  # type: ignore[assignment] - set below
    counts: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        here = RankLayout((len(self.images),))
        self.layout = self.layout or here
        self.pool = self.pool or here
        if self.all_image_ids is None:
            self.all_image_ids = self.image_ids


@dataclass
class TeacherOutput:
    """What the teacher says of a batch, without gradient; None where no enabled loss reads it.

    Attributes:
        feats: unit vectors `[batch, embed_dim]` of the second views, and of the texts.
        region_feats: `[batch, regions, embed_dim]`, pooled from the patches.
        token_feats: unit vectors `[batch, tokens - 1, embed_dim]`.
        mlm_logits: vocabulary logits of the masked tokens `[masked, vocabulary]`.
    """

    feats: tuple[Tensor, Tensor] | None = None
    region_feats: Tensor | None = None
    token_feats: Tensor | None = None
    mlm_logits: Tensor | None = None


@dataclass
class PairOutput(TaskOutput):
    """What a step gives.

    Attributes:
        finite: bool `[]`, whether the features of the pairs on this rank are.
        queued: the teacher's features of the images and of the texts of all ranks, `[batch, embed_dim]`; None without
            a queue.
    """

    finite: Tensor
    queued: tuple[Tensor, Tensor] | None = None


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
            published: keep the published defects (see `docs/method.md`).
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
        student, enabled, counts, mask = self.student, self.enabled, batch.counts, batch.attention_mask
        temperature, device = student.temperature, batch.images.device
        losses: dict[str, Tensor] = {}
        queued = None

        image_embeds = student.encode_image(batch.images, self.config.patch_drop)  # [batch, 1 + patches, vision_width]
        text_embeds, *masked_embeds = encode_texts(student, mask, batch.input_ids, batch.masked)
        feats = student.project_image(image_embeds[:, 0]), student.project_text(text_embeds[:, 0])  # [batch, embed_dim]
        teacher = self._ask_teacher(batch, alpha)
        targets = teacher.feats or feats  # what the student's features are compared with
        finite = torch.stack([part.detach().isfinite().all() for part in (*feats, *targets)]).all()

        with torch.autocast(device.type, enabled=False):
            if enabled & {"cma", "imc"}:
                queued = batch.layout.gather(targets[0]), batch.layout.gather(targets[1])
                ids = batch.all_image_ids if self.match_ids else None
                candidates = gather_candidates(*queued, ids, self.queue, not self.published, batch.layout.rows)
                pairs = counts.get("pairs")
                if "cma" in enabled:
                    losses["cma"] = cross_modal(*feats, candidates, temperature, pairs, teacher.feats, alpha)
                if "imc" in enabled:
                    losses["imc"] = intra_modal(*feats, candidates, temperature, pairs)
            if "lmi" in enabled:
                losses["lmi"] = self._local_loss(batch, feats, teacher)

        if not enabled & {"itm", "mlm"}:
            return PairOutput(losses, finite, queued)
        passes = FusionPasses(student.fusion)
        kv = student.project_kv(image_embeds)  # once, for all passes
        if "itm" in enabled:
            if negatives is None:
                negatives = self._sample_negatives(batch, feats, targets)
            negative_texts, negative_mask, negative_kv = self._take(batch, negatives, image_embeds, text_embeds, kv)
            passes.add(text_embeds, mask, kv)
            passes.add(text_embeds, mask, negative_kv)
            passes.add(negative_texts, negative_mask, kv)
        for embeds in masked_embeds:
            passes.add(embeds, mask, kv)
        passes.run_lower()
        if negatives is not None:
            itm_logits = student.itm_head(passes.run_last(slice(0, 3))[:, 0])
            losses["itm"] = matching(itm_logits, negatives.valid, counts.get("judged"))
        if batch.masked is not None:
            rows, chosen, labels = batch.masked.rows, batch.masked.chosen, batch.masked.labels
            mlm_logits = student.mlm_logits(passes.run_last(slice(-1, None), rows).flatten(0, 1)[chosen])
            soft = teacher.mlm_logits
            losses["mlm"] = distilled_cross_entropy(mlm_logits, labels, soft, alpha, counts.get("masked"))
        return PairOutput(losses, finite, queued)

    def is_sound(self, output: PairOutput) -> Tensor:
        """Bool `[]`, whether the features of this rank's pairs are finite."""
        return output.finite

    @torch.no_grad()
    def enqueue(self, batch: PairBatch, output: PairOutput, taken: Tensor | None = None) -> None:
        """Put the teacher's features of a batch whose step was taken into the queue."""
        if self.queue is not None and output.queued is not None:
            self.queue.enqueue(*output.queued, batch.all_image_ids, taken)

    @torch.no_grad()
    def _ask_teacher(self, batch: PairBatch, alpha: float) -> TeacherOutput:
        """The second view and the same texts, through what an enabled loss reads of the teacher."""
        output = TeacherOutput()
        masked = batch.masked if self.distills_mlm and alpha > 0 else None
        if self.teacher is None or batch.second_views is None or not (self.contrasts or masked):
            return output
        model, mask = self.teacher.model, batch.attention_mask
        image_embeds = model.encode_image(batch.second_views)
        embeds = encode_texts(model, mask, batch.input_ids if self.contrasts else None, masked)
        if self.contrasts:
            text_embeds = embeds[0]
            output.feats = model.project_image(image_embeds[:, 0]), model.project_text(text_embeds[:, 0])
            if "lmi" in self.enabled:
                side = PUBLISHED_RETRIEVAL_REGIONS if self.published and self.match_ids else None
                output.region_feats = pool_patches(model.project_image(image_embeds[:, 1:]), side, self.published)
                output.token_feats = model.project_text(text_embeds[:, 1:])
        if masked is not None:
            fused = model.fuse(embeds[-1], mask, model.project_kv(image_embeds), masked.rows)
            output.mlm_logits = model.mlm_logits(fused.flatten(0, 1)[masked.chosen])
        return output

    def _same_image(self, batch: PairBatch, by_id: bool) -> Tensor:
        """Bool `[batch, pool]`: which pairs of the pool show a pair's own image."""
        pool = batch.pool
        return same_image(pool.gather(batch.image_ids) if by_id else None, pool.total, batch.images.device)[pool.rows]

    def _local_loss(self, batch: PairBatch, feats: tuple[Tensor, Tensor], teacher: TeacherOutput) -> Tensor:
        """`lmi`: the mean of that of the images and that of the texts, `[]`."""
        assert teacher.region_feats is not None and teacher.token_feats is not None
        pool, temperature, counts = batch.pool, self.student.temperature, batch.counts
        same = self._same_image(batch, by_id=self.match_ids and not self.published)
        regions, tokens = pool.gather(teacher.region_feats), pool.gather(teacher.token_feats)
        mask = pool.gather(batch.attention_mask[:, 1:])
        images = local_global(feats[0], regions, temperature, same, None, pool.start, counts.get("pairs"))
        texts = local_global(feats[1], tokens, temperature, same, mask, pool.start, counts.get("worded"))
        return (images + texts) / 2

    @torch.no_grad()
    def _sample_negatives(
        self, batch: PairBatch, feats: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]
    ) -> Negatives:
        """Hard negatives of the pairs here, drawn from the pool by similarity."""
        pool, temperature, device = batch.pool, self.student.temperature, batch.images.device
        images, texts = (pool.gather(part) for part in targets)
        # Drawn for the whole pool on every rank that shares it, so that its rows get the same wherever they are.
        generator = torch.Generator(device).manual_seed(mix(batch.seed, batch.layout.start - pool.start))
        noise = gumbel_noise((2, pool.total, pool.total), device, generator)
        same = self._same_image(batch, by_id=self.match_ids)
        with torch.autocast(device.type, enabled=False):
            image_logits = similarity(feats[0], (texts,), temperature)
            text_logits = similarity(feats[1], (images,), temperature)
        return sample_negatives(image_logits, text_logits, same, noise[:, pool.rows])

    def _take(
        self, batch: PairBatch, negatives: Negatives, image_embeds: Tensor, text_embeds: Tensor, kv: CrossAttentionKV
    ) -> tuple[Tensor, Tensor, CrossAttentionKV]:
        """The negative texts, their attention mask, and keys and values of the negative images, out of the pool."""
        pool = batch.pool
        texts = pool.gather(text_embeds)[negatives.texts]
        mask = pool.gather(batch.attention_mask)[negatives.texts]
        if len(pool.sizes) == 1:
            return texts, mask, kv.select(negatives.images)
        return texts, mask, self.student.project_kv(pool.gather(image_embeds)[negatives.images])


class FusionPasses:
    """Passes of texts over images, which go through the lower fusion layers as one batch."""

    def __init__(self, fusion: FusionEncoder) -> None:
        self.fusion = fusion
        self.texts: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.kvs: list[tuple[CrossAttentionKV, int]] = []

    def add(self, text_embeds: Tensor, attention_mask: Tensor, kv: CrossAttentionKV) -> None:
        """Add a pass of `[pairs, tokens, width]` over the images that `kv` is of."""
        self.texts.append(text_embeds)
        self.masks.append(attention_mask)
        self.kvs.append((kv, len(text_embeds)))

    def run_lower(self) -> None:
        """All passes through all layers but the last."""
        hidden = self.fusion.lower(torch.cat(self.texts), torch.cat(self.masks), JoinedKV(self.kvs))
        self.texts = list(hidden.split([pairs for _, pairs in self.kvs]))

    def run_last(self, passes: slice, rows: Tensor | None = None) -> Tensor:
        """Some passes through the last layer, at `rows` `[pairs, slots]` alone: `[pairs, slots, width]`.

        `rows` None computes `[CLS]`.
        """
        hidden, kv = torch.cat(self.texts[passes]), JoinedKV(self.kvs[passes])
        return self.fusion.last(hidden, torch.cat(self.masks[passes]), kv, class_rows(hidden) if rows is None else rows)


def encode_texts(
    model: Tercet, attention_mask: Tensor, input_ids: Tensor | None, masked: MaskedTexts | None
) -> list[Tensor]:
    """`text_embeds` `[batch, tokens, width]` of the clean and the masked texts that are given, in one pass."""
    readings = [ids for ids in (input_ids, None if masked is None else masked.input_ids) if ids is not None]
    embeds = model.encode_text(torch.cat(readings), attention_mask.repeat(len(readings), 1))
    return list(embeds.chunk(len(readings)))


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
    layout = RankLayout(tuple(sizes.tolist()), ranks.rank)
    longest = int(tokens.max())
    masked = None
    if mask_probability is not None:
        generator = torch.Generator().manual_seed(seed)
        whole = (layout.total, longest)
        masked = mask_tokens(
            batch.input_ids, batch.attention_mask, mask_probability, text, generator, whole, layout.start
        )
    padded_ids = F.pad(batch.image_ids, (0, max(layout.sizes) - len(batch)))
    labels = 0 if masked is None else len(masked.labels)
    numbers = ranks.gather_tensor(torch.cat([torch.tensor([labels]), padded_ids]))
    image_ids = [row[1 : 1 + size] for row, size in zip(numbers, layout.sizes, strict=True)]
    all_image_ids = torch.cat(image_ids)
    pools = [all_image_ids] if gather else image_ids
    counts = {
        "pairs": layout.total,
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
        layout=layout,
        pool=layout if gather else RankLayout((len(batch),)),
        all_image_ids=all_image_ids.to(device, non_blocking=True),
        counts={name: (count or 1) / ranks.world for name, count in counts.items()},
        seed=seed,
    )


def _count_judged(image_ids: Tensor | None, pairs: int) -> int:
    """How many pairs matching judges where negatives are drawn among `pairs`: every matched one, and two unmatched ones
    for each that has a negative."""
    same = same_image(image_ids, pairs, torch.device("cpu"))
    return pairs + 2 * int((~same.all(dim=1)).sum())
