"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
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
from tercet.train.finish import finish_run, save, validate
from tercet.train.optim import alpha_of, gradient_norm, learning_rate, step_clipped
from tercet.train.room import memory_told, tight
from tercet.train.session import Session, due_steps, open_session, text_count
from tercet.train.stop import StopRequest
from tercet.train.track import Silence, Tracker

# What the report says of a run beside its config.
FACTS = "run.json"


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and its checkpoint is written."""


@dataclass
class StepResult:
    """What a step gave.

    Attributes:
        losses: mean over the batches of the step, still on the device.
        grad_norm: `[]`, before clipping.
        pairs: pairs that were read.
        find_trouble: see `trouble`.
    """

    losses: dict[str, Tensor]
    grad_norm: Tensor
    pairs: int
    find_trouble: Callable[[], str | None]

    @cached_property
    def trouble(self) -> str | None:
        """Why the step was not taken; None when it was.  The host waits here for the device, and where there is trouble
        the ranks tell one another, so that all of them have to ask at the same time."""
        return self.find_trouble()


def train(config: Config, resume: Path | None = None) -> Path:
    """Run a training to its end.

    Args:
        config: the resolved config.
        resume: run folder to go on in; None starts a new one.

    Returns:
        The run folder, with `model/`, `metrics.jsonl` and checkpoints in it.

    Raises:
        TercetError: the input is wrong, memory is lacking, or the loss was not finite too many times in a row.
        Stopped: Ctrl-C or SIGTERM came; a checkpoint is written first.
    """
    with init_distributed(config.train.device), memory_told(config):
        session = open_session(config, resume)
        if session.placement.device.type == "cpu":
            tune_malloc()
        with open_tracker(session) as tracker, session.stop as stop:
            announce(session, tracker)
            run_steps(session, tracker, stop)
            save(session, wait=True)
            finish_run(session, tracker)
            if stop.dropped:
                raise Stopped(f"stopped by {stop.received}; go on with: tercet train --resume {session.folder}")
        session.lock.release()
    return session.folder


def run_steps(session: Session, tracker: Tracker, stop: StopRequest) -> None:
    """The steps that are still due, with what comes between them."""
    settings = session.config.train
    pace = Pace()
    watch = Watch(session, tracker)
    for batches in due_steps(session):
        result = take_step(session, batches)
        session.step += 1
        pace.add(result.pairs, batches)
        watch.add(result)
        if (session.step % settings.log_every == 0 or session.step == session.total_steps) and result.losses:
            tracker.log_train(session.step, measure(session, result, pace))
        else:
            tracker.advance(session.step)
        if session.step % settings.checkpoint_every == 0:
            save(session)
        if settings.evaluate_every and session.step % settings.evaluate_every == 0:
            save(session)
            validate(session, tracker)
        if stopped := stop.agreed(session.ranks):
            watch.look()
            save(session, wait=True)
            tracker.event(session.step, f"stopped by {stopped}")
            raise Stopped(f"stopped by {stopped}; go on with: tercet train --resume {session.folder}")
    watch.look()


class Watch:
    """Asks each step for trouble once the next one is on its way, so that the device never waits for the host."""

    def __init__(self, session: Session, tracker: Tracker) -> None:
        self._session = session
        self._tracker = tracker
        self._last: tuple[int, StepResult] | None = None
        self._bad_steps = 0

    def add(self, result: StepResult) -> None:
        """Look at the step before, and keep `result`, of the step that was just given to the device.

        Raises:
            TercetError: too many steps in a row were not finite; a checkpoint is written first.
        """
        self.look()
        self._last = self._session.step, result

    def look(self) -> None:
        """Look at the step that was added last; see `add`."""
        if self._last is None:
            return
        (step, result), self._last = self._last, None
        self._bad_steps = self._bad_steps + 1 if result.trouble else 0
        if result.trouble:
            self._tracker.event(step, result.trouble)
        if self._bad_steps >= self._session.config.train.max_bad_steps:
            save(self._session, wait=True)
            raise TercetError(
                f"{self._bad_steps} steps in a row were not finite; "
                f"lower optim.lr and go on with --resume {self._session.folder}"
            )


def take_step(session: Session, batches: Sequence[Batch]) -> StepResult:
    """One optimizer step over one batch, or over several whose gradients are summed; none where a gradient is not
    finite.  The host does not wait for the device to do it.

    Every random choice follows from the seed and the step, so that a resumed run repeats an unbroken one exactly.
    """
    config, task, optimizer = session.config, session.task, session.optimizer
    step, steps_per_epoch = session.step, session.steps_per_epoch
    rate = learning_rate(config.optim, step, steps_per_epoch, config.train.epochs)
    for group in optimizer.param_groups:
        group["lr"] = rate
    alpha = alpha_of(config.objectives, step, steps_per_epoch)
    seeds = [mix(config.train.seed, step, index) for index in range(len(batches))]
    parts = [task.prepare(batch, session.placement.device, seed) for batch, seed in zip(batches, seeds, strict=True)]
    parts = [(part, seed) for part, seed in zip(parts, seeds, strict=True) if part.spread.total]
    if not parts:
        return StepResult({}, torch.zeros(()), 0, lambda: "every sample of the step is broken")

    task.begin_step()
    optimizer.zero_grad(set_to_none=True)
    done: list[tuple[Any, TaskOutput]] = []
    losses: dict[str, Tensor] = {}
    for prepared, seed in parts:
        torch.manual_seed(seed if session.ranks.first else mix(seed, session.ranks.rank))  # dropout
        with gradient_sync(session.trained, last=len(done) == len(parts) - 1):
            with session.placement.autocast():
                output = session.trained(prepared, alpha)
            (total(output.losses, config.objectives) / len(parts)).backward()
        done.append((prepared, output))
        for name, loss in output.losses.items():
            losses[name] = losses.get(name, torch.zeros(())) + loss.detach() / len(parts)
    grad_norm = gradient_norm(task.student)
    finite = torch.isfinite(grad_norm)
    step_clipped(optimizer, grad_norm, config.optim.clip_norm)
    for prepared, output in done:
        task.enqueue(prepared, output, finite)
    sound = torch.stack([task.is_sound(output) for _, output in done]).all()

    def find_trouble() -> str | None:
        return None if bool(finite) else name_trouble(losses, batches, bool(sound), session.ranks)

    return StepResult(losses, grad_norm, sum(prepared.spread.total for prepared, _ in parts), find_trouble)


def name_trouble(losses: dict[str, Tensor], batches: Sequence[Batch], sound: bool, ranks: Ranks) -> str:
    """Which objective was not finite, on which samples of which ranks: of those where it began, if that can be told."""
    named = [name for name, loss in losses.items() if not bool(torch.isfinite(loss))]
    keys = [key for batch in batches for key in batch.keys]
    shown = ", ".join(keys[:16]) + (f" and {len(keys) - 16} more" if len(keys) > 16 else "")
    told = ranks.gather((not sound, bool(named), shown))
    worst = max(told)[:2]
    samples = [
        f"Samples of rank {rank}: {keys}" if ranks.world > 1 else f"Samples: {keys}"
        for rank, (*found, keys) in enumerate(told)
        if tuple(found) == worst
    ]
    found = dict.fromkeys(name for names in ranks.gather(named) for name in names) or ["the gradient"]
    return f"{' and '.join(found)} not finite; the step is left out. {'. '.join(samples)}"


class Pace:
    """Pairs a second, over all ranks, and samples left out here since they were last asked for."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._pairs = 0
        self._skipped = 0

    def add(self, pairs: int, batches: Sequence[Batch]) -> None:
        """Count a step."""
        self._pairs += pairs
        self._skipped += sum(len(batch.skipped) for batch in batches)

    def take(self) -> dict[str, float]:
        """`pairs_per_second` and `skipped`, counted from now on anew."""
        now = time.monotonic()
        taken = {"pairs_per_second": self._pairs / max(now - self._since, 1e-9), "skipped": self._skipped}
        self._since, self._pairs, self._skipped = now, 0, 0
        return taken


