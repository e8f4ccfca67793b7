"""The detection study's parts: its canvases, what a cell's numbers mean, and how detections are scored."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'relu-deploy[torch]'")
pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'relu-deploy[torch]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'relu-deploy[torch]'")

from relu_deploy.nn.swap import relu, replace_activations  # noqa: E402

pytestmark = pytest.mark.torch

STUDIES = Path(__file__).parents[2] / "examples" / "studies"
MODULES = ("detection_data", "detector_network", "detector_loss", "detection")


@pytest.fixture
def study(monkeypatch):
    """The study's scripts, which import each other by plain name."""
    monkeypatch.syspath_prepend(str(STUDIES))
    before = set(sys.modules)
    yield SimpleNamespace(**{name.rpartition("_")[2]: importlib.import_module(name) for name in MODULES})
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == STUDIES:
            del sys.modules[name]


@pytest.fixture
def items():
    """Bright blocks of several sizes in place of clothes, ten classes."""
    rng = np.random.default_rng(0)
    images = np.zeros((40, 28, 28), np.uint8)
    for image in images:
        (top, left), (height, width) = rng.integers(0, 8, 2), rng.integers(12, 21, 2)
        image[top : top + height, left : left + width] = 220
    return images, rng.integers(0, 10, 40)


def test_canvases_follow_from_the_seed(study, items):
    first, again, other = (study.data.compose(*items, 5, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.images, again.images)
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(first.targets, again.targets, strict=True))
    assert not np.array_equal(first.images, other.images)


def test_boxes_are_tight_and_hold_everything(study, items, monkeypatch):
    monkeypatch.setattr(study.data, "_ground", lambda images, rng: np.zeros((64, 64), np.float32))
    made = study.data.compose(*items, 20, seed=0)
    for image, target in zip(made.images, made.targets, strict=True):
        bright = image > 60  # between the noise and the faintest item's middle
        inside = np.zeros_like(bright)
        for x1, y1, x2, y2 in target["boxes"].int().tolist():
            inside[y1:y2, x1:x2] = True
            # An edge pixel of a resized block is as faint as a quarter of it.
            assert all(edge.max() > 15 for edge in (image[y1, x1:x2], image[y2 - 1, x1:x2]))
            assert all(edge.max() > 15 for edge in (image[y1:y2, x1], image[y1:y2, x2 - 1]))
        assert 1 <= len(target["labels"]) <= 4
        assert not (bright & ~inside).any()


def test_an_item_is_cut_at_its_ink(study):
    image = np.zeros((28, 28), np.uint8)
    image[4:10, 6:20] = 200
    item, mask = study.data.cut_item(image, scale=1.0, mirror=True)
    assert item.shape == (6, 14)
    assert mask.all()
    assert study.data.cut_item(np.zeros_like(image), scale=1.0, mirror=False)[0].size == 0


def test_canvases_come_back_from_a_file(study, items, tmp_path):
    made = study.data.compose(*items, 4, seed=0)
    study.data.save_canvases(made, tmp_path / "c.npz")
    loaded = study.data.load_canvases(tmp_path / "c.npz")
    assert np.array_equal(made.images, loaded.images)
    for a, b in zip(made.targets, loaded.targets, strict=True):
        assert torch.equal(a["boxes"], b["boxes"])
        assert torch.equal(a["labels"], b["labels"])


def test_a_cell_is_decoded(study):
    raw = np.zeros((1, 4, 8, 8), np.float32)
    raw[0, :, 2, 1] = 0.5, -0.25, math.log(2), math.log(0.5)
    box = study.network.corners(raw)[0, 2 * 8 + 1]
    # The middle: (1 + 0.5 + 0.5) * 8 and (2 + 0.5 - 0.25) * 8; the size: 2 * 20 and 20 / 2.
    assert box == pytest.approx([16 - 20, 18 - 5, 16 + 20, 18 + 5])
    cell = torch.tensor([17])
    same = study.loss.decoded(torch.from_numpy(raw[0, :, 2, 1])[None], cell, 8)
    assert same[0].numpy() == pytest.approx(box)


def test_a_suppressed_box_suppresses_nothing(study):
    # Overlaps of neighbours: 8 / 12; of the first and the third: 6 / 14.
    boxes = np.array([[[0, 0, 10, 1], [2, 0, 12, 1], [4, 0, 14, 1], [0, 0, 10, 1]]], np.float32)
    assert study.network.suppress(boxes, np.array([[3, 3, 3, 5]])).tolist() == [[True, False, True, True]]


def test_cells_near_a_middle_answer_for_the_nearest_item(study):
    targets = [
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": torch.tensor([[10.0, 10, 30, 30], [28.0, 10, 40, 30]]), "labels": torch.tensor([7, 2])},
    ]
    image, cell, boxes, labels = study.loss.assign(targets, (8, 8), torch.device("cpu"))
    assert set(image.tolist()) == {1}
    # Middles (20, 20) and (34, 20), cells' at 4, 12, 20, 28...: within 10 pixels, columns 1 to 3, and 3 to 4.
    columns = dict(zip((cell % 8).tolist(), labels.tolist(), strict=True))
    assert columns == {1: 7, 2: 7, 3: 2, 4: 2}
    assert set((cell // 8).tolist()) == {1, 2, 3}
    assert torch.equal(boxes[labels == 2][0], targets[1]["boxes"][1])


def test_perfect_maps_score_100(study, items):
    data = study.data.compose(*items, 30, seed=3)
    maps = {name: np.zeros((30, n, 8, 8), np.float32) for name, n in (("boxes", 4), ("objectness", 1), ("classes", 10))}
    image, cell, boxes, labels = (t.numpy() for t in study.loss.assign(data.targets, (8, 8), torch.device("cpu")))
    y, x = cell // 8, cell % 8
    middle, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    raw = np.concatenate([middle / 8 - 0.5 - np.stack([x, y], 1), np.log(size / 20)], 1)
    maps["boxes"][image, :, y, x] = raw
    maps["objectness"][image, 0, y, x] = 1
    maps["classes"][image, labels, y, x] = 1
    found = study.network.decode(maps)
    assert [len(f["labels"]) for f in found] == [len(t["labels"]) for t in data.targets]
    assert study.detection.average_precision(found, data.targets) == pytest.approx(
        {"ap": 100, "ap50": 100, "ap75": 100}
    )


def test_the_loss_falls(study, items):
    data = study.data.compose(*items, 4, seed=0)
    torch.manual_seed(0)
    network = study.network.Detector(width=8).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    inputs = torch.from_numpy(study.data.as_input(data.images))
    losses = []
    for _ in range(12):
        losses.append(study.loss.detection_loss(network(inputs), data.targets))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0]
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    assert torch.isfinite(study.loss.detection_loss(network(inputs[:1]), empty))


def test_the_heads_sigmoids_stay(study):
    network = study.network.Detector(width=8).eval()
    image = torch.zeros(2, 1, 64, 64)
    student, report = replace_activations(network, relu, example=image)
    assert [skip.name for skip in report.left] == ["head.sigmoid"]
    assert not any(isinstance(module, torch.nn.SiLU) for module in student.modules())
    maps = student(image)
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "boxes": (2, 4, 8, 8), "objectness": (2, 1, 8, 8), "classes": (2, 10, 8, 8),
    }  # fmt: skip
    assert 0 < float(maps["classes"].detach().max()) < 0.5
