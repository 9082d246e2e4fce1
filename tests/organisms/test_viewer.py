"""The viewer: its scenes, its losses, resuming, and the shipped weights' figures on a small sample."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from foveate import organisms
from foveate.organisms.viewer.evaluate import SEED, evaluate
from foveate.organisms.viewer.model import CLASSES, Seen, Viewer, ViewerConfig, losses, overlap
from foveate.organisms.viewer.scenes import HELD_OUT, Scenes, digits
from foveate.organisms.viewer.train import TrainConfig, Trainer, export, load, main

pytest.importorskip("sklearn")
SMALL = ViewerConfig(dim=8, depths=(1, 1, 2), heads=(1, 2, 2), neck=8)


def test_scenes_are_what_they_say():
    scene = Scenes(noise=0.0).sample(3, 40)
    assert torch.equal(scene.counts, (scene.classes >= 0).sum(1))
    assert set(scene.counts.tolist()) > {1, 2, 3, 4}
    for classes, boxes in zip(scene.classes, scene.boxes, strict=True):
        mine = [tuple(box.tolist()) for box, kind in zip(boxes, classes, strict=True) if kind >= 0]
        assert all(
            8 <= h == w <= 16 and min(t, left) >= 0 and max(t, left) + h <= 48 for t, left, h, w in mine
        )
        assert all(overlap(a, b) == 0 for i, a in enumerate(mine) for b in mine[:i])
    again = Scenes(noise=0.0).sample(3, 40)
    assert torch.equal(again.images, scene.images)
    assert not torch.equal(Scenes(noise=0.0).sample(4, 40).images, scene.images)
    with pytest.raises(ValueError, match="sizes must rise"):
        Scenes(sizes=(9, 8))
    with pytest.raises(ValueError, match="most must be"):
        Scenes(most=0)


def test_held_out_digits_are_never_trained_on():
    x, y = digits()
    assert x.shape == (1797, 8, 8)
    assert HELD_OUT == 360
    one = Scenes(most=1, sizes=(8, 8), noise=0.0)
    for held_out, part in ((True, slice(0, 360)), (False, slice(360, None))):
        scene = one.sample(0, 30, held_out=held_out)
        for b in range(30):
            t, left = (int(n) for n in scene.boxes[b, 0, :2])
            crop = scene.images[b, 0, t : t + 8, left : left + 8]
            kinds = y[part] == scene.classes[b, 0]
            pool = x[part][kinds].flatten(1)
            rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
            plane = torch.stack([torch.ones(64), rows.flatten(), columns.flatten()], 1)
            errors = []
            for candidate in pool:  # the crop is a multiple of one of them plus a plane
                basis = torch.cat([candidate[:, None], plane], 1)
                fit = torch.linalg.lstsq(basis, crop.flatten()[:, None]).solution
                errors.append(float((basis @ fit - crop.flatten()[:, None]).abs().max()))
            assert min(errors) < 1e-4


def test_a_perfect_answer_has_no_loss_and_is_found_again():
    scene = Scenes().sample(1, 3)
    h = w = 12
    classes, boxes = torch.full((3, CLASSES + 1, h, w), -20.0), torch.zeros(3, 4, h, w)
    classes[:, CLASSES] = 20.0
    for b in range(3):
        for kind, (top, left, height, width) in zip(
            scene.classes[b].tolist(), scene.boxes[b].tolist(), strict=True
        ):
            if kind >= 0:
                y, x = (top + height / 2) / 4, (left + width / 2) / 4
                classes[b, :, int(y), int(x)] = -20.0
                classes[b, kind, int(y), int(x)] = 20.0
                boxes[b, :, int(y), int(x)] = torch.tensor(
                    [y % 1, x % 1, *(torch.tensor([height, width]) / 8).log().tolist()]
                )
    counts = 40.0 * torch.nn.functional.one_hot(scene.counts, 7)
    seen = Seen(classes, boxes, counts)
    found = losses(seen, scene.classes, scene.boxes, scene.counts)
    assert all(float(part) < 1e-5 for part in found.values())
    wrong = losses(replace(seen, boxes=boxes + 0.1), scene.classes, scene.boxes, scene.counts)
    assert float(wrong["boxes"]) == pytest.approx(0.1, abs=1e-4)

    class Told(Viewer):
        def forward(self, images):
            return Seen(classes[: len(images)], boxes[: len(images)], counts[: len(images)])

    for b, mine in enumerate(Told(SMALL).find(scene.images)):
        assert len(mine) == int(scene.counts[b])
        for kind, _, box in mine:
            best = max(
                range(6),
                key=lambda i: (
                    overlap(box, tuple(scene.boxes[b, i].tolist())) if scene.classes[b, i] >= 0 else 0
                ),
            )
            assert overlap(box, tuple(scene.boxes[b, best].tolist())) > 0.99
            assert kind == int(scene.classes[b, best])


def test_a_resumed_run_takes_the_same_steps(tmp_path):
    config = TrainConfig(steps=4, batch=2, warmup=2, checkpoint=2, evaluate=100)
    whole = Trainer(config, SMALL, Scenes(), tmp_path / "whole")
    for _ in range(4):
        whole.step()
    first = Trainer(config, SMALL, Scenes(), tmp_path / "run")
    first.step()
    first.step()
    first.save()
    second = Trainer.resume(tmp_path / "run")
    assert second.step_number == 2
    second.step()
    second.step()
    for (name, a), b in zip(
        whole.viewer.state_dict().items(), second.viewer.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    second.save()
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    pytest.importorskip("matplotlib")
    second.log = [{"step": 2, "cells": 1.0, "boxes": 1.0, "counts": 1.0}]
    second.save()
    export(tmp_path / "run", tmp_path / "shipped")
    viewer, scenes = load(tmp_path / "shipped")
    assert scenes == Scenes()
    image = scenes.sample(0, 1).images
    want = second.viewer.eval()(image).classes
    assert torch.allclose(viewer(image).classes, want, atol=5e-3)
    assert main(["--out", str(tmp_path / "none"), "--resume"]) == 2
    assert main(["--out", str(tmp_path / "run"), "--steps", "1"]) == 2


def test_the_shipped_viewer_finds_names_and_counts():
    folder = organisms.path("viewer")
    assert (folder / "model.safetensors").stat().st_size < 5e6
    stored = json.loads((folder / "evaluation.json").read_text())["shipped: 48 pixels"]
    viewer, scenes = organisms.load("viewer")
    assert not viewer.training
    figures = evaluate(viewer, scenes, number=60, seed=SEED + 1)
    for name in ("found", "named", "precision", "counted"):
        assert figures[name] > stored[name] - 0.12, name
    assert len(viewer(torch.rand(1, 1, 53, 61)).classes.shape) == 4  # any size
