"""ddddocr's detector (YOLOX of 74 SiLU) on photographs with letters: does it find what the float one finds?"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import ddddocr
import numpy as np
from ddddocr.core.detection_engine import DetectionEngine
from PIL import Image, ImageDraw
from skimage import data

from benchmarks.accuracy.scores import Score, f1
from benchmarks.accuracy.task import Array, Outputs, Plan, write_samples
from benchmarks.accuracy.tasks.render import a_font, spoiled

MODEL = Path(ddddocr.__file__).parent / "common_det.onnx"
CALIBRATION, TEST, SIZE = 48, 200, 416
LEAST, OVERLAP = 0.1, 0.45  # the package's own thresholds
# Photographs that ship with scikit-image; those of one part are not in the other.
PHOTOS = (
    ("astronaut", "brick", "camera", "coins", "grass"),
    ("chelsea", "coffee", "gravel", "rocket", "hubble_deep_field"),
)
SIGNS = ("ABCDEFGHJKLMNPRSTUVWXYZ2345678", "abdefghijmnqrty23456789")


def prepare(folder: Path, _: Path) -> None:
    """Scenes on two disjoint sets of photographs."""
    shutil.copy(MODEL, folder / "model.onnx")
    write_samples(folder / "calibration", ({"images": image} for image, _ in _scenes(0, CALIBRATION)))
    scenes = list(_scenes(1, TEST))
    write_samples(folder / "test", ({"images": image} for image, _ in scenes))
    placed = [np.column_stack([np.full(len(boxes), i), boxes]) for i, (_, boxes) in enumerate(scenes)]
    np.savez(folder / "truth.npz", boxes=np.concatenate(placed))


def answers(outputs: Outputs) -> Sequence[Array]:
    """Boxes (N, 5) after the package's thresholds, best first."""
    (raw,) = outputs.values()
    tools = SimpleNamespace(nms=lambda *given: DetectionEngine.nms(None, *given))
    maps = DetectionEngine.demo_postprocess(None, raw.copy(), (SIZE, SIZE))[0]
    half = maps[:, 2:4] / 2
    corners = np.concatenate([maps[:, :2] - half, maps[:, :2] + half], 1)
    scores = maps[:, 4:5] * maps[:, 5:]
    found = DetectionEngine.multiclass_nms_class_agnostic(tools, corners, scores, OVERLAP, LEAST)
    return [np.empty((0, 5)) if found is None else found[:, [0, 1, 2, 3, 5]]]


def score(found: Sequence[Array], reference: Sequence[Array], truth: Mapping[str, Array]) -> dict[str, Score]:
    """F1 of boxes at an overlap of 0.5: against the float network's, and against what was pasted."""
    placed = [truth["boxes"][truth["boxes"][:, 0] == i][:, 1:] for i in range(len(found))]
    return {"F1 against float": f1(found, reference), "F1 against truth": f1(found, placed)}


def _scenes(part: int, count: int) -> Iterator[tuple[Array, Array]]:
    photos = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOS[part]]
    for number in range(count):
        rng = np.random.default_rng((4 + part, number))
        image, boxes = _scene(rng, photos[number % len(photos)], SIGNS[part])
        prepared, ratio = DetectionEngine.preproc(None, image[..., ::-1], (SIZE, SIZE))
        yield prepared[None], np.column_stack([boxes * ratio, np.zeros(len(boxes))])


def _scene(rng: np.random.Generator, photo: Image.Image, signs: str) -> tuple[Array, Array]:
    """A crop of a photograph with a few signs, each turned and in a colour of its own, none on another."""
    width, height = int(rng.integers(220, 420)), int(rng.integers(120, 380))
    part = min(photo.width / width, photo.height / height) * rng.uniform(0.5, 1)
    left, top = rng.uniform(0, photo.width - part * width), rng.uniform(0, photo.height - part * height)
    crop = (left, top, left + part * width, top + part * height)
    scene = photo.resize((width, height), box=tuple(map(float, crop)))
    boxes: list[tuple[int, int, int, int]] = []
    for _ in range(int(rng.integers(3, 9))):
        sign, box = _sign(rng, signs, (width, height))
        if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in boxes):
            scene.paste(sign, box[:2], sign)
            boxes.append(box)
    return spoiled(rng, scene, noise=20, blur=0.8), np.array(boxes, np.float64)


def _sign(rng: np.random.Generator, signs: str, size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A letter cut at its outermost pixels, and where it goes."""
    edge = int(rng.integers(28, 64))
    canvas = Image.new("RGBA", (2 * edge, 2 * edge))
    colour = (*rng.integers(256, size=3).tolist(), 255)
    letter = signs[int(rng.integers(len(signs)))]
    ImageDraw.Draw(canvas).text((edge, edge), letter, font=a_font(rng, edge), fill=colour, anchor="mm")
    canvas = canvas.rotate(float(rng.uniform(-40, 40)), Image.Resampling.BICUBIC)
    canvas = canvas.crop(canvas.getbbox())
    x, y = int(rng.integers(size[0] - canvas.width)), int(rng.integers(size[1] - canvas.height))
    return canvas, (x, y, x + canvas.width, y + canvas.height)


PLAN = Plan("common-det", "ddddocr 1.6.1 common_det (YOLOX, SiLU): letters on photographs", prepare, answers, score)
