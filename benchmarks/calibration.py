"""How long calibration takes, and how much memory, beside onnxruntime.quantization.quantize_static.

The network is a YOLOX-S-sized detector with ReLU and random weights (9 M parameters, 320 x 320, 202 float tensors);
the samples are random, the same for both. Every run is a process of its own, ours and theirs in turn; ratios are those
of pairs of runs, medians over the rounds. quantize_static also writes the quantised network, so the time of our
calibrate and quantize together is printed too. Seconds of the processor are less disturbed by what else runs on the
machine; two threads at work count twice. ONNX Runtime has no method mse, and with percentile and entropy it keeps every
activation of every sample: do not ask for many there.

The network alone is what no calibration can be quicker than: the same samples run through it, with all of the runtime's
optimisations and nothing looked at, one run for each processor at a time.

Needs the extras torch and tensorrt-rtx, for the network's plan. Run:

    python benchmarks/calibration.py
    python benchmarks/calibration.py --method max --series 16 64 128 512
    python benchmarks/calibration.py --many 512
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from calib.ahead import Workers
from calib.inputs import model_inputs
from calib.options import METHODS
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from common import print_machine
from relu_deploy.int8.run import quantize

THEIRS = {"max": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
SIZE = 320


def samples(count: int) -> Iterator[np.ndarray]:
    """Random pictures, made as they are asked for."""
    pool = np.random.default_rng(0).normal(size=(16, 3, SIZE, SIZE)).astype(np.float32)
    for i in range(count):
        yield pool[i % 16 : i % 16 + 1] * np.float32(1 + i / 1000)


def ours(model: Path, method: str, count: int, *, with_quantize: bool) -> None:
    """Calibrate, and quantise where asked."""
    network = onnx.load(model)
    ranges = calibrate(network, open_source(lambda: samples(count), model_inputs(network)), method=method)
    if with_quantize:
        quantized, _ = quantize(network, ranges, channel_fusion="off")
        onnx.save(quantized, model.with_name("ours.onnx"))


def theirs(model: Path, method: str, count: int) -> None:
    """``quantize_static`` with uint8 activations, and int8 weights with a scale for each channel."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = samples(count)

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rows, None)
            return None if row is None else {"images": row}

    quantize_static(
        model, model.with_name("theirs.onnx"), Reader(), per_channel=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod[THEIRS[method]],
    )  # fmt: skip


def alone(model: Path, count: int) -> None:
    """The network as quick as the runtime runs it."""
    session = open_session(onnx.load(model), optimise=True, threads=1)
    workers = Workers(lambda row: session.run(None, {"images": row}), len(os.sched_getaffinity(0)))
    for _ in workers.map(samples(count)):
        pass


