"""The one training loop: any `Learner`, from any `Source`, resumed wherever it was killed.

A step follows from (seed, step) and the weights alone: which pictures it sees and in which view,
its random numbers and its learning rate. So a killed training that goes on ends with the weights of
one that was not.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from allgood.progress import bar
from allgood.training import checkpoint
from allgood.training.checkpoint import Position
from allgood.training.config import TrainConfig
from allgood.training.optim import learning_rate_at, make_optimizer
from allgood.training.runtime import join_norms, seed_step
from allgood.training.sources import Source, batch_order, filled
from allgood.types import Failure, InputError, Learner, TrainingBatch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

LOG = "log.jsonl"
"""Of a training: one line every `log_steps`."""


def train(
    model: nn.Module,
    source: Source,
    config: TrainConfig,
    *,
    fabric: Fabric,
    folder: Path,
    seed: int = 0,
    check: Callable[[Mapping[int, Failure]], None] | None = None,
) -> dict[int, Failure]:
    """Train a model, or go on where a killed call with the same arguments stopped.

    Args:
        model: a `Learner`. What has `requires_grad` is trained; it ends in evaluation mode.
        source: the same pictures in the same order at every call.
        fabric: from `open_fabric`, with the config's precision.
        folder: for checkpoints and the log; all processes must see it.
        seed: of the order of the pictures and of all random numbers.
        check: is told before the first step what will be returned, and may raise.

    Returns:
        picture -> why, of those that could not be read before the first step: they are left out.

    Raises:
        InputError: the loss or a weight became NaN, or no picture can be read.
        OSError: the pictures went away during the training; what was trained so far is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.to(fabric.device)
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        join_norms(model)
    if not any(parameter.ndim == 5 for parameter in model.parameters()):
        model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer((p for p in model.parameters() if p.requires_grad), config)
    with torch.random.fork_rng([fabric.device] if fabric.device.type == "cuda" else []):
        found = checkpoint.load(folder, model, optimizer)
        if found is None:
            seed_step(seed, -1, device=fabric.device)
            _prepare(model, source, config.batch_size)
            # A read may fail in one process alone: all leave out what the first could not read.
            position = Position(unreadable=fabric.broadcast(dict(source.failures)))
            if check is not None:
                check(source.views.unreadable(position.unreadable))
        else:
            position, scaler = found
            if scaler:
                fabric.strategy.precision.load_state_dict(scaler)
            source.failures.update(position.unreadable)
        if position.step < config.steps:
            _run_steps(model, optimizer, source, config, position, fabric, folder, seed)
    model.eval()
    return source.views.unreadable(position.unreadable)


def _prepare(model: nn.Module, source: Source, batch_size: int) -> None:
    """Show the learner every picture once, as it is, and so learn which of them cannot be read."""
    assert isinstance(model, Learner)
    model.eval()
    everything = range(source.views.num_pictures)
    order = [everything[i : i + batch_size] for i in everything[::batch_size]]
    with torch.no_grad(), closing(source.batches(order)) as batches:
        readable = (batch for batch in batches if len(batch.index))
        first = next(readable, None)
        if first is not None:
            model.prepare(chain([first], readable))
        for _ in readable:  # those that the learner did not ask for
            pass


