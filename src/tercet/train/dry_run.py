"""What a training step costs, before anything is trained: `--dry-run`, and advice on memory.

A step of the real model runs on fake tensors (PyTorch's `FakeTensorMode`), which have shapes and no memory, while FLOPs
and live bytes are counted.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from tercet.config import Config, ModelConfig
from tercet.config_io import dump_config
from tercet.device import DeviceSpec, autocast, resolve_precision, wants_cuda
from tercet.distributed import Ranks
from tercet.errors import TercetError
from tercet.model.hub import empty_model, find_model_folder, read_config
from tercet.model.layers import set_grad_checkpointing
from tercet.model.tercet import Tercet
from tercet.objectives.loss import total
from tercet.objectives.masking import MaskedTexts, mask_tokens
from tercet.tasks.pretrain import PairBatch, Pretraining
from tercet.tasks.task import build_task, get_task

COUNTED_TASKS = ("pretrain", "retrieval", "grounding")  # those that train on pairs
SHARED_BY = (2, 4, 8)  # numbers of devices whose memory is reported
CARD_BYTES = 80e9
# Share of a card's memory that its context, its libraries and gaps between tensors take.
CARD_OVERHEAD = 0.08
# Memory of a process without the model: interpreter, libraries, threads.
PROCESS_BYTES = 400 << 20
# On a CPU, gaps that the C library leaves between blocks of many sizes; fitted to the base model (docs/performance.md).
CPU_GAPS = 1.25
# How PyTorch reports that a CPU is out of memory; for CUDA it has an error class.
CPU_OOM = ("DefaultCPUAllocator", "not enough memory")


@dataclass(frozen=True)
class StepCost:
    """FLOPs and bytes of one step over a batch on one device.

    Attributes:
        parameters: of each part of the model.
        trained: parameters that an enabled objective reaches.
        forward: FLOPs of student and teacher.
        backward: FLOPs.
        fixed: bytes that do not depend on the batch, by what they are for.
        passing: largest number of bytes of activations and gradients at a time.
    """

    parameters: dict[str, int]
    trained: int
    forward: int
    backward: int
    fixed: dict[str, int]
    passing: int

    @property
    def flops(self) -> int:
        """FLOPs of the step; a multiply and an add are two."""
        return self.forward + self.backward

    def bytes_on(self, cuda: bool) -> int:
        """Peak memory of a device; on a CPU including the process itself."""
        held = sum(self.fixed.values())
        return held + self.passing if cuda else PROCESS_BYTES + held + round(CPU_GAPS * self.passing)


def measure_step(config: Config, batch: int, precision: str, cuda: bool = False) -> StepCost:
    """The cost of a step over `batch` pairs whose captions all have `data.max_tokens` word pieces.

    Args:
        config: of a task of `COUNTED_TASKS`, with the sizes of the model.
        batch: pairs on the device.
        precision: `fp32` or `bf16`.
        cuda: count what a GPU keeps.  Its attention drops weights within the kernel, where a CPU's keeps them.
    """
    text = config.model.text
    if cuda:
        text = text.model_copy(update={"dropout": 0.0})
    model = config.model.model_copy(update={"text": text})
    tokens = min(config.data.max_tokens, text.max_positions)
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    ids = torch.full((batch, tokens), text.cls_id)
    ids[:, 1:] = text.vocabulary_size - 1
    masked = mask_tokens(ids, mask, config.objectives.mlm_probability, text, torch.Generator().manual_seed(0))

    memory = PeakMemory()
    with FakeTensorMode(allow_non_fake_inputs=True), memory, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by copy.deepcopy
        student = empty_model(model)
        weights = {name: torch.empty_like(value, device="cpu") for name, value in student.state_dict().items()}
        student.load_state_dict(weights, assign=True)
        del weights
        weights_bytes = memory.now
        task = build_task(config.model_copy(update={"model": model}), student).train()
        assert isinstance(task, Pretraining)
        set_grad_checkpointing(student, config.train.grad_checkpointing)
        queue = 0 if task.queue is None else sum(buffer.nbytes for buffer in task.queue.buffers())
        trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
        fixed = {
            "weights": weights_bytes,
            "AdamW moments": 8 * trained,
            "teacher": memory.now - weights_bytes - queue,
            "queue": queue,
        }
        pixels = (batch, 3, model.vision.image_size, model.vision.image_size)
        pairs = PairBatch(
            images=torch.empty(pixels, dtype=torch.uint8),
            second_views=None if task.teacher is None else torch.empty(pixels, dtype=torch.uint8),
            input_ids=torch.empty_like(ids),
            attention_mask=torch.empty_like(mask),
            image_ids=torch.empty(batch, dtype=torch.long),
            masked=MaskedTexts(*map(torch.empty_like, vars(masked).values())) if "mlm" in task.enabled else None,
        )
        before = memory.now
        with _counter() as counter:
            with autocast(torch.device("cpu"), precision):
                losses = task(pairs, config.objectives.alpha).losses
            forward = counter.get_total_flops()
            total(losses, config.objectives).backward()
            backward = counter.get_total_flops() - forward
    return StepCost(
        parameters=_count_parameters(student),
        trained=trained,
        forward=forward,
        backward=backward,
        fixed=fixed,
        passing=memory.peak - before,
    )


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of live storages, as an allocator would hold them.

    Attributes:
        now: bytes that are live.
        peak: the most that were live at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it returns."""
        # Fake tensors have no values, and their random numbers no generator.
        kwargs = {name: None if name == "generator" else value for name, value in (kwargs or {}).items()}
        result = func(*args, **kwargs)
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._live:
            return

        def free(_: object) -> None:
            del self._live[key]
            self.now -= size

        self._live[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products of one run, attention's among them; a multiply and an add are two."""
    with _counter() as counter:
        run()
    return counter.get_total_flops()


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_CPU_KERNELS)


