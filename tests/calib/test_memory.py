"""What calibration holds on to does not grow with the number of samples."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from calib.options import METHODS

# 12 tensors of 1 MiB a sample: kept samples would show at once. The peak of a process of its own is printed, in
# KiB, as Linux keeps it for a program; ru_maxrss would be that of the process that started it.
SCRIPT = """
import sys
import numpy as np, onnx.parser
from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source

calls = sys.argv[3:]
nodes = " ".join(f"t{i + 1} = {calls[i % 2].format('t' + str(i))}" for i in range(12))
ends = "(float[N, 32, 64, 128] t0) => (float[N, 32, 64, 128] t12)"
model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {ends} {{ {nodes} }}')
model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(32, dtype=np.float32).reshape(32, 32, 1, 1), "w"))
one = np.random.default_rng(0).standard_normal((1, 32, 64, 128)).astype(np.float32)
rows = lambda: (one * np.float32(1 + i) for i in range(int(sys.argv[2])))
found = calibrate(model, open_source(rows, model_inputs(model)), method=sys.argv[1], threads=2)
assert found.samples == int(sys.argv[2])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(method: str, count: int, *calls: str) -> int:
    """Of a process that calibrates on so many samples; the median of three, since it depends on which runs meet."""
    call = [sys.executable, "-c", SCRIPT, method, str(count), *calls]
    return statistics.median(
        int(subprocess.run(call, capture_output=True, text=True, check=True).stdout) for _ in range(3)
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("method", METHODS)
def test_the_peak_is_the_same_for_few_and_many_samples(method):
    assert peak(method, 64, "Neg({})", "Sigmoid({})") < 1.1 * peak(method, 16, "Neg({})", "Sigmoid({})")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_peak_is_the_same_where_the_runtime_takes_extremes():
    assert peak("max", 64, "Tanh({})", "Conv({}, w)") < 1.1 * peak("max", 16, "Tanh({})", "Conv({}, w)")
