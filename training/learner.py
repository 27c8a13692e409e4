"""The model of a training run and how it takes a step: forward, loss, backward, update, and what of it is saved.

One process holds one learner; with several, gradients are summed over them by DistributedDataParallel. The loss of a
step is that of the global batch, so it does not matter how many processes share it.
"""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.optim.swa_utils import get_ema_multi_avg_fn as _ema

from configs.errors import UsageError
from configs.schema import Recipe
from training import models
from training.augment import augment, blend, normalise
from training.batchnorm import replace_batch_norm, set_presence
from training.determinism import replace_pooling
from training.loader import Batch
from training.optim import class_weights, make_optimizer
from training.randomness import replace_dropout, set_tile_keys, symmetric_beta
from training.sampler import rank_slice
from training.shards import Index
from training.weights import initialise

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def untrained(recipe: Recipe, index: Index, *, fresh: bool = True) -> nn.Module:
    """The model of ``recipe`` before its first step, a function of the recipe alone, on the CPU.

    The weights that it starts from are read where it is ``fresh``, and left out where a checkpoint follows.
    """
    torch.manual_seed(recipe.seed)
    kind, classes = recipe.model, len(index.classes)
    model = models.build(kind.name, classes, index.tile_size, channels=index.channels, **kind.arguments)
    if fresh and recipe.model.weights:
        initialise(recipe.model.name, model, recipe.model.weights)
    return model


class Learner:
    """Model, optimizer and moving average of one process.

    ``labels`` is int64 ``[tiles]``, those of the training split. Call :meth:`begin_epoch` before the steps of an epoch.
    """

    def __init__(self, recipe: Recipe, index: Index, labels: Tensor, device: torch.device, *, fresh: bool) -> None:
        self.recipe = recipe
        self.index = index
        self.device = device
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        model = replace_dropout(untrained(recipe, index, fresh=fresh))
        if recipe.sync_batch_norm:
            model = replace_batch_norm(model)
        if recipe.deterministic:
            model = replace_pooling(model)
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.trained = _compiled(self.model) if recipe.compile else self.model
        self.optimizer = make_optimizer(recipe.optimizer, self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.average: AveragedModel | None = None
        if recipe.ema:
            self.average = AveragedModel(self.model, multi_avg_fn=_ema(recipe.ema), use_buffers=True)  # type: ignore[no-untyped-call]
        self.weights = class_weights(labels, len(index.classes)).to(device) if recipe.class_weights else None
        self.forward: nn.Module | None = None

    @property
    def best(self) -> nn.Module:
        """The model to judge and to keep: the moving average where the recipe asks for one."""
        module: nn.Module = self.average.module if self.average else self.model
        return module

    def begin_epoch(self, epoch: int) -> None:
        """Freeze or free the backbone as the recipe wants it in ``epoch``, counted from 0, and distribute the model."""
        frozen = epoch < self.recipe.model.freeze_epochs
        for parameter in models.backbone(self.model):
            if parameter.requires_grad == frozen:
                parameter.requires_grad = not frozen
                self.forward = None
        if self.forward is None:
            self.forward = self._distributed() if self.world_size > 1 else self.trained
        self.forward.train()
        if frozen:  # what is frozen keeps its statistics too
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def step(self, batch: Batch, learning_rate: float) -> tuple[Tensor, Tensor]:
        """One update; returns this process's part of the global batch's loss and its right answers, both 0-d."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.recipe.optimizer.accumulate
        loss, correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for part in range(parts):
            with self._unsynchronised(part < parts - 1):
                part_loss, part_correct = self._backward(batch, rank_slice(len(batch.labels), part, parts))
            loss, correct = loss + part_loss, correct + part_correct
        if self.recipe.optimizer.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_norm)
        self.scaler.step(self.optimizer)  # which leaves out a step whose scaled gradients overflowed
        self.scaler.update()
        if self.average:
            self.average.update_parameters(self.model)
        return loss, correct

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """float32 ``[B, classes]`` of the model to judge for uint8 ``[B, channels, size, size]``."""
        self.best.eval()
        with self._autocast():
            logits: Tensor = self.best(normalise(pixels.to(self.device), self.index.mean, self.index.std))
        return logits.float()

    def agree(self) -> None:
        """Give every process the running statistics of rank 0, so that all judge the same model."""
        if self.world_size > 1:
            for buffer in self.best.buffers():
                dist.broadcast(buffer, 0)

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`load` needs to go on to the bit."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.average:
            state["average"] = self.average.state_dict()
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])

    def _backward(self, batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
        pixels, labels, keys = self._tiles(batch, part)
        present = torch.full((len(labels),), float(part.stop > part.start), device=self.device)
        others, share = labels, torch.ones(len(labels), device=self.device)
        if batch.partners:
            partners, others, _ = self._tiles(batch.partners, part)
            share = symmetric_beta(keys, "mixup", self.recipe.augment.mixup)
            pixels = blend(pixels, partners, share)
        set_tile_keys(self.model, keys)
        set_presence(self.model, present)
        assert self.forward
        with self._autocast():
            logits = self.forward(normalise(pixels, self.index.mean, self.index.std))
        losses = self._losses(logits, labels)
        if batch.partners:
            losses = torch.lerp(self._losses(logits, others), losses, share)
        loss = (losses * present).sum() / batch.global_count
        self.scaler.scale(loss * self.world_size).backward()  # type: ignore[no-untyped-call]  # DDP averages, this sums
        right = logits.argmax(1) == torch.where(share < 0.5, others, labels)
        return loss.detach(), (right * present).sum().detach()

    def _tiles(self, batch: Batch, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Augmented pixels, labels and keys of a part of ``batch``, on the device.

        A process without a tile still takes part in the sums, with a blank of no weight.
        """
        pixels, labels, keys = (
            t[part].to(self.device, non_blocking=True) for t in (batch.pixels, batch.labels, batch.keys)
        )
        if not len(labels):
            pixels, labels, keys = pixels.new_zeros(1, *pixels.shape[1:]), labels.new_zeros(1), keys.new_zeros(1)
        return augment(pixels, keys, self.recipe.augment), labels, keys

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each tile: float32 ``[B]``."""
        return functional.cross_entropy(
            logits.float(), labels, self.weights, reduction="none", label_smoothing=self.recipe.label_smoothing
        )

    def _distributed(self) -> nn.Module:
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.trained, device_ids=ids, gradient_as_bucket_view=True)

    def _unsynchronised(self, wanted: bool) -> AbstractContextManager[Any]:
        if wanted and isinstance(self.forward, DistributedDataParallel):
            context: AbstractContextManager[Any] = self.forward.no_sync()
            return context
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.recipe.precision in _AUTOCAST:
            return torch.autocast(self.device.type, dtype=_AUTOCAST[self.recipe.precision])
        return nullcontext()


def _compiled(model: nn.Module) -> nn.Module:
    """``model``, compiled for training; it shares its parameters and is itself left as it is, for evaluation."""
    if not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "g++")))):
        raise UsageError("compile: needs a C++ compiler (g++ or clang++) on every machine; install one or leave it off")
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    return compiled
