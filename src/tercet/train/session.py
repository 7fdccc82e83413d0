"""What a run is made of, built from its config: data, tokenizer, model, task, optimizer, and its folder."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tercet.config import Config, ModelConfig
from tercet.config_io import dump_config
from tercet.data.batch import Batch
from tercet.data.loader import TrainLoader
from tercet.data.table import SampleTable
from tercet.data.tokenizer import Tokenizer
from tercet.device import DeviceSpec, resolve_device
from tercet.distributed import Ranks, wrap_parallel
from tercet.errors import TercetError
from tercet.files import write_atomic
from tercet.model.hub import load_model, require_tokenizer
from tercet.model.layers import set_grad_checkpointing
from tercet.model.tercet import Tercet
from tercet.model.vision import resize_position_embed
from tercet.tasks.evaluation import within_positions
from tercet.tasks.task import (
    Task,
    build_loader,
    build_task,
    further_texts,
    get_task,
    open_data,
    tokenizer_texts,
)
from tercet.train.checkpoint import Checkpoints, Position, list_checkpoints
from tercet.train.compilation import compile_encoders, compiled_models
from tercet.train.lock import FolderLock
from tercet.train.optim import build_optimizer
from tercet.train.stop import StopRequest

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"


@dataclass
class Session:
    """A run, ready to take its next step.

    Attributes:
        config: resolved; the model's sizes are those of the model.
        folder: the run folder.
        source: the training pairs, or the samples of a downstream task.
        held_out: what is evaluated on, by `validation` and `test`; without those that the config names no source for.
        tokenizer: of model and loader.
        loader: batches by epoch and step.
        task: the student, what follows it, and its losses.
        trained: what a step calls: `task`, or what shares its gradients with the other ranks.
        optimizer: over the parameters that learn.
        placement: device and precision.
        ranks: the processes that train together; the first one writes and speaks.
        checkpoints: of this run.
        lock: keeps other trainers out of the folder.
        stop: whether a signal asks the run to stop; listens while it is open.
        step: optimizer steps taken.
        messages: what the user should know before the first step.
    """

    config: Config
    folder: Path
    source: SampleTable
    held_out: dict[str, Any]
    tokenizer: Tokenizer
    loader: TrainLoader
    task: Task
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    placement: DeviceSpec
    ranks: Ranks
    checkpoints: Checkpoints
    lock: FolderLock
    stop: StopRequest
    step: int
    messages: list[str]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; batches that do not fill an accumulated step wait for the next epoch."""
        return max(1, self.loader.steps_per_epoch // self.config.optim.grad_accum_steps)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        total = self.steps_per_epoch * self.config.train.epochs
        return min(total, self.config.train.max_steps or total)

    @property
    def position(self) -> Position:
        """What a checkpoint says of where the run stands."""
        train, optim = self.config.train, self.config.optim
        return Position(self.step, fingerprint(self.source), train.batch_size * optim.grad_accum_steps)


def open_session(config: Config, resume: Path | None = None) -> Session:
    """Build a new run, or the one in the folder `resume` as it was at its newest whole checkpoint.

    Raises:
        TercetError: the folder holds a run already (or none, to resume), a file is missing, or the data has changed.
    """
    ranks = Ranks()
    if not config.data.train:
        raise TercetError("data.train names no source; give --data.train FILE, FOLDER or 'scenes'")
    folder = resume if resume is not None else ranks.on_rank0(lambda: _new_folder(config))
    lock = FolderLock()
    ranks.on_rank0(lambda: lock.hold(folder))
    messages: list[str] = []
    source = open_data(config.task, config.data.train, config.data, "train")
    # Before the first step: a mistake in these should not come to light when the training is over.
    named = {"validation": config.data.validation, "test": config.data.test}
    held_out = {split: open_data(config.task, specs, config.data, split) for split, specs in named.items() if specs}
    if len(source.rejected):
        messages.append(
            f"{len(source.rejected)} rows of the training data are left out; the first: {source.rejected[0]}"
        )
    placement = resolve_device(config.train.device, config.train.precision)
    torch.manual_seed(config.train.seed)
    student, tokenizer, made = _build_student(config, source, folder, ranks)
    messages += made
    data = within_positions(config.data, student)
    config = config.model_copy(update={"model": student.config, "data": data, "output": str(folder)})
    student.tokenizer = tokenizer
    adopt = get_task(config.task).prepare_student
    if adopt is not None:
        messages += adopt(student, source, config)
    task, trained = _assemble(config, student, placement)
    optimizer = build_optimizer(student, config.optim, config.compat == "published")
    loader = build_loader(config, source, tokenizer, student.config.vision.image_size)
    checkpoints = Checkpoints(folder / CHECKPOINTS, config.train.keep_checkpoints)
    session = Session(
        config,
        folder,
        source,
        held_out,
        tokenizer,
        loader,
        task,
        trained,
        optimizer,
        placement,
        ranks,
        checkpoints,
        lock,
        StopRequest(alone=ranks.world == 1),
        0,
        messages,
    )
    if resume is None:
        ranks.on_rank0(lambda: _write_start(session))
    elif ranks.broadcast(bool(list_checkpoints(folder / CHECKPOINTS))):
        _restore(session)
    else:
        session.messages.append("the run was cut off before its first checkpoint; it starts again")
    return session


def _assemble(config: Config, student: Tercet, placement: DeviceSpec) -> tuple[Task, nn.Module]:
    """The task on its device with what the config asks of the layers, and the same as the ranks train it together."""
    task = build_task(config, student).to(placement.device)
    task.train()
    set_grad_checkpointing(student, config.train.grad_checkpointing)
    if config.train.compile:
        compile_encoders(compiled_models(task))
    return task, wrap_parallel(task, config.train.parallel)


def due_steps(session: Session) -> Iterator[list[Batch]]:
    """The batches of each step still due, up to `total_steps`; the caller counts `session.step` on."""
    per_step = session.config.optim.grad_accum_steps
    while session.step < session.total_steps:
        epoch, first = divmod(session.step, session.steps_per_epoch)
        batches = iter(session.loader.batches(epoch, first * per_step))
        for _ in range(first, session.steps_per_epoch):
            due = [batch for _, batch in zip(range(per_step), batches, strict=False)]
            yield due
            if session.step >= session.total_steps:
                return


def text_count(source: SampleTable) -> int:
    """How many captions or samples a source holds."""
    return int(source.caption_counts.sum()) if isinstance(source, SampleTable) else source.sample_count


def fingerprint(source: SampleTable) -> str:
    """A digest of how many images and texts a source holds and of some of their names."""
    digest = hashlib.sha256(f"{source.image_count} {text_count(source)}".encode())
    stride = max(1, source.image_count // 64)
    for index in range(0, source.image_count, stride):
        digest.update(source.key(index).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _write_start(session: Session) -> None:
    session.tokenizer.save(session.folder / TOKENIZER)
    write_atomic(session.folder / CONFIG, dump_config(session.config))


def name_folder(config: Config) -> Path:
    """The folder that a new run of `config` takes: `output`, or the first of runs/NAME, runs/NAME-2 … that is free.

    Raises:
        TercetError: `output` holds a run already.
    """
    if config.output is not None:
        folder = Path(config.output)
        if (folder / CONFIG).exists():
            raise TercetError(f"{folder} holds a run already; go on with --resume {folder}, or name another --output")
        return folder
    folder = Path("runs") / config.name
    number = 2
    while folder.exists():
        folder = Path("runs") / f"{config.name}-{number}"
        number += 1
    return folder


def _new_folder(config: Config) -> Path:
    folder = name_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TercetError(f"cannot make the run folder {folder}: {error.strerror}; name another --output") from error
    return folder


def _build_student(
    config: Config, source: SampleTable, folder: Path, ranks: Ranks
) -> tuple[Tercet, Tokenizer, list[str]]:
    """The model to train and its tokenizer: loaded from `init`, or new with a tokenizer loaded or trained."""
    if config.init is not None:
        student = load_model(config.init).train()
        tokenizer = require_tokenizer(student)
        size = config.model.vision.image_size
        if "vision" in config.model.model_fields_set and size != student.config.vision.image_size:
            resize_images(student, size)
        made = student.add_heads([*config.model.heads, *get_task(config.task).heads])
        new = f"; new in it: {', '.join(made)}" if made else ""
        return student, tokenizer, [f"starts from {config.init}{new}"]
    tokenizer, messages = ranks.on_rank0(lambda: find_tokenizer(config, source, folder / TOKENIZER))
    student = Tercet(_fitted(config.model, tokenizer, config.data.max_tokens))
    # Added and not built in, so that they start alike in a new run, a resumed one and a fine-tuning.
    student.add_heads([*config.model.heads, *get_task(config.task).heads])
    return student, tokenizer, messages


def find_tokenizer(config: Config, source: SampleTable, saved: Path) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of the run, of the config, or a new one, and what the user should know of it.

    Args:
        config: of the run.
        source: its training data, which a new one is trained on.
        saved: where the run keeps its own; looked at first.
    """
    if saved.is_dir():
        return Tokenizer.load(saved), []
    if config.data.tokenizer is not None:
        return Tokenizer.load(config.data.tokenizer), []
    texts = itertools.chain(tokenizer_texts(config.task, source, config.data), further_texts(config.data))
    tokenizer = Tokenizer.train(texts, config.data.tokenizer_size)
    return tokenizer, [f"trained a tokenizer of {tokenizer.vocabulary_size} word pieces on the texts"]


def _fitted(model: ModelConfig, tokenizer: Tokenizer, max_tokens: int) -> ModelConfig:
    """The sizes with the tokenizer's vocabulary and special ids, and positions for the longest text, without heads."""
    text = model.text.model_copy(
        update={
            "vocabulary_size": tokenizer.vocabulary_size,
            "pad_id": tokenizer.pad_id,
            "cls_id": tokenizer.cls_id,
            "sep_id": tokenizer.sep_id,
            "mask_id": tokenizer.mask_id,
            "max_positions": max(model.text.max_positions, max_tokens),
        }
    )
    return model.model_copy(update={"text": text, "heads": []})


def resize_images(model: Tercet, image_size: int) -> None:
    """Make `model` take images of another size: its position embeddings are resized, bicubically."""
    vision = model.config.vision.model_copy(update={"image_size": image_size})
    table = resize_position_embed(model.vision.position_embed.detach(), vision.grid, vision.grid)
    model.vision.position_embed = torch.nn.Parameter(table.clone())
    model.config = model.config.model_copy(update={"vision": vision})


def _restore(session: Session) -> None:
    position, complaints = session.checkpoints.load(session.task, session.optimizer)
    if position.data != session.position.data:
        raise TercetError(
            f"the training data is not what {session.folder} was trained on (images, captions or names differ); "
            "bring the old data back, or start a new run with --init"
        )
    session.messages += complaints
    before, now = position.pairs_per_step, session.position.pairs_per_step
    if before != now:
        session.messages.append(
            f"a step takes {now} pairs and took {before}: counted in steps, the epoch goes on elsewhere, so that some "
            "of its pairs come twice or not at all"
        )
    session.step = position.step
    session.messages.append(f"resumed at step {position.step}")
    session.ranks.barrier()  # before anyone writes what another may still be reading
