"""The training loop. It continues from any step as if it had never stopped."""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..cli import CommandError
from . import checkpoint
from .augment import Augment, prepare
from .checks import FLAG, CheckpointError, Rule, number, shown, tensor
from .data import Data
from .graphed import Graphed
from .log import Log
from .measure import measure
from .place import Place, synchronize_
from .settings import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Interrupted(Exception):
    """Ctrl-C was pressed; the training so far is saved."""


class _CtrlC:
    """Inside this context a first Ctrl-C asks to stop after the step; a second one stops at
    once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _CtrlC:
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        if self._in_main_thread:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before)

    def __exit__(self, *_) -> None:
        if self._in_main_thread:
            signal.signal(signal.SIGINT, self._before)


def _schedule(
    optimizer: torch.optim.Optimizer, settings: Settings, steps: int
) -> lr_scheduler.LRScheduler:
    """The learning rate by steps of the optimizer, ``steps`` an epoch."""
    total, warmup = steps * settings.epochs, steps * settings.warmup
    if settings.schedule == "onecycle":  # Smith and Topin, 2019; it has a warmup of its own
        return lr_scheduler.OneCycleLR(
            optimizer,
            settings.lr,
            total_steps=total,
            pct_start=warmup / total or 0.3,
            cycle_momentum=False,
        )
    rest = total - warmup
    after = {
        "none": lambda: lr_scheduler.ConstantLR(optimizer, 1.0),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, rest),
        # He et al., 2016, section 4.2
        "step": lambda: lr_scheduler.MultiStepLR(optimizer, [rest // 2, rest * 3 // 4]),
    }[settings.schedule]
    if not warmup:
        return after()
    first = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [first, after()], [warmup])


class Net:
    """A model with its optimizer, schedule, scaler and averaged weights.

    Args:
        name: ``fused`` or ``plain``.
        model: on any device; it is moved.
        settings: of the run.
        place: of the run.
        steps: steps of the optimizer in an epoch.
    """

    def __init__(
        self, name: str, model: nn.Module, settings: Settings, place: Place, steps: int
    ) -> None:
        self.name = name
        self.model = model.to(place.device, memory_format=settings.layout)
        self.average = None
        if settings.ema is not None:
            decay = get_ema_multi_avg_fn(settings.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=decay, use_buffers=True)
        self.wrapped = self.model
        if place.world > 1:
            devices = [place.device] if place.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.model, devices)
            if settings.sync_bn:
                synchronize_(self.wrapped)
        if settings.compile:
            self.wrapped.compile()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if settings.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay,
                fused=settings.cuda_graph or None,
            )  # fmt: skip
        else:
            self.optimizer = torch.optim.AdamW(
                parameters, settings.lr, weight_decay=settings.weight_decay,
                fused=settings.cuda_graph or None, capturable=settings.cuda_graph,
            )  # fmt: skip
        self.schedule = _schedule(self.optimizer, settings, steps)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=settings.amp == "fp16")
        self._settings, self._progress = settings, _progress(settings, steps)
        self.accuracy = 0.0  # of validation, after the last epoch
        self.graphed: Graphed | None = None  # replays its steps

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "accuracy": self.accuracy,
        }

    def load(self, state: dict[str, Any], where: str) -> None:
        """Takes a result of ``state``; ``where`` names it in errors.

        Raises:
            CheckpointError: a size or value does not fit this net and these settings.
        """
        checkpoint.load_weights(self.model, state["model"], f"{where}.model")
        if self.average is not None:
            checkpoint.load_weights(self.average, state["average"], f"{where}.average")
        fitted = self._optimizer_state(state["optimizer"], f"{where}.optimizer does not fit: ")
        self.optimizer.load_state_dict(fitted)
        for part in ("schedule", "scaler"):
            mine, there = getattr(self, part), f"{where}.{part} does not fit: "
            mine.load_state_dict(
                checkpoint.fitted(state[part], mine.state_dict(), self._progress, there)
            )
        self.accuracy = state["accuracy"]

    def _optimizer_state(self, found: dict[Any, Any], where: str) -> dict[str, Any]:
        fresh = {"param_groups": self.optimizer.state_dict()["param_groups"]}
        groups = checkpoint.fitted(found, fresh, self._progress, where)
        state = found.get("state")
        checkpoint.IS_DICT.check(state, f"{where}state")
        parameters = self.optimizer.param_groups[0]["params"]
        for i, of_one in state.items():
            if type(i) is not int or not 0 <= i < len(parameters):
                raise CheckpointError(f"{where}state has no parameter {shown(i)}")
            checkpoint.IS_DICT.check(of_one, f"{where}state.{i}")
            p = parameters[i]
            rules = {
                key: tensor(p.dtype, p.shape, least)
                for key, least in OPTIMIZER_STATE[self._settings.optimizer].items()
            }
            if "step" in rules:
                double = torch.get_default_dtype() is torch.float64
                rules["step"] = tensor(torch.float64 if double else torch.float32, (), 0)
            if of_one.keys() - rules.keys() or (of_one and rules.keys() - of_one.keys()):
                raise CheckpointError(f"{where}state.{i} must have keys {', '.join(rules)}")
            for key, value in of_one.items():
                if value is not None or key != "momentum_buffer":
                    rules[key].check(value, f"{where}state.{i}.{key}")
        return {"state": state, **groups}


# the state that an optimizer keeps for each parameter, and the least value in it
OPTIMIZER_STATE = {
    "sgd": {"momentum_buffer": -math.inf},
    "adamw": {"step": 0, "exp_avg": -math.inf, "exp_avg_sq": 0},
}


def _progress(settings: Settings, steps: int) -> dict[str, Rule]:
    """Rules for the values that an optimizer, a schedule and a scaler change in training."""
    slack = 1e-6 * settings.lr
    rate = number(float, -slack, settings.lr + slack)
    total = steps * settings.epochs
    return {
        "lr": rate,
        "_last_lr": Rule(
            f"a list of {rate.words}",
            lambda value: type(value) is list and len(value) == 1 and rate.accepts(value[0]),
        ),
        "last_epoch": number(int, -1, total),
        "_step_count": number(int, 0, total + 2),
        "_is_initial": FLAG,
        "_get_lr_called_within_step": FLAG,
        "scale": number(float, 0, above=True),
        "_growth_tracker": number(int, 0, 2**31 - 1),
    }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    statistics: tuple[Tensor, Tensor],
    classes: int,
    settings: Settings,
    place: Place,
) -> tuple[float, Tensor]:
    """Evaluates ``model`` in eval mode, with all processes together.

    Args:
        model: (N, 3, H, W) -> (N, ``classes``).
        images, labels: (N, 3, H, W), uint8, and (N,), int64, on the place's device.
        statistics: mean and standard deviation of each channel.
        settings: batch size, layout and autocast.

    Returns:
        The mean cross entropy, and the confusion matrix (``classes``, ``classes``), int64: the
        number of images by true class (row) and predicted class (column).
    """
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=place.device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=place.device)
    mine = place.share(torch.arange(len(labels), device=place.device))
    dtype = DTYPES[settings.amp]
    for index in mine.split(settings.batch_size) if len(mine) else ():
        x = prepare(images[index], *statistics, None, None)
        with torch.autocast(place.device.type, dtype, dtype != torch.float32):
            logits = model(x.contiguous(memory_format=settings.layout))
        y = labels[index]
        loss += F.cross_entropy(logits.float(), y, reduction="sum")
        confusion += torch.bincount(y * classes + logits.argmax(1), minlength=classes**2)
    confusion = place.sum(confusion).view(classes, classes).cpu()
    return place.sum(loss).item() / len(labels), confusion


def accuracy(confusion: Tensor) -> float:
    return confusion.trace().item() / confusion.sum().item()


class Trainer:
    """Trains nets in place on the same batches; the nets take turns at every epoch.

    Args:
        models: by ``fused`` or ``plain``; the first one's accuracy decides which epoch is the best.
        data: pictures and classes.
        settings: of the run.
        place: of the run.
        folder: for checkpoints.
        kept: further keys of the checkpoints, among them the pictures' ``mean`` and ``std``.

    Raises:
        CommandError: there are more processes than images in a batch.
    """

    def __init__(
        self,
        models: dict[str, nn.Module],
        data: Data,
        settings: Settings,
        place: Place,
        folder: Path,
        kept: dict[str, Any],
    ) -> None:
        self.settings, self.place, self.folder, self.kept = settings, place, folder, kept
        self.statistics, self.classes = (kept["mean"], kept["std"]), len(data.classes)
        self.batch_size = min(settings.batch_size, len(data.train_labels))
        if self.batch_size < place.world:
            raise CommandError(
                f"--batch-size {self.batch_size} must be at least the number of processes, "
                f"{place.world}"
            )
        self.train = data.train_images.to(place.device), data.train_labels.to(place.device)
        self.val = data.val_images.to(place.device), data.val_labels.to(place.device)
        self.augment = None
        if settings.augment:
            self.augment = Augment(settings.crop, settings.flip, settings.cutout)
        # the next step, by epoch, net and step, all from 0
        self.epoch = self.net = self.step = 0
        self.best = -1.0
        # of this process's epoch: cross entropy, right answers, images
        self.sums = torch.zeros(3, dtype=torch.float64, device=place.device)
        self.seconds = 0.0
        images = self.batch_size, *self.train[0].shape[1:]
        how = DTYPES[settings.amp], settings.layout
        measure(models.values(), images, self.classes, *how, place)
        steps = self._steps()
        self.nets = [Net(name, m, settings, place, len(steps)) for name, m in models.items()]
        if place.world > 1:
            self._settle(steps[0])

    def state(self) -> dict[str, Any]:
        """The state for ``load``. Every process must call it."""
        mine = {
            "rng": checkpoint.rng_state(),
            "sums": self.sums.cpu().clone(),
            "seconds": self.seconds,
        }
        return {
            **self.kept,
            "settings": asdict(self.settings),
            "processes": self.place.world,
            "epoch": self.epoch,
            "net": self.net,
            "step": self.step,
            "nets": {net.name: net.state() for net in self.nets},
            "ranks": self.place.gather(mine),
            "best": self.best,
            "log": 0 if self.log is None else self.log.size,
        }

    def load(self, state: dict[str, Any], where: str) -> None:
        """Continues from ``state``, of the file ``where``.

        Raises:
            CheckpointError: the value of a key does not fit.
        """
        steps, rank = self._steps(), self.place.rank
        number(int, 0, len(steps)).check(state["step"], f"{where}: step")
        for i, net in enumerate(self.nets):
            there = f"{where}: nets.{net.name}"
            net.load(state["nets"][net.name], there)
            done = (state["epoch"] + (i < state["net"])) * len(steps)
            done += state["step"] * (i == state["net"])
            at = net.schedule.last_epoch
            if at != done:
                raise CheckpointError(
                    f"{there}.schedule.last_epoch must be {done}, by epoch, net and step, is {at}"
                )
        mine = state["ranks"][rank]
        seen = sum(len(self.place.share(i)) for part in steps[: state["step"]] for i in part)
        if mine["sums"][2] != seen or mine["sums"][1] > seen:
            raise CheckpointError(
                f"{where}: ranks.{rank}.sums must be of {seen} images, is {mine['sums'].tolist()}"
            )
        self.sums.copy_(mine["sums"])
        self.seconds = mine["seconds"]
        checkpoint.set_rng_state(mine["rng"])
        self.epoch, self.net, self.step = state["epoch"], state["net"], state["step"]
        self.best = state["best"]

    def run(self, log: Log | None) -> list[dict[str, Any]]:
        """Trains until the last epoch is done.

        Args:
            log: None in all processes but the first.

        Returns:
            The last record of each net, as in the log.

        Raises:
            Interrupted: Ctrl-C was pressed.
            CommandError: the loss is not finite.
        """
        self.log = log
        if self.settings.cuda_graph:
            for net in self.nets:
                net.graphed = self._graphed(net)
        with _CtrlC() as self.ctrl_c, warnings.catch_warnings():
            # GradScaler skips steps with gradients that are not finite, often the first ones
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            while self.epoch < self.settings.epochs:
                self._run_epoch(self.nets[self.net])
        return [self._end(net) for net in self.nets]

    def _reset_sums(self) -> None:
        self.sums.zero_()  # in place: a CUDA graph adds to it
        self.seconds = 0.0

    def _run_epoch(self, net: Net) -> None:
        """Trains one net for the rest of an epoch and evaluates it."""
        steps = self._steps()
        net.wrapped.train()
        if self.step == 0:  # dropout is the same for each net
            checkpoint.seed_everything(self.settings.seed, self.epoch, self.place.rank)
        with self._bar(net, steps) as bar:
            for batches in steps[self.step :]:
                start = time.perf_counter()
                self._train_step(net, batches)
                self.step += 1
                bar.update(sum(map(len, batches)))
                if not bar.disable and self.step % 10 == 0:
                    bar.set_postfix(loss=f"{(self.sums[0] / self.sums[2]).item():.3f}")
                self.seconds += time.perf_counter() - start
                asked = self.place.any(self.ctrl_c.asked)
                if asked or self.step % (self.settings.save_every or len(steps) + 1) == 0:
                    self._save("last.pt")
                if asked:
                    raise Interrupted
        record = self._record(net)
        net.accuracy = record.get("val_accuracy_ema", record["val_accuracy"])
        self._write(record)
        self.net, self.step = self.net + 1, 0
        self._reset_sums()
        names = ["last.pt"]
        if self.net == len(self.nets):
            self.net, self.epoch = 0, self.epoch + 1
            if self.nets[0].accuracy > self.best:
                self.best = self.nets[0].accuracy
                names.insert(0, "best.pt")
        self._save(*names)
        if self.place.any(self.ctrl_c.asked):
            raise Interrupted

    def _steps(self) -> list[list[Tensor]]:
        """The batches of each step of the optimizer in an epoch, as indices (N,). Images that do
        not fill a batch are left out; they differ from epoch to epoch."""
        generator = self._generator()
        order = torch.randperm(len(self.train[1]), generator=generator).to(self.place.device)
        batches = [batch for batch in order.split(self.batch_size) if len(batch) == self.batch_size]
        n = self.settings.grad_accumulation
        return [batches[i : i + n] for i in range(0, len(batches), n)]

    def _generator(self, *numbers: int) -> torch.Generator:
        """A generator that is the same in all processes, and after resuming."""
        seed = checkpoint.seed_of(self.settings.seed, self.epoch, *numbers)
        return torch.Generator().manual_seed(seed)

    def _settle(self, batches: list[Tensor]) -> None:
        """Takes a step that does not count, so that a resumed run equals an uninterrupted one.

        After its first step DistributedDataParallel lays gradients out anew, and the sums of three
        or more processes round differently.
        """
        for net in self.nets:
            state = copy.deepcopy(net.state())
            net.wrapped.train()
            self._train_step(net, batches)
            net.load(state, net.name)
        self._reset_sums()

    def _train_step(self, net: Net, batches: list[Tensor]) -> None:
        """One step of the optimizer."""
        given = (self._batch(i, index) for i, index in enumerate(batches))  # one in memory
        if net.graphed is None:
            self._learn(net, given, len(batches))
        else:
            net.graphed(list(given))
        net.schedule.step()
        if net.average is not None:
            net.average.update_parameters(net.model)

    def _batch(self, i: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """This process's share of batch ``i`` of the step, as the net takes it, and its classes."""
        x = prepare(
            self.train[0][index], *self.statistics, self.augment, self._generator(self.step, i)
        )
        x = self.place.share(x).contiguous(memory_format=self.settings.layout)
        return x, self.place.share(self.train[1][index])

    def _learn(self, net: Net, batches: Iterable[tuple[Tensor, Tensor]], count: int) -> None:
        """The part of a step that runs on the device alone: forward, backward, optimizer. The loss
        is the mean over the images of all ``count`` batches and processes."""
        s, device = self.settings, self.place.device
        dtype = DTYPES[s.amp]
        for i, (x, y) in enumerate(batches):
            waits = self.place.world > 1 and i < count - 1
            with net.wrapped.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast(device.type, dtype, dtype != torch.float32):
                    logits = net.wrapped(x)
                    loss = F.cross_entropy(
                        logits, y, reduction="sum", label_smoothing=s.label_smoothing
                    )
                # DDP takes the mean of processes
                objective = loss * (self.place.world / (count * self.batch_size))
                if s.l2:
                    squares = sum(p.pow(2).sum() for p in net.model.parameters())
                    objective = objective + s.l2 * squares * (1 / count)
                net.scaler.scale(objective).backward()
            self.sums[0] += loss.detach()
            self.sums[1] += (logits.argmax(1) == y).sum()
            self.sums[2] += len(y)
        if s.clip_grad is not None:
            net.scaler.unscale_(net.optimizer)
            nn.utils.clip_grad_norm_(net.model.parameters(), s.clip_grad)
        net.scaler.step(net.optimizer)
        net.scaler.update()
        net.optimizer.zero_grad()

    def _graphed(self, net: Net) -> Graphed:
        count = len(self._steps()[0])
        return Graphed(net.name, net.model, net.optimizer, partial(self._learn, net), count)

    def _evaluated(self, model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
        self.place.share_buffers(model)
        return evaluate(model, *part, self.statistics, self.classes, self.settings, self.place)

    def _evaluate(self, net: Net) -> dict[str, Any]:
        """The fields that all records of a net share, and the confusion matrix."""
        loss, confusion = self._evaluated(net.model, self.val)
        found = {"val_loss": loss, "val_accuracy": accuracy(confusion), "confusion": confusion}
        if net.average is not None:
            found["val_accuracy_ema"] = accuracy(self._evaluated(net.average, self.val)[1])
        return found

    def _record(self, net: Net) -> dict[str, Any]:
        """The record of the epoch that is over."""
        start = time.perf_counter()
        loss, right, images = self.place.sum(self.sums).tolist()
        self.seconds += time.perf_counter() - start  # waits for the GPU
        found = self._evaluate(net)
        del found["confusion"]
        if not math.isfinite(loss + found["val_loss"]):
            raise CommandError(
                f"the loss of the {net.name} net is not finite in epoch {self.epoch + 1}: a "
                f"smaller --lr or --clip-grad may help"
            )
        return {
            "event": "epoch",
            "net": net.name,
            "epoch": self.epoch + 1,
            "of": self.settings.epochs,
            "loss": loss / images,
            "train_accuracy": right / images,
            **found,
            "learning_rate": net.schedule.get_last_lr()[0],
            "seconds": self.seconds,
            "images_per_second": images / self.seconds,
        }

    def _end(self, net: Net) -> dict[str, Any]:
        found = self._evaluate(net)
        cuda = self.place.device.type == "cuda"
        record = {
            "event": "end",
            "net": net.name,
            **found,
            "confusion": found["confusion"].tolist(),
            "train_accuracy": accuracy(self._evaluated(net.model, self.train)[1]),
            "peak_memory": torch.cuda.max_memory_allocated() if cuda else None,
        }
        self._write(record)
        return record

    def _write(self, record: dict[str, Any]) -> None:
        if self.log is None:
            return
        self.log.write(record)
        if record["event"] == "epoch":
            shown = {**record, "val": record.get("val_accuracy_ema", record["val_accuracy"])}
            print(
                "epoch {epoch}/{of}  {net}  loss {loss:.4f}  train {train_accuracy:.2%}  "
                "validation {val:.2%}  {images_per_second:.0f} images/s".format(**shown),
                file=sys.stderr,
                flush=True,
            )

    def _save(self, *names: str) -> None:
        state = self.state()
        if self.place.rank == 0:
            for name in names:
                checkpoint.save(self.folder / name, state)
        self.place.gather(None)  # torchrun ends all processes when one has ended

    def _bar(self, net: Net, steps: list[list[Tensor]]) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            raise CommandError("progress is shown by tqdm: pip install tqdm") from None
        done = [sum(map(len, batches)) for batches in steps]
        return tqdm(
            desc=f"epoch {self.epoch + 1}/{self.settings.epochs} {net.name}",
            total=sum(done),
            initial=sum(done[: self.step]),
            unit=" images",
            leave=False,
            disable=self.log is None or not sys.stderr.isatty(),
        )
