"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tercet.config import Config
from tercet.data.batch import Batch
from tercet.data.order import mix
from tercet.device import machine_name, tune_malloc
from tercet.distributed import Ranks, gradient_sync, init_distributed
from tercet.errors import TercetError
from tercet.files import write_atomic
from tercet.objectives.loss import total
from tercet.tasks.task import TaskOutput
from tercet.train.dry_run import explain_oom, warn_if_oom_likely
from tercet.train.evaluate import finish_run, save_checkpoint, validate
from tercet.train.log import NullLogger, open_logger
from tercet.train.optim import alpha_at, gradient_norm, learning_rate, step_clipped
from tercet.train.setup import TrainState, open_run_folder, set_up

# Facts that the report and the model card show beside the config.
FACTS = "run.json"


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and its checkpoint is written."""


def train(config: Config, resume: Path | None = None) -> Path:
    """Run a training to its end.

    Args:
        config: the resolved config.
        resume: folder of the run to continue; None starts a new one.

    Returns:
        The run folder, with `model/`, `metrics.jsonl` and checkpoints in it.

    Raises:
        TercetError: the input is wrong, there is not enough memory, or the loss was not finite too many times in a row.
        Stopped: Ctrl-C or SIGTERM came; a checkpoint is written first.
    """
    with init_distributed(config.train.device), explain_oom(config), open_run_folder(config, resume) as folder:
        state = set_up(config, folder, resume is not None)
        if state.spec.device.type == "cpu":
            tune_malloc()
        with open_logger(folder, state.total_steps, state.step, state.ranks.first) as logger, state.stop.listening():
            announce(state, logger)
            run_steps(state, logger)
            save_checkpoint(state, wait=True)
            finish_run(state, logger)
            if state.stop.dropped:
                raise Stopped(_stopped(state, state.stop.received))
    return folder


def run_steps(state: TrainState, logger: NullLogger) -> None:
    """The remaining steps, with logging, checkpoints and evaluations between them."""
    settings = state.config.train
    meter = ThroughputMeter()
    guard = NonFiniteGuard(state, logger)
    for batches in remaining_steps(state):
        result = train_step(state, batches)
        state.step += 1
        meter.add(result.pairs, batches)
        guard.add(result)
        if result.losses and (state.step % settings.log_every == 0 or state.step == state.total_steps):
            logger.log_train(state.step, step_metrics(state, result, meter))
        else:
            logger.advance(state.step)
        if state.step % settings.checkpoint_every == 0:
            save_checkpoint(state)
        if settings.evaluate_every and state.step % settings.evaluate_every == 0:
            save_checkpoint(state)
            validate(state, logger)
        if signal := state.stop.agreed():
            guard.check()
            save_checkpoint(state, wait=True)
            logger.event(state.step, f"stopped by {signal}")
            raise Stopped(_stopped(state, signal))
    guard.check()


def remaining_steps(state: TrainState) -> Iterator[list[Batch]]:
    """The batches of each step up to `total_steps`; the caller increments `state.step`."""
    per_step = state.config.optim.grad_accum_steps
    while state.step < state.total_steps:
        epoch, first = divmod(state.step, state.steps_per_epoch)
        batches = iter(state.loader.batches(epoch, first * per_step))
        for _ in range(first, state.steps_per_epoch):
            yield [batch for _, batch in zip(range(per_step), batches, strict=False)]
            if state.step >= state.total_steps:
                return


@dataclass
class StepResult:
    """The result of a step.

    Attributes:
        losses: mean over the batches of the step, still on the device.
        grad_norm: `[]`, before clipping.
        pairs: pairs of the step, over all ranks.
        diagnose: see `failure`.
    """

    losses: dict[str, Tensor]
    grad_norm: Tensor
    pairs: int
    diagnose: Callable[[], str | None]

    @cached_property
    def failure(self) -> str | None:
        """Why the step was skipped; None when it was not.  Waits for the device, and after a failure for the other
        ranks, so that all of them have to ask at the same time."""
        return self.diagnose()


def train_step(state: TrainState, batches: Sequence[Batch]) -> StepResult:
    """One optimizer step over the summed gradients of `batches`; skipped where a gradient is not finite.

    The host does not wait for the device.  Every random choice follows from the seed and the step, so that a resumed
    run repeats an unbroken one exactly.
    """
    config, task, optimizer = state.config, state.task, state.optimizer
    rate = learning_rate(config.optim, state.step, state.steps_per_epoch, config.train.epochs)
    for group in optimizer.param_groups:
        group["lr"] = rate
    alpha = alpha_at(config.objectives, state.step, state.steps_per_epoch)
    seeds = [mix(config.train.seed, state.step, index) for index in range(len(batches))]
    prepared = [task.prepare(batch, state.spec.device, seed) for batch, seed in zip(batches, seeds, strict=True)]
    parts = [(batch, seed) for batch, seed in zip(prepared, seeds, strict=True) if batch.layout.total]
    if not parts:
        return StepResult({}, torch.zeros(()), 0, lambda: "every sample of the step is broken")

    # --- forward and backward
    task.begin_step()
    optimizer.zero_grad(set_to_none=True)
    done: list[tuple[Any, TaskOutput]] = []
    losses: dict[str, Tensor] = {}
    for batch, seed in parts:
        torch.manual_seed(seed if state.ranks.first else mix(seed, state.ranks.rank))  # dropout
        with gradient_sync(state.trained, last=len(done) == len(parts) - 1):
            with state.spec.autocast():
                output = state.trained(batch, alpha)
            (total(output.losses, config.objectives) / len(parts)).backward()
        done.append((batch, output))
        for name, loss in output.losses.items():
            losses[name] = losses.get(name, torch.zeros(())) + loss.detach() / len(parts)

    # --- step and queue, which stay unchanged where the gradient is not finite; decided on the device
    grad_norm = gradient_norm(task.student)
    finite = torch.isfinite(grad_norm)
    step_clipped(optimizer, grad_norm, config.optim.clip_norm)
    for batch, output in done:
        task.enqueue(batch, output, finite)
    sound = torch.stack([task.is_sound(output) for _, output in done]).all()

    def diagnose() -> str | None:
        return None if bool(finite) else describe_failure(losses, batches, bool(sound), state.ranks)

    return StepResult(losses, grad_norm, sum(batch.layout.total for batch, _ in parts), diagnose)


def describe_failure(losses: dict[str, Tensor], batches: Sequence[Batch], sound: bool, ranks: Ranks) -> str:
    """Which objectives were not finite, on which samples; of several ranks those where it started, if known."""
    names = [name for name, loss in losses.items() if not bool(torch.isfinite(loss))]
    keys = [key for batch in batches for key in batch.keys]
    shown = ", ".join(keys[:16]) + (f" and {len(keys) - 16} more" if len(keys) > 16 else "")
    reports = ranks.gather((not sound, bool(names), shown))
    worst = max(reports)[:2]
    samples = [
        f"Samples of rank {rank}: {keys}" if ranks.world > 1 else f"Samples: {keys}"
        for rank, (*found, keys) in enumerate(reports)
        if tuple(found) == worst
    ]
    found = dict.fromkeys(name for names in ranks.gather(names) for name in names) or ["the gradient"]
    return f"{' and '.join(found)} not finite; the step is skipped. {'. '.join(samples)}"


class NonFiniteGuard:
    """Checks each step after the next one is launched, so that the device never waits for the host."""

    def __init__(self, state: TrainState, logger: NullLogger) -> None:
        self._state = state
        self._logger = logger
        self._last: tuple[int, StepResult] | None = None
        self._bad_steps = 0

    def add(self, result: StepResult) -> None:
        """Check the previous step, and keep `result`, of the step that was just launched on the device.

        Raises:
            TercetError: too many steps in a row were not finite; a checkpoint is written first.
        """
        self.check()
        self._last = self._state.step, result

    def check(self) -> None:
        """Check the step that was added last; see `add`."""
        if self._last is None:
            return
        (step, result), self._last = self._last, None
        if not result.failure:
            self._bad_steps = 0
            return
        self._bad_steps += 1
        self._logger.event(step, result.failure)
        if self._bad_steps >= self._state.config.train.max_bad_steps:
            save_checkpoint(self._state, wait=True)
            raise TercetError(
                f"{self._bad_steps} steps in a row were not finite; "
                f"lower optim.lr and go on with --resume {self._state.folder}"
            )


class ThroughputMeter:
    """Pairs a second over all ranks, and samples skipped on this one."""

    def __init__(self) -> None:
        self._since, self._pairs, self._skipped = time.monotonic(), 0, 0

    def add(self, pairs: int, batches: Sequence[Batch]) -> None:
        """Count a step."""
        self._pairs += pairs
        self._skipped += sum(len(batch.skipped) for batch in batches)

    def reset(self) -> tuple[float, int]:
        """Pairs a second and skipped samples since the last reset."""
        now = time.monotonic()
        counted = self._pairs / max(now - self._since, 1e-9), self._skipped
        self._since, self._pairs, self._skipped = now, 0, 0
        return counted


def step_metrics(state: TrainState, result: StepResult, meter: ThroughputMeter) -> dict[str, float]:
    """The metrics of a logging step over all ranks, in one all-reduce; waits for the device."""
    config, ranks = state.config, state.ranks
    pairs_per_second, skipped_here = meter.reset()
    own = torch.stack([*result.losses.values(), result.grad_norm.new_tensor(skipped_here)])
    *means, skipped = ranks.sum(own).cpu().unbind()
    losses = {name: loss / ranks.world for name, loss in zip(result.losses, means, strict=True)}
    return {
        "epoch": state.step / state.steps_per_epoch,
        "loss": float(total(losses, config.objectives)),
        **{name: float(loss) for name, loss in losses.items()},
        "lr": state.optimizer.param_groups[0]["lr"],
        "temperature": float(state.task.student.temperature.detach()),
        "grad_norm": float(result.grad_norm),
        "alpha": alpha_at(config.objectives, state.step - 1, state.steps_per_epoch),
        "pairs_per_second": pairs_per_second,
        "skipped": int(skipped),
    }


def announce(state: TrainState, logger: NullLogger) -> None:
    """Report what is about to run."""
    config, source, spec, ranks = state.config, state.source, state.spec, state.ranks
    parameters = sum(parameter.numel() for parameter in state.task.student.parameters())
    texts = source.sample_count
    if ranks.first:
        facts = {"recipe": config.name, "pairs": texts, "parameters": parameters, "machine": machine_name(spec.device)}
        write_atomic(state.folder / FACTS, json.dumps(facts))
    for message in [*state.messages, *warn_if_oom_likely(config, spec, parameters)]:
        logger.event(state.step, message)
    where = f"{ranks.world} ranks ({config.train.parallel}), the first on " if ranks.world > 1 else ""
    logger.event(
        state.step,
        f"{source.image_count} images with {texts} texts, {parameters / 1e6:.1f} M parameters, {state.total_steps} "
        f"steps on {where}{spec.device} in {spec.precision}, losses: {', '.join(state.task.loss_names)}",
    )


def _stopped(state: TrainState, signal: str | None) -> str:
    return f"stopped by {signal}; go on with: tercet train --resume {state.folder}"
