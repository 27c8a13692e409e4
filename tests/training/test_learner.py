"""How a model takes a step: what people expect of a trainer, each seen to have its effect."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import need

from cluster import records
from configs.errors import TilefleetError, UsageError
from configs.schema import Recipe
from tests.runs import losses
from training import models
from training.augment import normalise
from training.bundle import load_bundle
from training.learner import Learner
from training.loader import Batch
from training.loop import Trainer
from training.randomness import symmetric_beta

CPU = torch.device("cpu")


def train(keys: dict[str, Any], **changes: Any) -> Recipe:
    recipe = Recipe.model_validate(keys | changes)
    Trainer(recipe, CPU).fit()
    return recipe


def stop_after(steps: int, trainer: Trainer) -> None:
    """Fit until a run is stopped in mid-epoch."""

    class Stop(Exception):
        pass

    def step(batch: Batch, learning_rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        if next(left, None) is None:
            raise Stop
        return taken(batch, learning_rate)

    taken, left = trainer.learner.step, iter(range(steps))
    trainer.learner.step = step  # type: ignore[method-assign]
    with pytest.raises(Stop):
        trainer.fit()


@pytest.mark.parametrize("parts", [2, 3, 16, 40])
def test_a_batch_taken_in_parts_is_the_same_batch(small_recipe: dict[str, Any], parts: int) -> None:
    whole = train(small_recipe, name="whole", epochs=1)
    apart = train(small_recipe, name="apart", epochs=1, optimizer={"accumulate": parts})
    assert losses(apart) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize("precision", ["f32", "fp16"])
def test_the_norm_of_an_update_is_clipped(small_recipe: dict[str, Any], precision: str) -> None:
    optimizer = {"name": "sgd", "learning_rate": 1.0, "momentum": 0, "clip_norm": 0.01}
    keys = small_recipe | {"model": {"name": "lenet"}, "precision": precision, "schedule": {"warmup": 0}}
    recipe = Recipe.model_validate(keys | {"optimizer": optimizer})
    trainer = Trainer(recipe, CPU)
    trainer.learner.begin_epoch(0)
    before = [p.detach().clone() for p in trainer.learner.model.parameters()]
    trainer.learner.step(next(iter(trainer.train_loader.epoch(trainer.sampler.epoch(0)))), 1.0)
    moved = [(p - q).flatten() for p, q in zip(trainer.learner.model.parameters(), before, strict=True)]
    assert float(torch.cat(moved).detach().norm()) == pytest.approx(0.01, rel=1e-3)


def test_fp16_trains_as_f32_does(small_recipe: dict[str, Any]) -> None:
    plain, half = (
        train(small_recipe, name=name, model={"name": "lenet"}, precision=name, epochs=3) for name in ("f32", "fp16")
    )
    assert losses(half) != losses(plain)
    assert losses(half) == pytest.approx(losses(plain), rel=0.02)


def test_a_step_that_overflows_is_left_out_and_the_scale_that_fits_is_kept(small_recipe: dict[str, Any]) -> None:
    def begin(name: str) -> Trainer:
        trainer = Trainer(Recipe.model_validate(small_recipe | {"name": name, **half}), CPU)
        trainer.learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
        return trainer

    half: dict[str, Any] = {"model": {"name": "lenet"}, "precision": "fp16"}
    whole = begin("whole")
    before = [p.detach().clone() for p in whole.learner.model.parameters()]
    whole.learner.begin_epoch(0)
    loss, _ = whole.learner.step(next(iter(whole.train_loader.epoch(whole.sampler.epoch(0)))), 0.1)
    assert math.isfinite(loss)
    assert all(torch.equal(p, q) for p, q in zip(whole.learner.model.parameters(), before, strict=True))
    assert whole.learner.scaler.get_scale() == 2.0**29

    whole = begin("whole")
    whole.fit()
    assert not all(torch.equal(p, q) for p, q in zip(whole.learner.model.parameters(), before, strict=True))
    scale = whole.learner.scaler.get_scale()
    assert scale < 2.0**29

    begun = begin("begun")
    stop_after(4, begun)  # one past a checkpoint, when the scale is still on its way down
    resumed = Trainer(begun.recipe, CPU)
    assert scale < resumed.learner.scaler.state_dict()["scale"] < 2.0**29
    resumed.fit()
    assert losses(begun.recipe) == losses(whole.recipe)
    a, b = (load_bundle(f"{run.recipe.run}/bundle")[0].state_dict() for run in (whole, begun))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_compiled_model_trains_the_same_and_is_kept_under_the_same_names(small_recipe: dict[str, Any]) -> None:
    need(shutil.which("g++"), "a C++ compiler")
    keys = small_recipe | {
        "model": {"name": "folder_cnn", "arguments": {"dropout": 0.5}},
        "batch_size": 40,
        "epochs": 1,
    }
    plain, compiled = (train(keys, name=str(wanted), compile=wanted) for wanted in (False, True))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    a, b = (load_bundle(f"{run.run}/bundle")[0].state_dict() for run in (plain, compiled))
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


def test_without_a_compiler_a_model_is_not_compiled(
    small_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="compile: needs a C"):
        train(small_recipe, compile=True)


def test_the_moving_average_is_what_is_kept_and_survives_a_resume(small_recipe: dict[str, Any]) -> None:
    plain = train(small_recipe, name="plain")
    averaged = train(small_recipe, name="averaged", ema=0.9)
    assert losses(averaged) == losses(plain)  # the average follows training and does not lead it
    a, b = (load_bundle(f"{run.run}/bundle")[0].state_dict() for run in (plain, averaged))
    assert any(not torch.equal(a[name], b[name]) for name in a)

    begun = Recipe.model_validate(small_recipe | {"name": "begun", "ema": 0.9})
    trainer = Trainer(begun, CPU)
    trainer._train_epoch()
    trainer._end_epoch(trainer._validate())
    Trainer(begun, CPU).fit()
    c = load_bundle(f"{begun.run}/bundle")[0].state_dict()
    assert all(torch.equal(b[name], c[name]) for name in b)


def test_a_frozen_backbone_learns_only_after_its_epochs(small_recipe: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(small_recipe | {"model": {"name": "cnn", "freeze_epochs": 1}})
    trainer = Trainer(recipe, CPU)
    body = models.backbone(trainer.learner.model)
    head = [p for p in trainer.learner.model.parameters() if all(p is not q for q in body)]
    assert body
    assert head

    def changed_by_an_epoch(parameters: list[torch.nn.Parameter]) -> list[bool]:
        before = [p.detach().clone() for p in parameters]
        trainer._train_epoch()
        trainer._end_epoch(trainer._validate())
        return [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]

    assert changed_by_an_epoch(body + head) == [False] * len(body) + [True] * len(head)
    assert all(changed_by_an_epoch(body + head))


def test_a_run_that_gets_no_better_stops_early_and_is_done(small_recipe: dict[str, Any]) -> None:
    recipe = train(small_recipe, epochs=50, early_stopping=2, optimizer={"learning_rate": 1e-12})
    rows, status = records.read_metrics(recipe.run), records.read_status(recipe.run)
    assert len(rows) == 3
    assert status
    assert (status.state, status.done_tiles == status.planned_tiles) == ("done", True)
    Trainer(recipe, CPU).fit()  # a second start has nothing left to do
    assert len(records.read_metrics(recipe.run)) == 3


def test_class_weights_reach_the_loss(small_recipe: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(small_recipe | {"class_weights": True})
    trainer = Trainer(recipe, CPU)
    batch = next(iter(trainer.train_loader.epoch(trainer.sampler.epoch(0))))
    rare, common = int(batch.labels[0]), (int(batch.labels[0]) + 1) % len(trainer.index.classes)
    labels = torch.tensor([rare] * 10 + [common] * 90)  # of which no other class has any
    learner = Learner(recipe, trainer.index, labels, CPU, fresh=True)
    learner.begin_epoch(0)
    loss, _ = learner.step(batch, 0.0)
    counted = int((batch.labels == rare).sum()) * 5 + int((batch.labels == common).sum()) * 5 / 9
    assert float(loss) == pytest.approx(counted / len(batch.labels) * math.log(len(trainer.index.classes)), rel=0.1)


def test_mixup_is_the_loss_of_both_labels_by_their_shares(small_recipe: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(small_recipe | {"model": {"name": "lenet"}, "augment": {"mixup": 0.4}})
    trainer = Trainer(recipe, CPU)
    trainer.learner.begin_epoch(0)
    batch = next(iter(trainer.train_loader.epoch(trainer.sampler.epoch(0))))
    assert batch.partners
    assert sorted(batch.partners.positions) == sorted(batch.positions)
    share = symmetric_beta(batch.keys, "mixup", 0.4)
    pixels = share.view(-1, 1, 1, 1) * batch.pixels + (1 - share).view(-1, 1, 1, 1) * batch.partners.pixels
    with torch.no_grad():
        logits = trainer.learner.model(normalise(pixels.round(), trainer.index.mean, trainer.index.std))
    ours, theirs = (
        torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        for labels in (batch.labels, batch.partners.labels)
    )
    heavier = torch.where(share < 0.5, batch.partners.labels, batch.labels)
    assert not torch.equal(heavier, batch.labels)
    loss, correct = trainer.learner.step(batch, 0.0)
    assert float(loss) == pytest.approx(float((share * ours + (1 - share) * theirs).mean()), rel=1e-4)
    assert int(correct) == int((logits.argmax(1) == heavier).sum())


def test_training_starts_from_given_weights(small_recipe: dict[str, Any], tmp_path: Path) -> None:
    start = Recipe.model_validate(small_recipe | {"name": "start"})
    first = Trainer(start, CPU).learner.model.state_dict()
    torch.save({name: tensor + 1 for name, tensor in first.items()}, tmp_path / "weights.pth")
    keys = small_recipe | {"name": "tuned", "model": {"name": "cnn", "weights": str(tmp_path / "weights.pth")}}
    tuned = Trainer(Recipe.model_validate(keys), CPU).learner.model.state_dict()
    *body, head, bias = first
    assert all(torch.equal(tuned[name], first[name] + 1) for name in body)
    assert not any(torch.equal(tuned[name], first[name] + 1) for name in (head, bias))
    with pytest.raises(TilefleetError, match=r"none\.pth"):
        train(small_recipe, model={"name": "cnn", "weights": str(tmp_path / "none.pth")})


@pytest.mark.parametrize("name", ["tilenet"])
def test_a_network_with_batch_statistics_trains_and_resumes(small_recipe: dict[str, Any], name: str) -> None:
    whole = train(small_recipe, name="whole", model={"name": name}, ema=0.8)
    begun = Recipe.model_validate(small_recipe | {"name": "begun", "model": {"name": name}, "ema": 0.8})
    trainer = Trainer(begun, CPU)
    trainer._train_epoch()
    trainer._end_epoch(trainer._validate())
    Trainer(begun, CPU).fit()
    assert losses(begun) == losses(whole)
    a, b = (load_bundle(f"{run.run}/bundle")[0].state_dict() for run in (whole, begun))
    assert all(torch.equal(a[key], b[key]) for key in a)
