"""Typed run configs: a YAML recipe with dotted overrides becomes a :class:`Recipe`, or one clear line about what is
wrong.

Unknown keys are refused, so a misspelt setting never trains a model quietly with the default. Example::

    load_recipe("configs/eurosat_cnn.yaml", ["epochs=2", "optimizer.learning_rate=0.001"])
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from configs.errors import UsageError

T = TypeVar("T", bound=BaseModel)


Cache = Literal["auto", "device", "decoded", "encoded", "none"]
"""Where training keeps tiles that it has read: as pixels with the model or in memory, as files in memory, nowhere."""


class Config(BaseModel):
    """Base of all configs: frozen, strict about keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Sealed(BaseModel):
    """Base of files that must not change after they were written: they carry a digest of all else in them."""

    model_config = ConfigDict(extra="forbid")

    digest: str = ""

    def sealed(self) -> Self:
        """A copy with its digest."""
        return self.model_copy(update={"digest": self._own_digest()})

    def is_intact(self) -> bool:
        """Whether nothing changed since it was sealed."""
        return self.digest == self._own_digest()

    def _own_digest(self) -> str:
        canonical = json.dumps(self.model_dump(exclude={"digest"}), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


class ModelConfig(Config):
    """Which network; ``arguments`` go to its builder in ``training/models.py``."""

    name: str
    arguments: dict[str, float] = {}
    weights: str | None = Field(default=None, description="where training starts: torchvision's name or a file")
    freeze_epochs: int = Field(default=0, ge=0, description="epochs in which only the head learns")

    @field_validator("arguments")
    @classmethod
    def _leave_out_what_the_shards_say(cls, arguments: dict[str, float]) -> dict[str, float]:
        if given := arguments.keys() & {"classes", "tile_size", "channels"}:
            raise ValueError(f"{', '.join(sorted(given))}: the shards say so; leave it out")
        return arguments


class AugmentConfig(Config):
    """What is done to training tiles only; all of it is off by default. Values have torchvision's meaning."""

    symmetries: bool = Field(default=False, description="the eight positions of a square, for views from above")
    flips: bool = Field(default=False, description="left-right and up-down, each for half of the tiles")
    rotation: float = Field(default=0, ge=0, le=180, description="degrees to either side")
    perspective: float = Field(default=0, ge=0, le=1, description="distortion scale")
    brightness: float = Field(default=0, ge=0, le=1)
    contrast: float = Field(default=0, ge=0, le=1)
    saturation: float = Field(default=0, ge=0, le=1)
    hue: float = Field(default=0, ge=0, le=0.5)
    erasing: float = Field(default=0, ge=0, le=1, description="probability")
    mixup: float = Field(default=0, ge=0, description="alpha of Beta(alpha, alpha), each tile's share of its mixture")


class OptimizerConfig(Config):
    """Which optimizer, with torch's own meaning of each field."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd")
    clip_norm: float | None = Field(default=None, gt=0, description="largest norm of all gradients together")
    accumulate: int = Field(default=1, gt=0, description="parts in which a worker takes its share of a batch")


class ScheduleConfig(Config):
    """How the learning rate moves over the run, after a linear rise from zero over the first ``warmup`` steps."""

    name: Literal["constant", "cosine", "one_cycle", "step", "plateau"] = "cosine"
    warmup: int = Field(default=100, ge=0)
    every_epochs: int = Field(default=10, gt=0, description="of step")
    factor: float = Field(default=0.1, gt=0, lt=1, description="of step and plateau")
    patience: int = Field(default=3, gt=0, description="of plateau: epochs without a lower validation loss")


class CheckpointConfig(Config):
    """When all state is saved; it is always saved at the end of an epoch."""

    every_steps: int = Field(default=200, gt=0)
    keep: int = Field(default=3, gt=0)


class Recipe(Config):
    """Everything that makes a training run; ``batch_size`` is that of a whole step, over all workers."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    shards: str
    runs: str = "runs"
    model: ModelConfig
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    class_weights: bool = Field(default=False, description="weigh each class by how rare it is")
    ema: float | None = Field(default=None, gt=0, lt=1, description="decay of the moving average that is the model")
    early_stopping: int | None = Field(default=None, gt=0, description="epochs without a better validation accuracy")
    precision: Literal["f32", "bf16", "fp16"] = Field(default="f32", description="of the forward pass in training")
    compile: bool = Field(default=False, description="torch.compile: quicker steps on a GPU after a slow first one")
    sync_batch_norm: bool = Field(default=False, description="batch statistics over the tiles of all workers")
    deterministic: bool = Field(default=False, description="the same run on the same GPU is equal to the bit")
    seed: int = Field(default=0, ge=0)
    shuffle_window: int | None = Field(default=None, gt=0, description="shards mixed at a time; all unless given")
    cache: Cache = Field(default="auto", description="where tiles stay once read; auto: the quickest that fits")
    workers: int = Field(default=1, gt=0)
    min_workers: int | None = Field(default=None, gt=0, description="go on with as few while hosts are away")
    trace: bool = Field(default=False, description="write the tile ids of every step and rank, for audits")

    @property
    def run(self) -> str:
        """The folder of the run."""
        return f"{self.runs.rstrip('/')}/{self.name}"


RESUMABLE = frozenset({"workers", "min_workers", "checkpoint", "runs", "trace", "cache"})
"""Top-level recipe keys that may differ when a run is resumed; any other change would make it another run."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides; raises :class:`UsageError` naming what is wrong."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{path}: no such recipe")
    try:
        tree = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: not a recipe; it should hold keys such as name, shards, model and epochs")
    for override in overrides:
        _override(tree, override)
    return validate(Recipe, tree, str(path))


def validate(kind: type[T], tree: dict[str, Any], where: str) -> T:
    """``tree`` as a ``kind``; raises :class:`UsageError` with ``where`` and every wrong key in one line."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(kind, detail["loc"], detail["type"], detail["msg"]) for detail in error.errors()]
        raise UsageError(f"{where}: " + "; ".join(lines)) from error


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["a.b=1", "c=x"]`` to a nested dict with YAML values."""
    tree: dict[str, Any] = {}
    for override in overrides:
        _override(tree, override)
    return tree


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(
            f"{override}: an override looks like key=value, such as epochs=5 or optimizer.learning_rate=0.001"
        )
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UsageError(f"{override}: {parent} is a value, not a group of settings")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{override}: the value is not YAML") from error


def _explain(kind: type[BaseModel], location: tuple[int | str, ...], code: str, message: str) -> str:
    key = ".".join(str(part) for part in location)
    if code == "extra_forbidden":
        known = _keys_beside(kind, location)
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if code == "missing":
        return f"{key}: missing"
    return f"{key}: {message[0].lower()}{message[1:]}"


def _keys_beside(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location[:-1]:
        inner = kind.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return list(kind.model_fields)
