"""What an activation between two quantisers costs in ONNX Runtime: as a table of codes, and operator by operator.

Each line is a network of one form of activation on 1 x 64 x 112 x 112 codes, in a process of its own. The costs in
`relu_deploy.int8.tables` are rounded from these: what counts there is only which side of a table a sum lies on.

    python benchmarks/tables.py [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from relu_deploy.machine import describe_machine

SHAPE = (1, 64, 112, 112)
ISLANDS = {
    "nothing": "f = Identity(x)",
    **{op: f"f = {op}(x)" for op in (
        "Relu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh", "Erf", "Exp", "Softplus", "Softsign", "Elu", "Selu",
        "Celu", "LeakyRelu", "Gelu", "Mish", "Abs", "Neg", "Floor", "Sqrt", "Log", "Sign", "Reciprocal",
        "ThresholdedRelu", "Sin", "Cos", "Atan", "Asinh", "Round",
    )},
    "Pow (3)": "f = Pow(x, three)",
    "Gelu (tanh)": 'f = Gelu <approximate = "tanh"> (x)',
    "Clip": "f = Clip(x, zero, six)",
    **{op: f"f = {op}(x, c)" for op in ("Add", "Mul", "Sub", "Div", "Max", "Min", "PRelu", "Pow")},
    "PRelu as Mul and Max": "m = Mul(x, c) f = Max(x, m)",
    "one hinge": "a = Mul(x, c) b = Add(a, c) d = Sub(x, c) e = Relu(d) g = Mul(e, c) f = Add(b, g)",
    "two hinges": "a = Mul(x, c) b = Add(a, c) d = Sub(x, c) e = Relu(d) g = Mul(e, c) h = Add(b, g) "
    "k = Add(x, c) l = Relu(k) m = Mul(l, c) f = Add(h, m)",
    "Mul of two tensors": "f = Mul(x, x)",
    "Where": "l = Less(x, c) f = Where(l, x, c)",
    "Cast": "i = Cast <to = 6> (x) f = Cast <to = 1> (i)",
}  # fmt: skip


def model(body: str, opset: int = 20) -> onnx.ModelProto:
    """Codes in, codes out."""
    sizes = ", ".join(map(str, SHAPE))
    result = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["": {opset}]> g (uint8[{sizes}] q) => (uint8[{sizes}] y) {{ {body} }}'
    )
    rng = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.05), "z": np.uint8(100), "c": rng.random((64, 1, 1)).astype(np.float32) + 1,
        "three": np.float32(3), "zero": np.float32(0), "six": np.float32(6), "rows": np.array([-1, 64]),
        "wq": rng.integers(-63, 64, (64, 64, 3, 3)).astype(np.int8), "wz": np.int8(0),
        "offset": (np.arange(64, dtype=np.int32) * 256).reshape(64, 1, 1),
        "flat": rng.integers(0, 256, 64 * 256).astype(np.uint8), "shape": np.array([1, 112, 112, 64]),
        "table": rng.integers(0, 256, (256, 64)).astype(np.uint8),
    }  # fmt: skip
    result.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return result


FORMS = {
    "3 x 3 convolution": "x = DequantizeLinear(q, s, z) w = DequantizeLinear(wq, s, wz) "
    "f = Conv <pads = [1, 1, 1, 1]> (x, w) y = QuantizeLinear(f, s, z)",
    "table by Gather": "i = Cast <to = 6> (q) o = Add(i, offset) y = Gather(flat, o)",
    "table": "r = Reshape(q, rows) i = Cast <to = 6> (r) g = GatherElements <axis = 0> (table, i) "
    "l = Reshape(g, shape) y = Transpose <perm = [0, 3, 1, 2]> (l)",
    **{name: f"x = DequantizeLinear(q, s, z) {body} y = QuantizeLinear(f, s, z)" for name, body in ISLANDS.items()},
}  # fmt: skip


def one(name: str, threads: int) -> None:
    """Print the fastest and the median time of one form, in ms for a million elements."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(model(FORMS[name]).SerializeToString(), options)
    feed = {"q": np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)}
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < 1.0 or len(times) < 10:
        before = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - before)
    scale = 1e3 / (np.prod(SHAPE) / 1e6)
    print(json.dumps([float(np.min(times[3:]) * scale), float(np.median(times[3:]) * scale)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.threads)
        return
    print(f"{describe_machine().cpu}, {args.threads} threads, onnxruntime {ort.__version__}; ms for a million elements")
    print(f"{'form':20s} {'fastest':>8s} {'median':>8s}")
    for name in FORMS:
        call = [sys.executable, __file__, "--one", name, "--threads", str(args.threads)]
        answer = subprocess.run(call, capture_output=True, text=True, check=False)
        if answer.returncode:
            print(f"{name:20s} {answer.stderr.strip().splitlines()[-1][:90]}")
            continue
        fastest, median = json.loads(answer.stdout)
        print(f"{name:20s} {fastest:8.2f} {median:8.2f}")


if __name__ == "__main__":
    main()
