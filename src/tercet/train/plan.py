"""What `--dry-run` prints: the whole config, and what a step of it costs, before anything is built or read."""

from __future__ import annotations

from tercet.config import Config
from tercet.config_io import dump_config
from tercet.train.cost import Shape, count_flops, count_parameters, expected_shape, trained_parameters
from tercet.train.memory import count_activations, count_memory, largest_batch

COUNTED_TASKS = ("pretrain", "retrieval")


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
        shape = expected_shape(config.train.batch_size, config.data.max_tokens, config.objectives.mask_probability)
        trained = trained_parameters(model, config.objectives)
        notes.append(f"  of them trained by {', '.join(config.objectives.enabled)}: {_millions(trained)}")
        notes += _step_notes(config.model_copy(update={"model": model}), shape)
    else:
        notes.append(f"FLOPs and memory are counted for {' and '.join(COUNTED_TASKS)} alone, not for {config.task}")
    return dump_config(config) + "\n" + "\n".join(f"# {note}" for note in notes)


def _step_notes(config: Config, shape: Shape) -> list[str]:
    model, objectives, train = config.model, config.objectives, config.train
    flops = count_flops(model, objectives, shape)
    batches = config.optim.accumulate
    notes = [
        f"FLOPs a pair: {_giga(flops.total / shape.batch)} (student forward "
        f"{_giga(flops.student_forward / shape.batch)}, backward {_giga(flops.student_backward / shape.batch)}; "
        f"teacher {_giga(flops.teacher / shape.batch)}) for captions of {shape.tokens} word pieces",
        f"FLOPs a step on each device: {flops.total * batches / 1e12:,.3f} T "
        f"for {shape.batch * batches} pairs" + (f" in {batches} batches" if batches > 1 else ""),
    ]
    tokens = shape.tokens
    for precision in ("fp32", "bf16") if train.precision == "auto" else (train.precision,):
        half = precision == "bf16"
        memory = count_memory(model, objectives, shape, half, train.device == "cuda", train.recompute)
        held = ", ".join(f"{name} {_bytes(size)}" for name, size in memory.items() if size)
        kept = count_activations(model, objectives, shape, half, train.recompute)
        a_pair = f"the forward pass keeps {_bytes(kept.total // shape.batch)} a pair"
        notes.append(f"memory of a device, {precision}: about {_bytes(sum(memory.values()))} ({held}; {a_pair})")
        most = largest_batch(model, objectives, tokens, half, train.recompute)
        notes.append(f"largest batch on a card of 80 GB, {precision}: about {most:,} pairs")
    return notes


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.2f} G"


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
