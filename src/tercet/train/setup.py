"""What a run is made of, built from its config: folder, data, tokenizer, model, task and optimizer."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import nn

from tercet.config import Config, HeadName, ModelConfig
from tercet.config_io import dump_config
from tercet.data.loader import TrainLoader
from tercet.data.table import SampleTable
from tercet.data.tokenizer import Tokenizer
from tercet.device import DeviceSpec, resolve_device
from tercet.distributed import Ranks, wrap_parallel
from tercet.errors import TercetError
from tercet.files import lock_folder, write_atomic
from tercet.model.hub import load_model, require_tokenizer
from tercet.model.layers import VisionBlock, set_grad_checkpointing
from tercet.model.tercet import Tercet
from tercet.model.text import TextLayer
from tercet.model.vision import resize_position_embed
from tercet.tasks.evaluation import within_positions
from tercet.tasks.task import Task, build_loader, build_task, further_texts, get_task, open_data, tokenizer_texts
from tercet.train.checkpoint import Checkpoints, Position, list_checkpoints
from tercet.train.optim import build_optimizer

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
LOCK = ".lock"
# Seconds that a resumed run waits for the workers of a killed run to exit.
LOCK_TIMEOUT = 5.0

Result = TypeVar("Result")


class StopRequest:
    """While open, the first Ctrl-C or SIGTERM is noted instead of raised, so that a step ends; a second one is raised.

    What `run_unless_stopped` runs is interrupted by the first one too: an evaluation may take longer than the seconds
    between a cluster's SIGTERM and its SIGKILL.

    Attributes:
        received: name of the signal; None before one came.
        dropped: whether work was dropped because of it.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.received: str | None = None
        self.dropped = False
        self._interruptible = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within, signals are noted."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> str | None:
        """Name of the signal that any rank received, so that all of them stop after the same step."""
        if not self._ranks.any(self.received is not None):
            return None
        return next(name for name in self._ranks.gather(self.received) if name is not None)

    def run_unless_stopped(self, work: Callable[[], Result]) -> Result | None:
        """The result of `work`; None, and `dropped`, when a signal came before it was done.

        With several ranks it runs to its end, since the others wait for its collectives.
        """
        alone = self._ranks.world == 1
        try:
            self._interruptible = alone
            if self.received is None or not alone:
                return work()
        except _Interrupted:
            pass
        finally:
            self._interruptible = False
        self.dropped = True
        return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if self._interruptible:
            raise _Interrupted


class _Interrupted(KeyboardInterrupt):
    """Ends work that can be dropped."""