def _attention_flops(query: torch.Size, key: torch.Size, *_: object, **__: object) -> int:
    *batch, queries, width = query
    return 4 * math.prod(batch) * queries * key[-2] * width


def _attention_backward_flops(gradient: object, query: torch.Size, key: torch.Size, *_: object, **__: object) -> int:
    # Of the four products that the gradients take; what the kernel computes again is not counted.
    return 2 * _attention_flops(query, key)


def _linear_flops(hidden: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * math.prod(hidden) * weight[0]


# PyTorch's counter knows only a GPU's attention kernels and plain matrix products.
_CPU_KERNELS = {
    torch.ops.mkldnn._linear_pointwise: _linear_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class MemoryModel:
    """Memory of a step over any number of pairs, from the costs of two batches between which it is linear."""

    def __init__(self, config: Config, precision: str, cuda: bool) -> None:
        self.cuda = cuda
        large = config.train.batch_size if config.train.batch_size > 1 else 2
        small = max(1, large // SHARED_BY[-1])
        self.whole = measure_step(config, large, precision, cuda)
        below = measure_step(config, small, precision, cuda).bytes_on(cuda)
        self.a_pair = (self.whole.bytes_on(cuda) - below) / (large - small)
        self.base = below - self.a_pair * small

    def bytes_for(self, pairs: int) -> int:
        """Memory of a device that takes so many pairs."""
        return round(self.base + self.a_pair * pairs)

    def largest_batch(self, memory: float) -> int:
        """The most pairs that fit; 0 where not one does."""
        return max(0, int((memory - self.base) / self.a_pair))


def describe(config: Config) -> str:
    """The resolved config as YAML, with parameters, FLOPs and memory as YAML comments: the text is a config itself.

    Every caption is taken to be as long as `data.max_tokens` allows, so the numbers are upper bounds.

    Raises:
        TercetError: `init` names no model.
    """
    notes = []
    if config.init is not None:
        config = config.model_copy(update={"model": start_sizes(config)})
        notes.append(f"sizes: those of {config.init}")
    elif config.data.tokenizer is None:
        size = config.data.tokenizer_size
        text = config.model.text.model_copy(update={"vocabulary_size": size})
        config = config.model_copy(update={"model": config.model.model_copy(update={"text": text})})
        notes.append(f"vocabulary: {size:,} word pieces, of the tokenizer to be trained on the captions")
    if config.task in COUNTED_TASKS:
        notes += _step_notes(config)
    else:
        student = empty_model(config.model)
        student.add_heads(get_task(config.task).heads)
        notes += _parameter_notes(_count_parameters(student))
        notes.append(f"FLOPs and memory are estimated for {', '.join(COUNTED_TASKS)}, not for {config.task}")
    return dump_config(config) + "\n" + "\n".join(f"# {note}" for note in notes)


def start_sizes(config: Config) -> ModelConfig:
    """The sizes of the model that `init` names, with the image size of the config where that is written."""
    assert config.init is not None
    sizes, _ = read_config(find_model_folder(config.init) / "config.json")
    if "vision" in config.model.model_fields_set:
        vision = sizes.vision.model_copy(update={"image_size": config.model.vision.image_size})
        sizes = sizes.model_copy(update={"vision": vision})
    return sizes


def advise_less_memory(config: Config, devices: int, fits: int | None = None) -> str:
    """Flags for steps over the same pairs in less memory.

    Args:
        config: of the run.
        devices: how many share a batch.
        fits: pairs that a device holds; None where that is unknown, which halves its share.
    """
    batch = config.train.batch_size
    limit = devices * (fits or max(1, share_of(config, devices) // 2))
    parts = next(
        parts for parts in range(1, batch + 1) if batch % parts == 0 and (batch // parts <= limit or parts == batch)
    )
    ways = ["share the batch among more devices with torchrun"]
    if parts > 1:
        steps = config.optim.grad_accum_steps * parts
        ways.append(f"give --train.batch_size {batch // parts} --optim.grad_accum_steps {steps}")
    if not config.train.grad_checkpointing:
        ways.append("give --train.grad_checkpointing true")
    return ", or ".join(ways)


def share_of(config: Config, devices: int) -> int:
    """The most pairs that one of several devices takes of a batch."""
    return -(-config.train.batch_size // devices)


def warn_if_oom_likely(config: Config, spec: DeviceSpec, parameters: int) -> list[str]:
    """A message where a step may need more memory than the device has; empty otherwise, and where that is unknown."""
    memory = available_memory(spec.device)
    if memory is None or config.task not in COUNTED_TASKS or config.train.parallel != "ddp":
        return []
    devices, cuda = Ranks().world, spec.device.type == "cuda"
    vision, text, share = config.model.vision, config.model.text, share_of(config, devices)
    # Far from the limit a rough estimate is enough: weights, gradients and moments of student and teacher, and for
    # each token and layer of a pair some 30 values.
    tokens = vision.grid**2 * vision.width * (vision.depth + 2) + 4 * config.data.max_tokens * text.width * text.depth
    if 20 * parameters + 120 * share * tokens + 3000 * config.objectives.queue_size < memory / 4:
        return []
    model = MemoryModel(config, spec.precision, cuda)
    needed = model.bytes_for(share)
    if needed <= memory:
        return []
    return [
        f"a step over {share} pairs needs up to about {needed / 2**30:.1f} GiB of the {memory / 2**30:.1f} available; "
        f"if training runs out of memory, {advise_less_memory(config, devices, model.largest_batch(memory))}"
    ]


@contextlib.contextmanager
def explain_oom(config: Config) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into one that names the flags that need less.

    Raises:
        TercetError: there is not enough memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(words in str(error) for words in CPU_OOM):
            raise
        devices = Ranks().world
        raise TercetError(
            f"not enough memory for a step over {share_of(config, devices)} pairs; "
            f"{advise_less_memory(config, devices)}; --dry-run shows what a step needs"
        ) from error


def available_memory(device: torch.device) -> int | None:
    """Bytes of a card, or of this machine for each process that torchrun started on it; None where unknown."""
    if device.type == "cuda":
        return round(torch.cuda.get_device_properties(device).total_memory * (1 - CARD_OVERHEAD))
    if not hasattr(os, "sysconf"):
        return None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _step_notes(config: Config) -> list[str]:
    train = config.train
    cuda = train.device != "cpu" and (train.device == "cuda" or wants_cuda(train.device))
    precision = train.precision
    if precision == "auto":
        precision = "bf16" if cuda else resolve_precision(torch.device("cpu"), "auto")
    model = MemoryModel(config, precision, cuda)
    cost, batch, batches = model.whole, train.batch_size, config.optim.grad_accum_steps
    held = {"process": 0 if cuda else PROCESS_BYTES, **cost.fixed}
    held["activations and gradients"] = model.bytes_for(batch) - sum(held.values())
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in held.items() if size)
    device = "GPU" if cuda else "CPU"
    notes = [
        *_parameter_notes(cost.parameters),
        f"  of them trained by {', '.join(config.objectives.enabled)}: {cost.trained / 1e6:,.2f} M",
        f"FLOPs a pair: {cost.flops / batch / 1e9:,.2f} G (forward {cost.forward / batch / 1e9:,.2f} G, "
        f"backward {cost.backward / batch / 1e9:,.2f} G) for captions of {config.data.max_tokens} word pieces",
        f"FLOPs a step over all devices: {cost.flops * batches / 1e12:,.3f} T for {batch * batches} pairs"
        + (f" in {batches} batches" if batches > 1 else ""),
        f"memory of one {device}, {precision}: about {_bytes(model.bytes_for(batch))} for {batch} pairs ({parts})",
    ]
    shares = [(devices, share_of(config, devices)) for devices in SHARED_BY if devices <= batch]
    if shares:
        each = "; ".join(f"{devices}: {_bytes(model.bytes_for(share))} for {share} pairs" for devices, share in shares)
        notes.append(f"memory of each of several devices that share the batch, {precision}: about {each}")
    card = model if cuda else MemoryModel(config, "bf16" if train.precision == "auto" else precision, cuda=True)
    most = card.largest_batch(CARD_BYTES * (1 - CARD_OVERHEAD))
    notes.append(f"largest batch on a GPU of 80 GB: about {most:,} pairs")
    if most < batch:
        notes.append(f"  so for one such GPU: {advise_less_memory(config, 1, most)}")
    return notes


def _count_parameters(model: Tercet) -> dict[str, int]:
    """Parameters of each part."""
    parts = {name: sum(map(Tensor.numel, part.parameters())) for name, part in model.named_children()}
    return {name: count for name, count in parts.items() if count}


def _parameter_notes(parts: dict[str, int]) -> list[str]:
    rows = [f"  {name}: {count / 1e6:,.2f} M" for name, count in parts.items()]
    return [f"parameters: {sum(parts.values()) / 1e6:,.2f} M", *rows]


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
