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
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch.nn import functional

from cluster import records, storage
from configs.errors import TilefleetError
from configs.schema import Recipe
from training import checkpoint
from training.bundle import BundleInfo, save_bundle
from training.calibrate import calibrate
from training.determinism import deterministic
from training.learner import Learner
from training.loader import Batch, RankLoader
from training.optim import rate
from training.process import process_group
from training.progress import Pending, Progress
from training.sampler import Sampler
from training.shards import Index, TileReader, fingerprint, load_index

LOG_STEPS = 10
"""Steps between two updates of the status; the losses of the steps are reduced over ranks together."""

NOTICE_SECONDS = 5.0
"""Least time between two looks for a notice that a worker's host is about to go, or for a wish to stop."""

LOOK, STOP = 1.0, 2.0
"""What rank 0 wishes that all ranks do together: look for a notice; save and end."""


class Trainer:
    """One rank's part of a run; ``report`` is called on every rank after each epoch with its row of metrics.

    ``command`` is the mark of the command that it works for, see :class:`training.checkpoint.Claim`. ``notice`` says
    whether a host is about to go, the same on every rank, which all call it together; a checkpoint is saved then.
    ``stop``, asked on rank 0 alone, says whether the run shall be saved and end early; its state is ``stopped`` then.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        report: Callable[[dict[str, Any]], None] | None = None,
        command: str | None = None,
        notice: Callable[[], bool] | None = None,
        stop: Callable[[], bool] | None = None,
    ):
        self.recipe = recipe
        self.device = device
        self.report = report
        self.notice, self.stop, self.stopping = notice, stop, False
        self.noticed, self.looked = False, time.monotonic()
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.claim = checkpoint.Claim(recipe.run, command) if self.rank == 0 else None
        self.index: Index = load_index(recipe.shards)
        train, val = TileReader(recipe.shards, "train"), TileReader(recipe.shards, "val")
        self.train_loader, self.val_loader = (
            RankLoader(tiles, self.index.tile_size, self.rank, self.world_size, device=device, cache=recipe.cache)
            for tiles in (train, val)
        )
        self.sampler = Sampler.of(recipe, self.index)
        start = self._checkpoint()
        labels = torch.from_numpy(train.labels.astype("int64"))
        self.learner = Learner(recipe, self.index, labels, device, fresh=start is None)
        self.progress = Progress()
        if start is not None:
            self.learner.load(start)
            self.progress = Progress(**start["progress"])
        self.status: records.StatusWriter | None = None
        if self.rank == 0:
            self.status = records.StatusWriter(
                recipe.run,
                "train",
                workers=self.world_size,
                wanted_workers=recipe.workers,
                epochs=recipe.epochs,
                planned_tiles=recipe.epochs * len(train),
                done_tiles=self._done_tiles(),
            )
        self.seconds = dict.fromkeys(("wait", "train", "validate"), 0.0)
        if self.status:
            self.seconds |= self.status.status.seconds_by_stage

    def fit(self) -> None:
        """Train from where the run stands to its last epoch, or until it no longer gets better or shall stop."""
        with deterministic(self.recipe.deterministic):
            while not (self.stopping or self._is_over()):
                if self._train_epoch():
                    self._end_epoch(self._validate())
        if self.status and not self._is_over():
            self.status.finish("stopped")
        elif self.status:
            calibrate(storage.join(self.recipe.run, "bundle"), self.recipe.shards, self.device)
            self.status.update(planned_tiles=self._done_tiles())
            self.status.finish("done")

    def _train_epoch(self) -> bool:
        """Take the steps of the epoch that are left; False where it is left on the way, with all saved."""
        progress, pending, started = self.progress, Pending(), time.perf_counter()
        before = progress.seconds
        self.learner.begin_epoch(progress.epoch)
        epoch = self.sampler.epoch(progress.epoch)
        for batch in self.train_loader.epoch(epoch, progress.step):
            loss, correct = self.learner.step(batch, self._learning_rate(batch.step))
            pending.add(loss, correct, batch.global_count)
            seconds = before + time.perf_counter() - started
            self.seconds["wait"] += batch.waited
            self.seconds["train"] += seconds - progress.seconds - batch.waited
            progress.step += 1
            progress.waited += batch.waited
            progress.seconds = seconds
            if self.recipe.trace:
                self._trace(batch)
            last = progress.step == self.sampler.steps
            due = progress.step % self.recipe.checkpoint.every_steps == 0 and not last
            noticed = (progress.step % LOG_STEPS == 0 or last or due) and self._log(pending)
            if due or (noticed and not last):
                self._save()
            if self.stopping and not last:
                return False
        return True

    def _log(self, pending: Pending) -> bool:
        """Reduce what happened since the last time over all ranks and tell the status.

        Returns whether there is a new notice, or a wish to stop. Rank 0's clock says when to look for one, and says so
        in the sums that are shared anyway: looking costs a call to Ray, and all ranks must do it at the same step.
        """
        wish = 0.0
        if self.rank == 0 and time.monotonic() - self.looked > NOTICE_SECONDS:
            self.looked = time.monotonic()
            wish = STOP if self.stop and self.stop() else LOOK
        losses, correct, wish = pending.reduce(self.device, wish)
        self.stopping = wish == STOP
        self.progress.losses += losses
        self.progress.correct += correct
        self.progress.seen += pending.seen
        pending.clear()
        if not all(math.isfinite(loss) for loss in losses):
            first = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
            step = self.progress.step - len(losses) + first + 1
            if self.status:
                self.status.update(force=True, loss=losses[first])
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
                seconds_by_stage=self.seconds,
            )
        if self.stopping or wish != LOOK or not self.notice:
            return self.stopping
        before, self.noticed = self.noticed, self.notice()
        return self.noticed and not before

    def _validate(self) -> tuple[float, float]:
        """Mean loss and accuracy over the val split, each tile once over all ranks; NaN where it is empty."""
        started = time.perf_counter()
        self.learner.agree()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch in self.val_loader.pass_once(256):
            logits, labels = self.learner.logits(batch.pixels), batch.labels.to(self.device)
            losses = functional.cross_entropy(logits.double(), labels, reduction="sum")
            sums += torch.stack([losses, (logits.argmax(1) == labels).sum(), losses.new_tensor(len(labels))])
        if self.world_size > 1:
            dist.all_reduce(sums)
        loss, correct, count = sums.tolist()
        self.seconds["validate"] += time.perf_counter() - started
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
            "learning_rate": self._learning_rate(self.sampler.steps - 1),
            "tiles_per_second": progress.seen / progress.seconds,
            "seconds": progress.seconds,
            "seconds_waiting": progress.waited,
            "losses": progress.losses,
        }
        after = progress.after_epoch(val_loss, val_accuracy, self.recipe.schedule.patience)
        if self.claim:
            self.claim.check()
            records.append_metrics(self.recipe.run, row)
            if not after.epochs_since_best:
                self._save_bundle(row)
        self.progress = after
        self._save()
        if self.status:
            self.status.update(
                force=True,
                done_tiles=self._done_tiles(),
                accuracy=row["val_accuracy"],
                seconds_by_stage=self.seconds,
                progressed=time.time(),
            )
        if self.report:
            self.report({key: value for key, value in row.items() if key != "losses"})

    def _save_bundle(self, row: dict[str, Any]) -> None:
        names = ("val_accuracy", "val_loss", "train_accuracy", "train_loss")
        info = BundleInfo(
            architecture=self.recipe.model.name,
            arguments=self.recipe.model.arguments,
            classes=self.index.classes,
            tile_size=self.index.tile_size,
            bands=self.index.bands,
            mean=self.index.mean,
            std=self.index.std,
            metrics={"epoch": row["epoch"], **{name: row[name] for name in names if row[name] is not None}},
            recipe=self.recipe.model_dump(mode="json"),
            data_fingerprint=fingerprint(self.recipe.shards),
            versions={"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)},
        )
        save_bundle(storage.join(self.recipe.run, "bundle"), self.learner.best, info)

    def _save(self) -> None:
        if self.claim:
            self.claim.check()
            step = self.progress.epoch * self.sampler.steps + self.progress.step
            state = self.learner.state() | {"progress": vars(self.progress)}
            checkpoint.save(self.recipe.run, state, step=step, keep=self.recipe.checkpoint.keep)

    def _checkpoint(self) -> checkpoint.State | None:
        """The newest whole checkpoint; every rank reads the one that rank 0 chose."""
        chosen: list[str | None] = [None]
        if self.rank == 0:
            chosen = [checkpoint.newest_whole(self.recipe.run, warn=lambda line: print(line, file=sys.stderr))]
        if self.world_size > 1:
            dist.broadcast_object_list(chosen)
        return None if chosen[0] is None else checkpoint.load(chosen[0])

    def _is_over(self) -> bool:
        """Whether there is no epoch to train any more."""
        patience, progress = self.recipe.early_stopping or math.inf, self.progress
        return progress.epoch >= self.recipe.epochs or progress.epochs_since_best >= patience

    def _learning_rate(self, step: int) -> float:
        """The learning rate of ``step`` of this epoch."""
        at = self.progress.epoch * self.sampler.steps + step
        share = rate(self.recipe.schedule, at, self.sampler.steps, self.recipe.epochs, self.progress.drops)
        return self.recipe.optimizer.learning_rate * share

    def _done_tiles(self) -> int:
        of_epoch = min(self.progress.step * self.sampler.batch_size, self.sampler.tiles)
        return self.progress.epoch * self.sampler.tiles + of_epoch

    def _trace(self, batch: Batch) -> None:
        ids = [self.train_loader.reader.tile_ids[position] for position in batch.positions]
        line = {"epoch": self.progress.epoch, "step": batch.step, "rank": self.rank, "workers": self.world_size}
        with open(storage.join(self.recipe.run, f"trace-rank-{self.rank}.jsonl"), "a") as file:  # noqa: PTH123
            file.write(json.dumps(line | {"tiles": ids}) + "\n")


def main(arguments: list[str]) -> None:
    """Run a recipe under ``torchrun`` or alone, without Ray."""
    import os

    from configs.schema import load_recipe
    from training.train import check, find_run, write_config

    recipe = load_recipe(arguments[0], arguments[1:])
    check(recipe, load_index(recipe.shards))
    if os.environ.get("RANK", "0") == "0":
        find_run(recipe, resume=True)
        write_config(recipe)
    with process_group() as device:
        Trainer(recipe, device, report=lambda row: print(json.dumps(row))).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
