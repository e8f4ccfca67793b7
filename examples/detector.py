"""A trained SiLU detector to INT8, its activations as they are: what a user with an ONNX file and some photos does.

The detector is ``common_det.onnx`` of the package ddddocr (YOLOX-style, 74 SiLU); the photographs are scikit-image's.
Half of them calibrate, the other half show how far the INT8 outputs move from the float ones.

    python examples/detector.py -o detector-run
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from calib.files import make_folder
from calib.inputs import model_inputs
from calib.sources import open_source
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.errors import MissingExtraError
from relu_deploy.flow import Int8Plan, build_engine
from relu_deploy.graph import load_model
from relu_deploy.int8.drift import sqnr_db

# As ddddocr feeds it: letterboxed to 416x416, BGR, 0 to 255.
PREPROCESS = "resize=416x416,letterbox,channels=bgr,scale=1"
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry", "retina")


def save_photos(folder: Path) -> None:
    """Write scikit-image's photographs as PNG files, half to ``calibration``, half to ``held-out``."""
    from PIL import Image
    from skimage import data

    for index, name in enumerate(PHOTOS):
        part = folder / ("calibration" if index % 2 == 0 else "held-out")
        make_folder(part)
        Image.fromarray(getattr(data, name)()).convert("RGB").save(part / f"{name}.png")


def outputs(engine: Path, images: np.ndarray) -> np.ndarray:
    """Detector outputs, one image at a time: shape (N, boxes, values)."""
    with get_backend("ort").open(engine) as opened:
        (name,) = (spec.name for spec in opened.inputs)
        return np.concatenate([next(iter(opened.run({name: image[None]}).values())) for image in images])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("detector-run"))
    folder = parser.parse_args().output
    found = importlib.util.find_spec("ddddocr")
    if found is None or found.origin is None:
        raise MissingExtraError("ddddocr", extra="dev", purpose="this example")
    model = load_model(Path(found.origin).parent / "common_det.onnx")
    make_folder(folder)
    save_photos(folder)
    specs = model_inputs(model)
    source = open_source(folder / "calibration", specs, preprocess=PREPROCESS)
    float_build = build_engine(model, folder / "detector.fp32.onnx", BuildConfig("ort"))
    builds = {"ort fp32": float_build}
    builds["ort int8"] = build_engine(model, folder / "detector.int8.onnx", BuildConfig("ort"), int8=Int8Plan(source))
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        config = BuildConfig("tensorrt-rtx", sm=("89",))
        builds["tensorrt-rtx int8 (SM 89)"] = build_engine(
            model, folder / "detector.engine", config, int8=Int8Plan(source)
        )
    table = Table("engine", "int8 layers", "activations left that are not ReLU", "kernels", "MB moved")
    for name, built in builds.items():
        audit = built.engine.audit
        left = ", ".join(f"{count} {kind}" for kind, count in audit.activation_counts().items() if kind != "relu")
        moved = "-" if audit.bytes_moved is None else f"{audit.bytes_moved / 1e6:.1f}"
        table.add_row(name, f"{audit.int8} of {len(audit.linear)}", left, str(audit.kernels), moved)
    console = Console()
    console.print(table)
    held_out = open_source(folder / "held-out", specs, preprocess=PREPROCESS)
    images = np.concatenate([sample.feeds[specs[0].name] for sample in held_out])
    reference, quantized = (outputs(folder / f"detector.{kind}.onnx", images) for kind in ("fp32", "int8"))
    noise = reference - quantized
    sqnr = sqnr_db(float(np.sum(reference**2)), float(np.sum(noise**2)))
    console.print(f"INT8 against float on {len(images)} held-out photographs: SQNR {sqnr:.1f} dB")


if __name__ == "__main__":
    main()
