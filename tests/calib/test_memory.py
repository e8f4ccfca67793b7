"""What calibration holds on to does not grow with the number of samples."""

from __future__ import annotations

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

nodes = " ".join(f"t{i + 1} = Sigmoid(t{i})" if i % 2 else f"t{i + 1} = Neg(t{i})" for i in range(12))
ends = "(float[N, 32, 64, 128] t0) => (float[N, 32, 64, 128] t12)"
model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {ends} {{ {nodes} }}')
one = np.random.default_rng(0).standard_normal((1, 32, 64, 128)).astype(np.float32)
rows = lambda: (one * np.float32(1 + i) for i in range(int(sys.argv[2])))
found = calibrate(model, open_source(rows, model_inputs(model)), method=sys.argv[1], threads=2)
assert found.samples == int(sys.argv[2])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("method", METHODS)
def test_the_peak_is_the_same_for_few_and_many_samples(method):
    peaks = [
        int(subprocess.run([sys.executable, "-c", SCRIPT, method, count], capture_output=True, text=True).stdout)
        for count in ("16", "64")
    ]
    assert peaks[1] < 1.1 * peaks[0]