def _run_steps(
    model: nn.Module,
    optimizer: Optimizer,
    source: Source,
    config: TrainConfig,
    position: Position,
    fabric: Fabric,
    folder: Path,
    seed: int,
) -> None:
    """All steps from `position` to the end, with log and checkpoints."""
    assert isinstance(model, Learner)
    training_loss = torch.compile(model.training_loss) if config.compile else model.training_loss
    module = fabric.setup_module(_Forward(model))
    fabric_optimizer: Any = fabric.setup_optimizers(optimizer)
    model.train()
    losses = _Losses(fabric)
    share = config.batch_size // (fabric.world_size * config.accumulate)
    keeper = _Keeper(model, optimizer, config, position, fabric, folder)
    with ExitStack() as stack:
        order = _order(source, config, position, fabric, seed)
        batches = stack.enter_context(closing(source.batches(order)))
        shown = stack.enter_context(bar("training", config.steps)) if keeper.is_first else None
        for step in range(position.step, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
            total = torch.zeros((), device=fabric.device)
            for micro in range(config.accumulate):
                batch = filled(_not_empty(next(batches)), share)
                seed_step(seed, step, rank=fabric.global_rank, micro=micro, device=fabric.device)
                with fabric.no_backward_sync(module, enabled=micro < config.accumulate - 1):
                    loss = module(partial(training_loss, batch, step)) / config.accumulate
                    fabric.backward(loss)
                total += loss.detach()
            losses.add(step, total)
            if config.gradient_clip:
                fabric.clip_gradients(
                    module,
                    fabric_optimizer,
                    max_norm=config.gradient_clip,
                    error_if_nonfinite=False,  # asking would wait for the device at each step
                )
            fabric_optimizer.step()
            fabric_optimizer.zero_grad()

            done = step + 1
            log_due, save_due = keeper.due(done)
            if log_due or save_due:
                losses.refuse_nan(config)
            if log_due:
                note = keeper.log(done, losses.mean())
                if shown:
                    shown.at(done, note=note)
            elif shown:
                shown.at(done)
            if save_due:
                keeper.save(done)
    for logger in fabric.loggers:
        logger.finalize("success")  # `save` would not wait for what is still queued


class _Forward(nn.Module):
    """A module whose forward computes any loss of the model.

    Fabric and DDP act on `forward` alone. The loss comes as a function, so that Fabric does not
    find the features and cast them to the precision of the products.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Callable[[], Tensor]) -> Tensor:
        return loss().float()


def _order(
    source: Source, config: TrainConfig, position: Position, fabric: Fabric, seed: int
) -> Iterator[list[int]]:
    """The rows of this process's micro-batches up to the last step; only of pictures that can be
    read."""
    views = source.views
    unreadable = views.unreadable(position.unreadable)
    readable = [i for i in range(views.num_pictures) if i not in unreadable]
    order = batch_order(
        len(readable),
        config.batch_size,
        seed=seed,
        start_step=position.step,
        rank=fabric.global_rank,
        world=fabric.world_size,
        accumulate=config.accumulate,
    )
    micro_batches = islice(order, (config.steps - position.step) * config.accumulate)
    for number, batch in enumerate(micro_batches):
        step = position.step + number // config.accumulate
        yield [views.draw(readable[i], seed=seed, step=step) for i in batch]


def _not_empty(batch: TrainingBatch) -> TrainingBatch:
    if not len(batch.index):  # a disk that went away: what was trained so far is kept
        raise OSError(
            errno.EIO,
            "none of a batch's pictures can be read any more; see that their folder is still "
            "there, and give the same command again",
            "the training pictures",
        )
    return batch


class _Losses:
    """Losses since they were last read, on the device, so that no step waits for the host."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._sum = torch.zeros((), device=fabric.device)
        self._count = 0
        self._first_bad = torch.tensor(torch.iinfo(torch.int64).max, device=fabric.device)

    def add(self, step: int, loss: Tensor) -> None:
        self._sum += loss
        self._count += 1
        self._first_bad = torch.where(
            loss.isfinite(), self._first_bad, self._first_bad.clamp(max=step)
        )

    def mean(self) -> float:
        """Over steps and processes; starts anew."""
        mean: Any = self._fabric.all_reduce(self._sum / self._count, reduce_op="mean")
        self._sum = torch.zeros_like(self._sum)
        self._count = 0
        return float(mean)

    def refuse_nan(self, config: TrainConfig) -> None:
        """InputError in all processes where one of them met a loss that is NaN or infinite."""
        first_bad: Any = self._fabric.all_reduce(self._first_bad, reduce_op="min")
        step = int(first_bad)
        if step < config.steps:
            fp32 = ", or train in fp32 with --train precision=fp32"
            raise InputError(
                f"the loss became NaN at step {step}: lower the learning rate with "
                f"--train learning_rate={config.learning_rate / 10:g}"
                + (fp32 if config.precision != "fp32" else "")
            )


class _Keeper:
    """Writes the log and the checkpoints of a training, and knows when they are due."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: TrainConfig,
        position: Position,
        fabric: Fabric,
        folder: Path,
    ) -> None:
        self.is_first = fabric.is_global_zero
        self._model, self._optimizer, self._config = model, optimizer, config
        self._fabric, self._folder = fabric, folder
        self._position = position
        self._logged_step, self._logged_at = position.step, time.monotonic()
        self._saved_at = time.monotonic()
        self._log = folder / LOG
        if self.is_first:
            with self._log.open("ab") as file:  # what a killed run logged after its checkpoint goes
                file.truncate(min(position.log_bytes, self._log.stat().st_size))

    def due(self, done: int) -> tuple[bool, bool]:
        """(log, checkpoint) after so many steps, the same in all processes."""
        config = self._config
        is_last = done == config.steps
        log_due = is_last or done % config.log_steps == 0
        save_due = is_last or (
            config.checkpoint_steps is not None and done % config.checkpoint_steps == 0
        )
        # Processes agree on the time only where they wait for each other anyway.
        if not save_due and (log_due or self._fabric.world_size == 1):
            minutes = (time.monotonic() - self._saved_at) / 60
            save_due = self._fabric.broadcast(minutes >= config.checkpoint_minutes)
        return log_due, save_due

    def log(self, done: int, loss: float) -> str:
        """A line in the log and in Fabric's loggers; what the bar shows of it."""
        now = time.monotonic()
        steps = done - self._logged_step
        rate = steps * self._config.batch_size / (now - self._logged_at)
        self._logged_step, self._logged_at = done, now
        facts: dict[str, Any] = {
            "loss": loss,
            "learning_rate": learning_rate_at(done - 1, self._config),
            "images_per_second": round(rate, 1),
        }
        self._fabric.log_dict(facts, step=done)
        if self.is_first:
            with self._log.open("a") as file:
                file.write(json.dumps({"step": done, **facts}) + "\n")
        return f"loss {loss:.3g}, {rate:.0f} images/s"

    def save(self, done: int) -> None:
        """A checkpoint, by the first process; all of them refuse a state with NaN."""
        checkpoint.require_finite(self._model, self._optimizer, done)
        if self.is_first:
            position = replace(self._position, step=done, log_bytes=self._log.stat().st_size)
            scaler = self._fabric.strategy.precision.state_dict()
            checkpoint.save(self._folder, self._model, self._optimizer, position, scaler=scaler)
        self._saved_at = time.monotonic()
