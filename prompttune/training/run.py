"""The epochs of one run."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prompttune.data import Batch, CorruptImages, DataSplits, make_loader, on_device
from prompttune.data.loading import loading
from prompttune.data.rng import derive_seed
from prompttune.errors import DataError, DivergedError, UsageError
from prompttune.model import PromptModel
from prompttune.training.held_out import HeldOut
from prompttune.training.image_states import MIB, Room, StateBatches
from prompttune.training.initial import read_start, take_parameters
from prompttune.training.launch import fetched, gather_lines, loader_workers, on_rank_zero, sum_over
from prompttune.training.optim import (
    Objective,
    balanced_weights,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from prompttune.training.progress import Clock, OnProgress, Phase, Progress
from prompttune.training.run_writer import RunWriter
from prompttune.training.scoring import score
from prompttune.training.solving import check_solvable, solve_head
from prompttune.training.state import HELD_OUT_FILE, Progression, Saved

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from prompttune.backbones import Backbone
    from prompttune.task_types import Result
    from prompttune.training.config import TrainConfig

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
READ_LATE = ("cuda",)
"""Devices that have the next step to do while a step's figures are read, as they would stand still otherwise."""


class Run:
    """Data, model, optimiser and loop of one task; :meth:`go` runs all of it."""

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        fabric: Fabric,
        on_progress: OnProgress | None = None,
        saved: Saved | None = None,
    ) -> None:
        self.config, self.fabric, self.task_type = config, fabric, config.chosen_type()
        self.on_progress = on_progress if fabric.is_global_zero else None
        with fabric.rank_zero_first():  # a download must happen only once
            self.data = self._load_splits()
        self.measures = self.task_type.measures
        torch.manual_seed(config.seed)
        self.model = PromptModel(
            backbone,
            config.method_config(),
            labels=self.data.classes,
            preprocess=config.preprocess(backbone),
            task_type=self.task_type,
        ).to(fabric.device)
        if config.solve:
            check_solvable(self.model)
        self._make_loaders()
        self.start: str | None = None
        """Description of the parameters from ``init_from``."""
        if saved is not None:
            self.model.take_sizes(saved.task)
        elif config.init_from is not None:
            self.start = take_parameters(self.model, Path(config.init_from).expanduser())
        else:
            self._begin_training()
        optimizer = make_optimizer(config, self.model.trained_parameters())
        self.keeper = RunWriter(config, fabric, self.model, optimizer, self._identity())
        self._set_up(optimizer)
        self.corrupt = CorruptImages(config.max_corrupt)
        self._unsettled: list[str] = []
        self._latest: Result | None = None
        self.clock = Clock()

    def _load_splits(self) -> DataSplits:
        config = self.config
        data = self.task_type.read_splits(config.data, config.to_flat())
        if not len(data.train) or not len(data.val):
            raise DataError(
                f"{config.data} gives {len(data.train)} training and {len(data.val)} validation images; both are needed"
            )
        return data

    def _identity(self) -> dict[str, Any]:
        """Identity of this run besides its settings; a resumed run must have the same."""
        backbone = self.model.backbone
        return {
            "backbone": backbone.name,
            "fingerprint": backbone.fingerprint,
            "task_parameters": sum(parameter.numel() for parameter in self.model.trained_parameters().values()),
            "train_images": len(self.data.train),
            "val_images": len(self.data.val),
            "classes": list(self.data.classes),
        }

    def _make_loaders(self) -> None:
        config, preprocess = self.config, self.model.preprocess
        shared: dict[str, Any] = {
            "batch_size": config.batch_size,
            "seed": config.seed,
            "workers": loader_workers(config, self.fabric.device),
            "rank": self.fabric.global_rank,
            "world_size": self.fabric.world_size,
            "pin_memory": self.fabric.device.type == "cuda",
        }
        varied = self.task_type.transform(preprocess, config.augment_config())
        plain = self.task_type.transform(preprocess)
        computed = torch.compile(self.model.image_state) if config.compile else self.model.image_state
        self.train_batches, self.val_batches = (
            StateBatches(make_loader(source, transform, shuffle=shuffle, **shared), computed, self.fabric)
            for source, transform, shuffle in ((self.data.train, varied, True), (self.data.val, plain, False))
        )
        self.steps = len(self.train_batches)

    def _begin_training(self) -> None:
        """Let the method set itself up from the training images, in the first process; the others take its result."""

        def begin() -> dict[str, Tensor]:
            torch.manual_seed(derive_seed("begin", self.config.seed))
            start = read_start(self.model)  # first: what the user named may be missing, and setting up takes time
            self.model.method.begin_training(self._plain_batches(), start)
            return {name: tensor.cpu() for name, tensor in self.model.method.state_dict().items()}

        if self.fabric.world_size == 1:
            begin()
            return
        stored = on_rank_zero(self.fabric, begin)
        self.model.method.take_sizes(stored)
        self.model.method.load_state_dict(stored)

    def _plain_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All training images in evaluation transform, shuffled by the seed, with their targets."""
        # without loader processes, which would read ahead of a reader that stops early
        loader = make_loader(
            self.data.train,
            self.task_type.transform(self.model.preprocess),
            batch_size=self.config.batch_size,
            shuffle=True,
            seed=derive_seed("begin", self.config.seed),
        )
        yield from on_device(loader, self.fabric.device, CorruptImages(self.config.max_corrupt))

    def _set_up(self, optimizer: torch.optim.Optimizer) -> None:
        weights = None
        if self.config.class_weights == "balanced":
            weights = balanced_weights(self.data.train.labels(), len(self.data.classes))
        objective = Objective(self.model, weights, self.config.label_smoothing)
        module = torch.compile(objective) if self.config.compile else objective
        self.objective, self.optimizer = self.fabric.setup(module, optimizer)

    @loading()
    def go(self, saved: Saved | None) -> Progression:
        """Train from the start or from a saved state to the end; the run folder holds the result."""
        try:
            listed = None if saved is None else HeldOut.read(self.keeper.folder.path)
            if listed is not None and not listed.lists(self.data.val):
                raise UsageError(
                    f"cannot resume {self.keeper.folder.path}: {self.config.data} has changed since it began: "
                    f"the validation images differ from {HELD_OUT_FILE}; restore the data, or start a new run"
                )
            self.keeper.begin(saved)
            if listed is None and self.fabric.is_global_zero:
                tell = functools.partial(self._tell_read, "list")
                held = HeldOut.of(self.data.val, len(self.data.train), tell)
                held.write(self.keeper.folder.path, str(self.config.data))
            self.corrupt.add(self.progression.corrupt)
            self._introduce(saved)
            with self.model.backbone.matrices_in(AUTOCAST.get(self.config.precision)):
                self._keep_states()
                while self.progression.goes_on(self.config.epochs, self.config.patience):
                    self._epoch()
                self._finish()
        finally:
            self.keeper.close()
        return self.progression

    @property
    def progression(self) -> Progression:
        """Progress of the run."""
        return self.keeper.progression

    def _keep_states(self) -> None:
        """Compute what no epoch changes, in one pass over the images."""
        config, began = self.config, time.perf_counter()
        if not config.cache:
            return
        room = Room(config.cache_memory * MIB, config.cache_disk * MIB, self.keeper.folder.path)
        tell = functools.partial(self._tell_read, "keep")
        for batches in (self.train_batches, self.val_batches):
            batches.keep(room, self._note, tell)
        self.progression.seconds += time.perf_counter() - began

    def _epoch(self) -> None:
        began, epoch = time.perf_counter(), self.progression.epoch
        record = self._solve_epoch(epoch) if self.config.solve else self._train_epoch(epoch)
        # an extended run has already pruned, whatever share of the new number of epochs that was
        if not self.progression.rewound and self.model.method.end_epoch(epoch, self.config.epochs):
            self._rewind(epoch)
        is_last = epoch + 1 == self.config.epochs
        result = self._validate() if is_last or (epoch + 1) % self.config.eval_every == 0 else None
        self._check_state(epoch, result)
        self._latest = result
        self._settle_corrupt()
        record["val_loss"] = None if result is None else result.loss
        for name in (self.measures.score, self.measures.second):
            record[f"val_{name}"] = None if result is None else getattr(result, name)
        record["seconds"] = round(time.perf_counter() - began, 3)
        best = self.keeper.end_epoch(record, result)
        self._tell("epoch", epoch, record=record, best=best)

    def _rewind(self, epoch: int) -> None:
        self.keeper.rewind()
        left, trained = self.model.method.parameters_left(), self.model.trained_parameters()
        count = sum(parameter.numel() for name, parameter in trained.items() if name.startswith("method."))
        self._note(
            f"after epoch {epoch + 1} {self.config.method} went back to its initial values; {left:,} of {count:,} "
            "parameters remain; optimiser, schedule and the best checkpoint start again"
        )

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the training images; returns the epoch's record."""
        # dropout draws from this seed, so any epoch can start without the ones before it
        torch.manual_seed(derive_seed("epoch", self.config.seed, epoch, self.fabric.global_rank))
        self.train_batches.set_epoch(epoch)
        self.objective.train()
        loss = correct = images = 0.0
        lr, began = self.config.lr, time.perf_counter()
        self.clock.start()
        steps = self._steps(epoch)
        if self.fabric.device.type in READ_LATE:
            steps = (done for done, _ in pairwise(chain(steps, [None])) if done is not None)
        for index, lr, figures in steps:
            batch_loss, batch_correct, batch_images = figures()
            if not math.isfinite(batch_loss):
                raise self._diverged(f"the loss is {batch_loss} at epoch {epoch + 1}, step {index + 1}", lr)
            loss, correct, images = loss + batch_loss, correct + batch_correct, images + batch_images
            self.clock.tick("train", batch_images)
            self._tell("train", epoch, index + 1, loss=loss / max(images, 1), accuracy=correct / max(images, 1))
        if not images:
            raise DataError("no training image could be read in this epoch")
        return {
            "epoch": epoch + 1,
            "lr": lr,
            "train_loss": loss / images,
            f"train_{self.measures.train}": correct / images,
            "images_per_second": round(images / (time.perf_counter() - began), 2),
        }

    def _solve_epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the training images, from which the head is solved; returns the epoch's record."""
        began, seen = time.perf_counter(), []
        self.objective.train()
        self.clock.start()
        for index, batch in enumerate(self.train_batches):
            self._note_corrupt(batch)
            images, targets = batch.to(self.fabric.device)
            if len(targets):
                with torch.no_grad(), self.fabric.autocast():
                    seen.append((self.model(images, aux=False).features.float(), targets))
            self.clock.tick("train", len(targets))
            self._tell("train", epoch, index + 1)
        if not seen:
            raise DataError("no training image could be read")
        features, targets = (torch.cat(parts) for parts in zip(*seen, strict=True))
        head, solution = self.model.head, solve_head(features, targets, len(self.model.labels))
        with torch.no_grad():
            head.weight.copy_(solution.weight)
            head.bias.copy_(solution.bias)
            logits = head(features, (), head.task_state())
        self._note(
            f"ridge regression of strength {solution.strength:.2g}: top-1 {solution.top1:.2%} where each image "
            "is left out in turn"
        )
        return {
            "epoch": epoch + 1,
            "lr": 0.0,
            "train_loss": float(self.task_type.loss(logits, targets)),
            f"train_{self.measures.train}": float(self.task_type.hits(logits, targets)) / len(targets),
            "images_per_second": round(len(targets) / (time.perf_counter() - began), 2),
        }

    def _steps(self, epoch: int) -> Iterator[tuple[int, float, Callable[[], list[float]]]]:
        """Do the steps of an epoch: index, learning rate and figures of each."""
        begun = self.progression.rewound
        for index, batch in enumerate(self.train_batches):
            step = (epoch - begun) * self.steps + index
            lr = learning_rate(self.config, step, self.steps, self.config.epochs - begun)
            set_learning_rate(self.optimizer, lr)
            self._note_corrupt(batch)
            yield index, lr, fetched(self._step(batch))

    def _step(self, batch: Batch) -> Tensor:
        """One optimiser step; returns summed loss, right answers and images over all processes, on the device, [3]."""
        device, count = self.fabric.device, len(batch.targets)
        images, targets = batch.to(device)
        if not count:
            if self.fabric.world_size == 1:
                return torch.zeros(3, dtype=torch.float64)
            # the other processes wait for this one's gradients, so it takes part with zeros
            size = self.model.preprocess.image_size
            images = torch.zeros(1, 3, size, size, device=device)
            targets = targets.new_zeros((1, *targets.shape[1:]))
        loss, logits = self.objective(images, targets)
        self.fabric.backward(loss if count else loss * 0.0)
        if self.config.grad_clip is not None:
            self.fabric.clip_gradients(
                self.objective, self.optimizer, max_norm=self.config.grad_clip, error_if_nonfinite=False
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        correct = self.task_type.hits(logits, targets) * bool(count)
        seen = torch.full((), count, dtype=torch.float64, device=device)
        return sum_over(self.fabric, torch.stack((loss.detach().double() * count, correct.double(), seen)))

    def _validate(self) -> Result:
        """Score the current model on the validation images of all processes."""
        epoch, done = self.progression.epoch, 0

        def count(batch: Batch) -> None:
            nonlocal done
            done += 1
            self._note_corrupt(batch)
            self.clock.tick("validate", len(batch.targets))
            self._tell("validate", min(epoch, self.config.epochs - 1), done)

        self.clock.start()
        autocast: Callable[[], Any] = self.fabric.autocast
        scores = self.task_type.scores(len(self.model.labels))
        score(self.model, self.val_batches, scores, device=self.fabric.device, autocast=autocast, on_batch=count)
        if self.fabric.world_size > 1:
            scores.reduce(lambda tensor: sum_over(self.fabric, tensor))
        result: Result = scores.result(self.model.labels)
        return result

    def _finish(self) -> None:
        status = "finished" if self.progression.epoch >= self.config.epochs else "stopped early"
        self.keeper.flush()
        last = self.keeper.snapshot()
        result = self._latest if self.progression.best_epoch == self.progression.epoch else None
        self.keeper.load_best()
        self.keeper.finish(last, result or self._validate(), status)

    def _note_corrupt(self, batch: Batch) -> None:
        # several processes decide together after the epoch: one that stopped alone would leave the others waiting
        if self.fabric.world_size == 1:
            self.corrupt.add(batch.corrupt)
        else:
            self._unsettled.extend(batch.corrupt)

    def _settle_corrupt(self) -> None:
        known = len(self.progression.corrupt)
        self.corrupt.add(gather_lines(self.fabric, self._unsettled))
        self._unsettled.clear()
        self.progression.corrupt = list(self.corrupt.lines)
        for line in self.progression.corrupt[known:]:
            self._note(f"unreadable image: {line}")

    def _check_state(self, epoch: int, result: Result | None) -> None:
        """Keep a state that is beyond repair from replacing a good one."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.task_parameters().values()):
            raise self._diverged(f"a parameter is not finite after epoch {epoch + 1}", lr)
        if result is not None and not math.isfinite(result.loss or 0.0):
            raise self._diverged(f"the validation loss is {result.loss} after epoch {epoch + 1}", lr)

    def _diverged(self, what: str, lr: float) -> DivergedError:
        hints = [f"a lower --lr (it was {lr:.3g} here)"]
        hints += ["--precision fp32"] if self.config.precision != "fp32" else []
        hints += ["--grad-clip 1"] if self.config.grad_clip is None else []
        folder, best = self.keeper.folder, self.progression.best_epoch
        kept = f", the best checkpoint (epoch {best}) in {folder.path}" if best else ""
        return DivergedError(
            what,
            f"try {' or '.join(hints)}; the last good state (epoch {self.progression.epoch}) is in {folder.last}{kept}",
        )

    def _introduce(self, saved: Saved | None) -> None:
        identity, backbone = self.keeper.identity, self.model.backbone
        self._note(
            f"{self.config.method}{self._head()} over {backbone.name} at {backbone.image_size} px "
            f"({backbone.weights_source}), "
            f"{identity['task_parameters']:,} parameters; {self.config.data}: {identity['train_images']} training and "
            f"{identity['val_images']} validation images of {len(self.data.classes)} classes; on {self.fabric.device}"
        )
        if self.start is not None:
            self._note(self.start)
        if saved is not None and self.progression.epoch:
            before = saved.settings["epochs"]
            longer = (
                "" if before == self.config.epochs else f"; it had {before}: the schedule is that of the new number"
            )
            self._note(f"resuming after epoch {self.progression.epoch} of {self.config.epochs}{longer}")

    def _head(self) -> str:
        return f" with a {self.config.head} head" if len(self.task_type.heads) > 1 else ""

    def _note(self, text: str) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress("note", text=text))

    def _tell_read(self, phase: Phase, done: int, of: int) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(phase, step=done, steps=of))

    def _tell(self, phase: Phase, epoch: int, step: int = 0, **news: Any) -> None:
        if self.on_progress is None:
            return
        in_train = phase == "train"
        epochs_left = self.config.epochs - epoch - 1
        train_left = self.steps * epochs_left + (self.steps - step if in_train else 0)
        val_steps = len(self.val_batches)
        val_left = val_steps * (epochs_left // self.config.eval_every + 1)
        val_left += {"train": val_steps, "validate": val_steps - step}.get(phase, 0)
        self.on_progress(
            Progress(
                phase,
                measures=self.measures,
                epoch=epoch + 1,
                epochs=self.config.epochs,
                step=step,
                steps=self.steps if in_train else val_steps,
                images_per_second=self.clock.images_per_second(phase),
                seconds_left=self.clock.seconds_left(train_left, val_left),
                **news,
            )
        )
