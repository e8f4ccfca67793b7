"""PP-OCRv4's recogniser (HardSwish, squeeze-and-excite; opset 11 in effect) on noisy lines of rendered text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import rapidocr_onnxruntime
from rapidocr_onnxruntime.ch_ppocr_rec.text_recognize import TextRecognizer
from rapidocr_onnxruntime.ch_ppocr_rec.utils import CTCLabelDecode

from benchmarks.accuracy.scores import Score, each, edit_distance
from benchmarks.accuracy.task import Array, Outputs, Plan, write_samples
from benchmarks.accuracy.tasks.render import some_text, text_line

MODEL = Path(rapidocr_onnxruntime.__file__).parent / "models" / "ch_PP-OCRv4_rec_infer.onnx"
CALIBRATION, TEST = 64, 400
SHAPE = [3, 48, 320]  # the package's own
LONGEST = 32


def prepare(folder: Path, _: Path) -> None:
    """Lines of two disjoint sets of words.

    To calibrate, lines are padded to the widest, as the package does with a batch: ONNX Runtime's histograms take no
    samples of several widths. To test, each has its own.
    """
    shutil.copy(MODEL, folder / "model.onnx")
    lines = list(_lines(0, CALIBRATION))
    widest = max(image.shape[3] for image, _ in lines)
    padded = (np.pad(image, [(0, 0)] * 3 + [(0, widest - image.shape[3])]) for image, _ in lines)
    write_samples(folder / "calibration", ({"x": image} for image in padded))
    lines = list(_lines(1, TEST))
    write_samples(folder / "test", ({"x": image} for image, _ in lines))
    np.savez(folder / "truth.npz", text=np.array([text for _, text in lines]))


def answers(outputs: Outputs) -> Sequence[Any]:
    """The texts, decoded as the package does."""
    (scores,) = outputs.values()
    return [text for text, _ in _decoder()(scores)]


def score(found: Sequence[str], reference: Sequence[str], truth: Mapping[str, Array]) -> dict[str, Score]:
    """Characters right, and lines that are the float network's to the letter."""
    wanted = [str(text) for text in truth["text"]]
    right = [max(0, len(w) - edit_distance(f, w)) for f, w in zip(found, wanted, strict=True)]
    return {
        "characters right": Score(np.array(right, np.float64), np.array([len(w) for w in wanted], np.float64)),
        "same text as float": each([f == r for f, r in zip(found, reference, strict=True)]),
    }


def _lines(part: int, count: int) -> Iterator[tuple[Array, str]]:
    recognizer = SimpleNamespace(rec_image_shape=SHAPE)
    for number in range(count):
        rng = np.random.default_rng((part, number))
        text = some_text(rng, part, LONGEST)
        image = text_line(rng, text, noise=35, blur=1.2, contrast=95)
        ratio = max(SHAPE[2] / SHAPE[1], image.shape[1] / image.shape[0])
        yield TextRecognizer.resize_norm_img(recognizer, image[..., ::-1], ratio)[None], text


def _decoder() -> CTCLabelDecode:
    model = onnx.load(MODEL, load_external_data=False)
    (characters,) = [entry.value for entry in model.metadata_props if entry.key == "character"]
    return CTCLabelDecode(character=characters.splitlines())


PLAN = Plan("ocr-rec", "PP-OCRv4 rec (rapidocr-onnxruntime 1.4.4): noisy rendered lines", prepare, answers, score)
