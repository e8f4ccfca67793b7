"""What weights alone lose: an INT8 file whose activations are not rounded, ``python -m benchmarks.accuracy.limits``.

Each Q/DQ pair on an activation becomes a Clip to what its codes reach, so that the file saturates as it did and rounds
nothing but its weights. Give it a file made with ``--no-correct``: corrected biases make up for what is left out here.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.accuracy.evaluate import evaluate
from benchmarks.accuracy.tasks import load_task


def main() -> None:
    """Print the metrics of a file and those with its weights alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("work", type=Path)
    parser.add_argument("model", type=Path, help="an INT8 file with Q/DQ")
    given = parser.parse_args()
    task = load_task(given.task, given.work)
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "weights.onnx"
        onnx.save(weights_alone(onnx.load(given.model)), alone)
        for what, path, integer in (("as it is", given.model, True), ("weights alone", alone, False)):
            found = evaluate(task, path, integer_kernels=integer)
            print(f"{given.task}, {what}: {float(found['sqnr_db']):.1f} dB", end="")
            for name, score in found["metrics"].items():
                gap, low, high = (100 * score[key] for key in ("difference", "low", "high"))
                print(f", {name} {score['value']:.4f} ({gap:+.2f} [{low:+.2f}, {high:+.2f}])", end="")
            print()


def weights_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with a Clip in the place of every Q/DQ pair that has one scale; what reads codes keeps them."""
    graph = model.graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    nodes: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        behind = readers.get(node.output[0], []) if node.op_type == "QuantizeLinear" else []
        if not behind or any(reader.op_type != "DequantizeLinear" for reader in behind):
            continue
        if (bounds := _bounds(node, stored)) is None:
            continue
        names = [f"{node.output[0]}/{end}" for end in ("lowest", "highest")]
        for name, bound in zip(names, bounds, strict=True):
            made.graph.initializer.append(numpy_helper.from_array(bound, name))
        for reader in behind:
            clip = helper.make_node("Clip", [node.input[0], *names], list(reader.output), name=f"{reader.name}/Clip")
            nodes[reader.output[0]] = [clip]
        nodes[node.output[0]] = []
    del made.graph.node[:]
    for node in graph.node:
        made.graph.node.extend(nodes.get(node.output[0], [node]))
    return made


def _bounds(node: onnx.NodeProto, stored: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """What the lowest and the highest code stand for; None where there is not one scale."""
    scale, zero = stored.get(node.input[1]), stored.get(node.input[2]) if len(node.input) > 2 else np.uint8(0)
    if scale is None or zero is None or scale.size != 1:
        return None
    ends = np.iinfo(np.asarray(zero).dtype)
    lowest, highest = (
        np.asarray(scale.reshape(()) * (code - int(np.asarray(zero).reshape(()))), scale.dtype)
        for code in (ends.min, ends.max)
    )
    return lowest, highest


if __name__ == "__main__":
    main()