def measure(session: Session, result: StepResult, pace: Pace) -> dict[str, float]:
    """The metrics of a logging step over all ranks, which exchange them here once; the host waits for the device."""
    config, ranks = session.config, session.ranks
    taken = pace.take()
    own = torch.stack([*result.losses.values(), result.grad_norm.new_tensor(taken["skipped"])])
    *means, skipped = ranks.sum(own).cpu().unbind()
    losses = {name: loss / ranks.world for name, loss in zip(result.losses, means, strict=True)}
    return {
        "epoch": session.step / session.steps_per_epoch,
        "loss": float(total(losses, config.objectives)),
        **{name: float(loss) for name, loss in losses.items()},
        "lr": session.optimizer.param_groups[0]["lr"],
        "temperature": float(session.task.student.temperature.detach()),
        "grad_norm": float(result.grad_norm),
        "alpha": alpha_of(config.objectives, session.step - 1, session.steps_per_epoch),
        **taken,
        "skipped": int(skipped),
    }


def open_tracker(session: Session) -> Tracker:
    """What writes and shows the run's numbers: on the first rank alone."""
    return Tracker(session.folder, session.total_steps, session.step) if session.ranks.first else Silence()


def announce(session: Session, tracker: Tracker) -> None:
    """Say what is about to run."""
    model = session.task.student
    parameters = sum(parameter.numel() for parameter in model.parameters())
    texts = text_count(session.source)
    placement = session.placement
    facts = {"recipe": session.config.name, "pairs": texts, "parameters": parameters}
    if session.ranks.first:
        write_atomic(session.folder / FACTS, json.dumps({**facts, "machine": machine_name(placement.device)}))
    for message in [*session.messages, *filter(None, [tight(session.config, placement)])]:
        tracker.event(session.step, message)
    tracker.event(
        session.step,
        f"{session.source.image_count} images with {texts} texts, {parameters / 1e6:.1f} M parameters, "
        f"{session.total_steps} steps on {_devices(session)} in {placement.precision}, "
        f"losses: {', '.join(session.task.loss_names)}",
    )


def _devices(session: Session) -> str:
    """`cpu`, or `8 ranks, the first on cuda:0, ddp`."""
    ranks, device = session.ranks, session.placement.device
    if ranks.world == 1:
        return str(device)
    return f"{ranks.world} ranks ({session.config.train.parallel}), the first on {device}"
