"""What `--dry-run` prints: the whole config, and what a step of it costs, before anything is built or read."""

from __future__ import annotations

from tercet.config import Config
from tercet.config_io import dump_config
from tercet.train.cost import Shape, count_flops, count_parameters, expected_shape, trained_parameters
from tercet.train.memory import count_activations, count_memory, largest_batch

COUNTED_TASKS = ("pretrain", "retrieval")
SHARED_BY = (2, 4, 8)  # numbers of devices whose memory is told


def describe(config: Config) -> str:
    """The resolved config as YAML, then as YAML comments its parameters, FLOPs and memory: the text is a config itself.

    Every caption is taken to be as long as `data.max_tokens` allows, so the numbers are upper bounds.
    """
    model = config.model
    notes = []
    if config.init is not None:
        notes.append(f"the sizes are those written above; --init {config.init} brings its own where they differ")
    elif config.data.tokenizer is None:
        size = config.data.tokenizer_size
        model = model.model_copy(update={"text": model.text.model_copy(update={"vocabulary_size": size})})
        notes.append(f"vocabulary: {size:,} word pieces, of the tokenizer to be trained on the captions")
    parts = count_parameters(model)
    notes.append(f"parameters: {_millions(sum(parts.values()))}")
    notes += [f"  {name}: {_millions(count)}" for name, count in parts.items()]
    if config.task in COUNTED_TASKS:
        trained = trained_parameters(model, config.objectives)
        notes.append(f"  of them trained by {', '.join(config.objectives.enabled)}: {_millions(trained)}")
        notes += _step_notes(config.model_copy(update={"model": model}))
    else:
        notes.append(f"FLOPs and memory are counted for {' and '.join(COUNTED_TASKS)} alone, not for {config.task}")
    return dump_config(config) + "\n" + "\n".join(f"# {note}" for note in notes)


def share_of(config: Config, devices: int) -> int:
    """The most pairs that one of several devices takes of a batch."""
    return -(-config.train.batch_size // devices)


def foretold(config: Config, devices: int, half: bool, cuda: bool) -> dict[str, int]:
    """Bytes that each of several devices holds, with the whole model and its share of a batch; see `count_memory`."""
    shape = expected_shape(share_of(config, devices), config.data.max_tokens, config.objectives.mlm_probability)
    return count_memory(config.model, config.objectives, shape, half, cuda, config.train.grad_checkpointing)


def with_less_memory(config: Config, devices: int, most: int = 0) -> str:
    """What to pass for steps over the same pairs in less memory.

    Args:
        config: of the run.
        devices: how many share a batch.
        most: pairs that a device holds; 0 where nobody knows.
    """
    batch = config.train.batch_size
    fits = devices * (most or max(1, share_of(config, devices) // 2))
    parts = next(
        parts for parts in range(1, batch + 1) if batch % parts == 0 and (batch // parts <= fits or parts == batch)
    )
    ways = ["share the batch among more devices with torchrun"]
    if parts > 1:
        accumulate = config.optim.grad_accum_steps * parts
        ways.append(f"give --train.batch_size {batch // parts} --optim.grad_accum_steps {accumulate}")
    if not config.train.grad_checkpointing:
        ways.append("give --train.grad_checkpointing true")
    return ", or ".join(ways)


def _step_notes(config: Config) -> list[str]:
    model, objectives, train = config.model, config.objectives, config.train
    shape = expected_shape(train.batch_size, config.data.max_tokens, objectives.mlm_probability)
    flops = count_flops(model, objectives, shape)
    batches = config.optim.grad_accum_steps
    notes = [
        f"FLOPs a pair: {_giga(flops.total / shape.batch)} (student forward "
        f"{_giga(flops.student_forward / shape.batch)}, backward {_giga(flops.student_backward / shape.batch)}; "
        f"teacher {_giga(flops.teacher / shape.batch)}) for captions of {shape.tokens} word pieces",
        f"FLOPs a step over all devices: {flops.total * batches / 1e12:,.3f} T "
        f"for {shape.batch * batches} pairs" + (f" in {batches} batches" if batches > 1 else ""),
    ]
    for precision in ("fp32", "bf16") if train.precision == "auto" else (train.precision,):
        notes += _memory_notes(config, shape, precision)
    return notes


def _memory_notes(config: Config, shape: Shape, precision: str) -> list[str]:
    """What one device that takes whole batches holds, what each of several does, and what fits a card."""
    model, objectives, train = config.model, config.objectives, config.train
    half, cuda = precision == "bf16", train.device == "cuda"
    memory = foretold(config, 1, half, cuda)
    held = ", ".join(f"{name} {_bytes(size)}" for name, size in memory.items() if size)
    kept = count_activations(model, objectives, shape, half, train.grad_checkpointing)
    notes = [
        f"memory of one device alone, {precision}: "
        f"about {_bytes(sum(memory.values()))} for {shape.batch} pairs ({held}; "
        f"the forward pass keeps {_bytes(kept.total // shape.batch)} a pair)"
    ]
    shares = [(devices, sum(foretold(config, devices, half, cuda).values())) for devices in SHARED_BY]
    told = "; ".join(
        f"{devices}: {_bytes(size)} for {share_of(config, devices)} pairs"
        for devices, size in shares
        if devices <= train.batch_size
    )
    if told:
        notes.append(f"memory of each of several devices that share the batch, {precision}: about {told}")
    most = largest_batch(model, objectives, shape.tokens, half, train.grad_checkpointing)
    notes.append(f"largest batch on a card of 80 GB, {precision}: about {most:,} pairs")
    if most < train.batch_size:
        notes.append(f"  so for one such card: {with_less_memory(config, 1, most)}")
    return notes


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.2f} G"


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