@dataclass
class TrainState:
    """A run, ready to take its next step.

    Attributes:
        config: resolved; the model's sizes are those of the model.
        folder: the run folder.
        source: the training pairs, or the samples of a downstream task.
        held_out: what is evaluated on, by `validation` and `test`, where the config names sources.
        tokenizer: of model and loader.
        loader: batches by epoch and step.
        task: the student, teacher and queue, and the losses.
        trained: what a step calls: `task`, or its DDP or FSDP wrapper.
        optimizer: over the parameters that learn.
        spec: device and precision.
        ranks: the processes that train together.
        checkpoints: of this run.
        stop: whether a signal asks the run to stop.
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
    spec: DeviceSpec
    ranks: Ranks
    checkpoints: Checkpoints
    stop: StopRequest
    step: int = 0
    messages: list[str] = field(default_factory=list)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; batches that do not fill an accumulated step are not used in it."""
        return max(1, self.loader.steps_per_epoch // self.config.optim.grad_accum_steps)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        total = self.steps_per_epoch * self.config.train.epochs
        return min(total, self.config.train.max_steps or total)

    @property
    def position(self) -> Position:
        """The current step, data and batch size, as a checkpoint records them."""
        pairs = self.config.train.batch_size * self.config.optim.grad_accum_steps
        return Position(self.step, fingerprint(self.source), pairs)


@contextlib.contextmanager
def open_run_folder(config: Config, resume: Path | None = None) -> Iterator[Path]:
    """The folder of a new run, or of the one to resume, locked against other trainers.

    Raises:
        TercetError: it holds a run already, another process trains in it, or it cannot be written.
    """
    ranks = Ranks()
    folder = resume if resume is not None else ranks.on_rank0(lambda: _new_folder(config))
    with contextlib.ExitStack() as stack:
        ranks.on_rank0(lambda: stack.enter_context(lock_folder(folder, LOCK, "training in", LOCK_TIMEOUT)))
        yield folder


def set_up(config: Config, folder: Path, resume: bool = False) -> TrainState:
    """Build a new run in `folder`, or with `resume` the one there as it was at its newest intact checkpoint.

    Raises:
        TercetError: a file is missing, or the data is not what the run was trained on.
    """
    ranks = Ranks()
    if not config.data.train:
        raise TercetError("data.train names no source; give --data.train FILE or FOLDER")
    source = open_data(config.task, config.data.train, config.data, "train")
    # Opened before the first step, so that a mistake in them is not found only when training is over.
    named = {"validation": config.data.validation, "test": config.data.test}
    held_out = {split: open_data(config.task, specs, config.data, split) for split, specs in named.items() if specs}
    messages = []
    if problems := source.rejected:
        messages.append(f"{len(problems)} rows of the training data were rejected; the first: {problems[0]}")

    spec = resolve_device(config.train.device, config.train.precision)
    torch.manual_seed(config.train.seed)
    student, tokenizer, notes = _build_student(config, source, folder, ranks)
    messages += notes
    data = within_positions(config.data, student)
    config = config.model_copy(update={"model": student.config, "data": data, "output": str(folder)})
    student.tokenizer = tokenizer
    if prepare := get_task(config.task).prepare_student:
        messages += prepare(student, source, config)
    task = build_task(config, student).to(spec.device).train()
    set_grad_checkpointing(student, config.train.grad_checkpointing)
    if config.train.compile:
        compile_encoders(compiled_models(task))
    state = TrainState(
        config=config,
        folder=folder,
        source=source,
        held_out=held_out,
        tokenizer=tokenizer,
        loader=build_loader(config, source, tokenizer, student.config.vision.image_size),
        task=task,
        trained=wrap_parallel(task, config.train.parallel),
        optimizer=build_optimizer(student, config.optim, config.compat == "published"),
        spec=spec,
        ranks=ranks,
        checkpoints=Checkpoints(folder / CHECKPOINTS, config.train.keep_checkpoints),
        stop=StopRequest(ranks),
        messages=messages,
    )
    if not resume:
        ranks.on_rank0(lambda: _write_start(state))
    elif ranks.broadcast(bool(list_checkpoints(folder / CHECKPOINTS))):
        _restore(state)
    else:
        state.messages.append("the run was cut off before its first checkpoint; it starts again")
    return state


def fingerprint(source: SampleTable) -> str:
    """A digest of how many images and texts a source holds and of some of their names."""
    digest = hashlib.sha256(f"{source.image_count} {source.sample_count}".encode())
    stride = max(1, source.image_count // 64)
    for index in range(0, source.image_count, stride):
        digest.update(source.key(index).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def name_folder(config: Config) -> Path:
    """The folder of a new run: `output`, or the first of runs/NAME, runs/NAME-2 … that does not exist.

    Raises:
        TercetError: `output` holds a run already.
    """
    if config.output is not None:
        folder = Path(config.output)
        if (folder / CONFIG).exists():
            raise TercetError(
                f"{folder} holds a run already; continue it with --resume {folder}, or name another --output"
            )
        return folder
    names = itertools.chain([config.name], (f"{config.name}-{number}" for number in itertools.count(2)))
    return next(folder for folder in (Path("runs", name) for name in names) if not folder.exists())


def _new_folder(config: Config) -> Path:
    folder = name_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TercetError(f"cannot make the run folder {folder}: {error.strerror}; name another --output") from error
    return folder


def _write_start(state: TrainState) -> None:
    state.tokenizer.save(state.folder / TOKENIZER)
    write_atomic(state.folder / CONFIG, dump_config(state.config))


def _restore(state: TrainState) -> None:
    position, failures = state.checkpoints.load(state.task, state.optimizer)
    if position.data != state.position.data:
        raise TercetError(
            f"the training data is not what {state.folder} was trained on (images, captions or names differ); "
            "bring the old data back, or start a new run with --init"
        )
    state.messages += failures
    before, now = position.pairs_per_step, state.position.pairs_per_step
    if before != now:
        state.messages.append(
            f"a step takes {now} pairs and took {before}: the epoch continues from a different pair, so some pairs "
            "come twice or not at all"
        )
    state.step = position.step
    state.messages.append(f"resumed at step {position.step}")
    state.ranks.barrier()  # before anyone writes what another may still be reading


def _build_student(
    config: Config, source: SampleTable, folder: Path, ranks: Ranks
) -> tuple[Tercet, Tokenizer, list[str]]:
    """The model to train, its tokenizer, and messages: loaded from `init`, or new."""
    heads: list[HeadName] = [*config.model.heads, *get_task(config.task).heads]
    if config.init is not None:
        student = load_model(config.init).train()
        size = config.model.vision.image_size
        if "vision" in config.model.model_fields_set and size != student.config.vision.image_size:
            resize_images(student, size)
        added = student.add_heads(heads)
        new = f"; new in it: {', '.join(added)}" if added else ""
        return student, require_tokenizer(student), [f"starts from {config.init}{new}"]
    tokenizer, messages = ranks.on_rank0(lambda: find_tokenizer(config, source, folder / TOKENIZER))
    student = Tercet(fit_sizes(config.model, tokenizer, config.data.max_tokens))
    # Added afterwards, so that they get the same initial values in a new run, a resumed one and a fine-tuning.
    student.add_heads(heads)
    return student, tokenizer, messages


def find_tokenizer(config: Config, source: SampleTable, saved: Path) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of the run, of the config, or a new one, and what the user should know of it.

    Args:
        config: of the run.
        source: its training data, which a new one is trained on.
        saved: where the run keeps its own; tried first.
    """
    if saved.is_dir():
        return Tokenizer.load(saved), []
    if config.data.tokenizer is not None:
        return Tokenizer.load(config.data.tokenizer), []
    texts = itertools.chain(tokenizer_texts(config.task, source, config.data), further_texts(config.data))
    tokenizer = Tokenizer.train(texts, config.data.tokenizer_size)
    return tokenizer, [f"trained a tokenizer of {tokenizer.vocabulary_size} word pieces on the texts"]


def fit_sizes(model: ModelConfig, tokenizer: Tokenizer, max_tokens: int) -> ModelConfig:
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
    """Make `model` take images of another size: its position embeddings are resized bicubically."""
    vision = model.config.vision.model_copy(update={"image_size": image_size})
    table = resize_position_embed(model.vision.position_embed.detach(), vision.grid, vision.grid)
    model.vision.position_embed = nn.Parameter(table.clone())
    model.config = model.config.model_copy(update={"vision": vision})


# Graphs of one layer's code: student and teacher, training and evaluation, with and without rows.
COMPILED_VARIANTS = 32


def compile_encoders(models: Iterable[nn.Module], backend: str = "inductor") -> int:
    """Compile, in place, the vision blocks and the parts of the text layers that do not read an image.

    All layers of a kind share one graph, so that a deep model compiles as fast as a shallow one.  The number of tokens
    is dynamic: a caption length that was not seen before compiles nothing.  Cross-attention stays as it is, since it
    reads keys and values from a list of any length.  Names of parameters do not change.

    Args:
        models: `Tercet`s, or teachers with some of its parts.
        backend: of `torch.compile`.

    Returns:
        How many layers are compiled at their first pass.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)  # type: ignore[attr-defined]
    encoders = [getattr(model, name, None) for model in models for name in ("vision", "text", "fusion")]
    layers = [layer for encoder in encoders if encoder is not None for layer in encoder.modules()]
    for layer in layers:
        if isinstance(layer, VisionBlock):
            layer.compile(backend=backend)
        elif isinstance(layer, TextLayer):
            for part in ("self_attend", "feed_forward"):
                setattr(layer, part, torch.compile(getattr(layer, part), backend=backend, dynamic=True))
    return sum(isinstance(layer, VisionBlock | TextLayer) for layer in layers)


def compiled_models(task: nn.Module) -> list[nn.Module]:
    """The models of a task that are compiled: its student, and its teacher if it has one."""
    teacher = getattr(task, "teacher", None)
    student = cast(nn.Module, task.student)
    return [student] if teacher is None else [student, cast(nn.Module, teacher.model)]