def measured(model: Path, who: str, method: str, count: int) -> dict[str, float]:
    """Seconds by the clock and of the processor, and peak memory in MiB, of one run in a process of its own."""
    call = [sys.executable, __file__, "--worker", who, "--model", str(model), "--method", method]
    done = subprocess.run([*call, "--samples", str(count)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def work(options: argparse.Namespace) -> None:
    """What a process of its own does: imports are paid before, the clocks run for the work."""
    import onnxruntime.quantization  # noqa: F401 - theirs shall not pay for it in its time

    started, busy = time.perf_counter(), time.process_time()
    if options.worker == "theirs":
        theirs(options.model, options.method[0], options.samples)
    elif options.worker == "alone":
        alone(options.model, options.samples)
    else:
        ours(options.model, options.method[0], options.samples, with_quantize=options.worker == "both")
    print(json.dumps({"clock": time.perf_counter() - started, "cpu": time.process_time() - busy, "peak": peak()}))


def peak() -> float:
    """Most memory that this process had, in MiB. ``ru_maxrss`` would tell that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def compare(model: Path, method: str, count: int, rounds: int) -> None:
    """Print one row: medians over rounds, and the ratio of each round's pair."""
    who = ["ours", "both", *(["theirs"] if method in THEIRS else [])]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in who}
    for _ in range(rounds):
        for name in who:
            found[name].append(measured(model, name, method, count))

    def middle(name: str, what: str) -> float:
        return statistics.median(run[what] for run in found[name]) if name in found else float("nan")

    def ratio(name: str, what: str) -> float:
        pairs = zip(found.get("theirs", found[name]), found[name], strict=True)
        return statistics.median(a[what] / b[what] for a, b in pairs) if "theirs" in found else float("nan")

    cells = [f"{middle(name, what):.2f}" for name in ("ours", "both", "theirs") for what in ("clock", "cpu")]
    cells += [f"{ratio(name, what):.2f}" for name in ("ours", "both") for what in ("clock", "cpu")]
    cells += [f"{count / middle('ours', 'clock'):.1f}", *(f"{middle(n, 'peak'):.0f}" for n in ("ours", "theirs"))]
    print(f"| {method} | {' | '.join(cells)} |".replace("nan", "-"), flush=True)


def series(model: Path, counts: list[int], rounds: int, methods: list[str]) -> None:
    """Print how the times go with the number of samples, beside those of the network alone."""
    print(
        "| method | samples | calibrate | network alone | quantize_static | calibrate faster | network alone faster |\n"
        "|---|---|---|---|---|---|---|"
    )
    for method, count in itertools.product(methods, counts):
        who = ["ours", "alone", *(["theirs"] if method in THEIRS else [])]
        found = [{name: measured(model, name, method, count)["clock"] for name in who} for _ in range(rounds)]
        for run in found:
            run.setdefault("theirs", math.nan)
        cells = [statistics.median(run[name] for run in found) for name in ("ours", "alone", "theirs")]
        cells += [statistics.median(run["theirs"] / run[name] for run in found) for name in ("ours", "alone")]
        print(f"| {method} | {count} | {' | '.join(f'{cell:.2f}' for cell in cells)} |".replace("nan", "-"), flush=True)


def growth(model: Path, few: int, many: int, methods: list[str]) -> None:
    """Print the peaks for few and for many samples, and how many samples a second go through in the long run."""
    print(f"\n| method | peak MiB, {few} samples | {many} samples | ratio | samples/s |\n|---|---|---|---|---|")
    for method in methods:
        small, large = (measured(model, "ours", method, count) for count in (few, many))
        rate = (many - few) / (large["clock"] - small["clock"])
        peaks = f"{small['peak']:.0f} | {large['peak']:.0f} | {large['peak'] / small['peak']:.3f}"
        print(f"| {method} | {peaks} | {rate:.1f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="samples of each run (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, in turn (default: 3)")
    parser.add_argument("--method", action="append", choices=METHODS, help="methods (default: all)")
    parser.add_argument("--series", type=int, nargs="+", help="print times for these numbers of samples, nothing else")
    parser.add_argument("--many", type=int, help="also compare peak memory with this many samples")
    parser.add_argument("--model", type=Path, help="another network with one input 'images' of 1x3x320x320")
    parser.add_argument("--worker", choices=["ours", "both", "theirs", "alone"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            from rtx_placement import Detector, exported

            model = Path(folder) / "detector.onnx"
            onnx.save(exported(Detector, SIZE), model)
        print_machine()
        if options.series:
            print(f"onnxruntime {ort.__version__}, {options.rounds} rounds; seconds\n")
            series(model, options.series, options.rounds, options.method or list(METHODS))
            return
        print(f"onnxruntime {ort.__version__}, {options.samples} samples, {options.rounds} rounds; seconds, MiB\n")
        heads = [
            "method", "calibrate", "its CPU", "and quantize", "their CPU", "quantize_static", "its CPU",
            "calibrate faster", "in CPU", "both faster", "in CPU", "samples/s", "peak", "peak of quantize_static",
        ]  # fmt: skip
        print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
        for method in options.method or METHODS:
            compare(model, method, options.samples, options.rounds)
        if options.many:
            growth(model, options.samples, options.many, options.method or list(METHODS))


if __name__ == "__main__":
    main()
