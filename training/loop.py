"""Train and validate: plain PyTorch, for one process or for a rank of ``torch.distributed``; Ray is not needed.

A run is set up, restored from its newest checkpoint if it has one, fitted epoch by epoch, validated after each, and
leaves the best model by validation accuracy as a bundle. On a GPU machine without Ray::

    torchrun --nproc-per-node 2 -m training.loop configs/eurosat_cnn.yaml shards=data/eurosat
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cluster import records, storage
from configs.errors import TilefleetError
from configs.schema import Recipe
from training import checkpoint, models
from training.augment import normalise, symmetries
from training.bundle import BundleInfo, save_bundle
from training.loader import Batch, RankLoader
from training.optim import make_optimizer, rate
from training.progress import Pending, Progress
from training.randomness import replace_dropout, set_tile_keys
from training.sampler import Sampler
from training.shards import Index, TileReader, fingerprint, load_index

LOG_STEPS = 10
"""Steps between two updates of the status; the losses of the steps are reduced over ranks together."""


class Trainer:
    """One rank's part of a run; ``report`` is called on every rank after each epoch with its row of metrics."""

    def __init__(self, recipe: Recipe, device: torch.device, report: Callable[[dict[str, Any]], None] | None = None):
        self.recipe = recipe
        self.device = device
        self.report = report
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.index: Index = load_index(recipe.shards)
        train, val = TileReader(recipe.shards, "train"), TileReader(recipe.shards, "val")
        self.train_loader = RankLoader(train, self.index.tile_size, self.rank, self.world_size)
        self.val_loader = RankLoader(val, self.index.tile_size, self.rank, self.world_size)
        self.sampler = Sampler(len(train), recipe.batch_size, recipe.seed)
        torch.manual_seed(recipe.seed)
        model = models.build(recipe.model.name, len(self.index.classes), self.index.tile_size, **recipe.model.arguments)
        self.model = replace_dropout(model).to(device).to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(recipe.optimizer, self.model)
        self.progress = Progress()
        self._restore()
        self.forward: nn.Module = self.model
        if self.world_size > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.model, device_ids=ids)
        self.status: records.StatusWriter | None = None
        if self.rank == 0:
            self.status = records.StatusWriter(
                recipe.run,
                "train",
                workers=self.world_size,
                epochs=recipe.epochs,
                planned_tiles=recipe.epochs * len(train),
                done_tiles=self._done_tiles(),
            )

    def fit(self) -> None:
        """Train from where the run stands to its last epoch."""
        while self.progress.epoch < self.recipe.epochs:
            self._train_epoch()
            validation = self._validate()
            self._end_epoch(validation)
        if self.status:
            self.status.finish("done")

    def _train_epoch(self) -> None:
        progress, pending, started = self.progress, Pending(), time.perf_counter()
        before = progress.seconds
        self.forward.train()
        epoch = self.sampler.epoch(progress.epoch)
        for batch in self.train_loader.epoch(epoch, progress.step):
            loss, correct = self._step(batch)
            pending.add(loss, correct, batch.global_count)
            progress.step += 1
            progress.waited += batch.waited
            progress.seconds = before + time.perf_counter() - started
            if self.recipe.trace:
                self._trace(batch)
            last = progress.step == self.sampler.steps
            due = progress.step % self.recipe.checkpoint.every_steps == 0 and not last
            if progress.step % LOG_STEPS == 0 or last or due:
                self._log(pending)
            if due:
                self._save()

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns this rank's sum of losses over the global count, and its right answers."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.learning_rate * self._rate(batch.step)
        pixels, labels, keys = (t.to(self.device, non_blocking=True) for t in (batch.pixels, batch.labels, batch.keys))
        weights = torch.ones(len(labels), device=self.device)
        if not len(labels):  # a rank without a tile in a small last batch still takes part, with weight zero
            pixels, labels = pixels.new_zeros(1, *pixels.shape[1:]), labels.new_zeros(1)
            keys, weights = keys.new_zeros(1), weights.new_zeros(1)
        if self.recipe.augment.symmetries:
            pixels = symmetries(pixels, keys)
        set_tile_keys(self.model, keys)
        with self._autocast():
            logits = self.forward(normalise(pixels, self.index.mean, self.index.std))
        losses = functional.cross_entropy(
            logits.float(), labels, reduction="none", label_smoothing=self.recipe.label_smoothing
        )
        loss = (losses * weights).sum() / batch.global_count
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.world_size).backward()  # type: ignore[no-untyped-call]  # DDP averages over ranks, this sums
        self.optimizer.step()
        return loss.detach(), ((logits.argmax(1) == labels) * weights).sum().detach()

    def _log(self, pending: Pending) -> None:
        """Reduce what happened since the last time over all ranks and tell the status."""
        losses, correct = pending.reduce(self.device)
        self.progress.losses += losses
        self.progress.correct += correct
        self.progress.seen += pending.seen
        pending.clear()
        if not all(math.isfinite(loss) for loss in losses):
            step = self.progress.step - len(losses) + next(i for i, x in enumerate(losses) if not math.isfinite(x)) + 1
            raise TilefleetError(
                f"{self.recipe.run}: loss is not finite at epoch {self.progress.epoch + 1}, step {step}; "
                "lower optimizer.learning_rate, then start another run"
            )
        if self.status:
            self.status.update(
                done_tiles=self._done_tiles(),
                epoch=self.progress.epoch + 1,
                step=self.progress.epoch * self.sampler.steps + self.progress.step,
                loss=losses[-1],
                seconds_by_stage={"wait": self.progress.waited, "train": self.progress.seconds},
            )

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        """Mean loss and accuracy over the val split, each tile once over all ranks; NaN where it is empty."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.model.eval()
        for batch in self.val_loader.pass_once(256):
            with self._autocast():
                logits = self.model(normalise(batch.pixels.to(self.device), self.index.mean, self.index.std))
            labels = batch.labels.to(self.device)
            losses = functional.cross_entropy(logits.double(), labels, reduction="sum")
            sums += torch.stack([losses, (logits.argmax(1) == labels).sum(), losses.new_tensor(len(labels))])
        if self.world_size > 1:
            dist.all_reduce(sums)
        loss, correct, count = sums.tolist()
        return (loss / count, correct / count) if count else (math.nan, math.nan)

    def _end_epoch(self, validation: tuple[float, float]) -> None:
        progress, (val_loss, val_accuracy) = self.progress, validation
        row = {
            "epoch": progress.epoch + 1,
            "step": (progress.epoch + 1) * self.sampler.steps,
            "train_loss": sum(progress.losses) / len(progress.losses),
            "train_accuracy": progress.correct / progress.seen,
            "val_loss": None if math.isnan(val_loss) else val_loss,
            "val_accuracy": None if math.isnan(val_accuracy) else val_accuracy,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "tiles_per_second": progress.seen / progress.seconds,
            "seconds": progress.seconds,
            "seconds_waiting": progress.waited,
            "losses": progress.losses,
        }
        better = math.isnan(val_accuracy) or val_accuracy > progress.best_accuracy
        if self.rank == 0:
            records.append_metrics(self.recipe.run, row)
            if better:
                self._save_bundle(row)
        best = progress.best_accuracy if not better or math.isnan(val_accuracy) else val_accuracy
        self.progress = Progress(epoch=progress.epoch + 1, best_accuracy=best)
        self._save()
        if self.status:
            self.status.update(force=True, done_tiles=self._done_tiles(), accuracy=row["val_accuracy"])
        if self.report:
            self.report({key: value for key, value in row.items() if key != "losses"})

    def _save_bundle(self, row: dict[str, Any]) -> None:
        names = ("val_accuracy", "val_loss", "train_accuracy", "train_loss")
        info = BundleInfo(
            architecture=self.recipe.model.name,
            arguments=self.recipe.model.arguments,
            classes=self.index.classes,
            tile_size=self.index.tile_size,
            mean=self.index.mean,
            std=self.index.std,
            metrics={"epoch": row["epoch"], **{name: row[name] for name in names if row[name] is not None}},
            recipe=self.recipe.model_dump(mode="json"),
            data_fingerprint=fingerprint(self.recipe.shards),
            versions={"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)},
        )
        save_bundle(storage.join(self.recipe.run, "bundle"), self.model, info)

    def _save(self) -> None:
        if self.rank == 0:
            step = self.progress.epoch * self.sampler.steps + self.progress.step
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": vars(self.progress),
            }
            checkpoint.save(self.recipe.run, state, step=step, keep=self.recipe.checkpoint.keep)

    def _restore(self) -> None:
        """Go on from the newest whole checkpoint; every rank reads the one that rank 0 chose."""
        chosen: list[str | None] = [None]
        if self.rank == 0:
            chosen = [checkpoint.newest_whole(self.recipe.run, warn=lambda line: print(line, file=sys.stderr))]
        if self.world_size > 1:
            dist.broadcast_object_list(chosen)
        if chosen[0] is not None:
            state = checkpoint.load(chosen[0])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])

    def _rate(self, step: int) -> float:
        """Share of the full learning rate at ``step`` of this epoch."""
        at = self.progress.epoch * self.sampler.steps + step
        return rate(self.recipe.schedule, at, self.recipe.epochs * self.sampler.steps)

    def _done_tiles(self) -> int:
        return self.progress.epoch * self.sampler.tiles + min(
            self.progress.step * self.sampler.batch_size, self.sampler.tiles
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.recipe.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _trace(self, batch: Batch) -> None:
        ids = [self.train_loader.reader.tile_ids[position] for position in batch.positions]
        line = {"epoch": self.progress.epoch, "step": batch.step, "rank": self.rank, "tiles": ids}
        with open(storage.join(self.recipe.run, f"trace-rank-{self.rank}.jsonl"), "a") as file:  # noqa: PTH123
            file.write(json.dumps(line) + "\n")


def main(arguments: list[str]) -> None:
    """Run a recipe under ``torchrun`` or alone, without Ray."""
    import os

    from configs.schema import load_recipe

    recipe = load_recipe(arguments[0], arguments[1:])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    storage.make_dirs(recipe.run)
    try:
        Trainer(recipe, device, report=lambda row: print(json.dumps(row))).fit()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
