"""What one scale for all operands saves in ONNX Runtime: integer Concat and Add with equal and with different scales.

    python benchmarks/shared_scales.py [--rounds 60]

One thread; median of rounds that alternate between the two, of a million elements an operand.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from common import print_machine

SHAPE = [1, 64, 128, 128]


def network(op: str, scales: tuple[float, float, float]) -> ort.InferenceSession:
    """``op`` of two uint8 operands; scales of both and of the result, zero point 0."""
    names = ("a", "b", "y")
    stored = [numpy_helper.from_array(np.float32(s), f"{n}_s") for n, s in zip(names, scales, strict=True)]
    stored += [numpy_helper.from_array(np.uint8(0), f"{name}_z") for name in names]
    operands = [x for n in ("a", "b") for x in (n, f"{n}_s", f"{n}_z")]
    result = ["y_s", "y_z"]
    if op == "QLinearConcat":
        node = helper.make_node(op, [*result, *operands], ["y"], "op", domain="com.microsoft", axis=1)
    else:
        node = helper.make_node(op, [*operands, *result], ["y"], "op", domain="com.microsoft")
    made = [SHAPE[0], SHAPE[1] * (2 if op == "QLinearConcat" else 1), *SHAPE[2:]]
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(name, TensorProto.UINT8, SHAPE) for name in ("a", "b")],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, made)], stored,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def medians(sessions: list[ort.InferenceSession], rounds: int) -> list[float]:
    """Milliseconds of each, measured in turn."""
    rng = np.random.default_rng(0)
    feeds = {name: rng.integers(0, 256, SHAPE, dtype=np.uint8) for name in ("a", "b")}
    times: list[list[float]] = [[] for _ in sessions]
    for number in range(rounds + 5):
        for session, found in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, feeds)
            if number >= 5:  # warm
                found.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    print_machine()
    for op in ("QLinearConcat", "QLinearAdd"):
        same, other = medians([network(op, (0.1, 0.1, 0.1)), network(op, (0.1, 0.05, 0.1))], args.rounds)
        print(f"{op}: one scale {same:.3f} ms, two scales {other:.3f} ms")


if __name__ == "__main__":
    main()
