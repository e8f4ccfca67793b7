"""Bytes and kernels of INT8 networks on TensorRT-RTX, ours against modelopt's on the same network and data.

Nothing runs on a GPU: counted is what the compiler wrote for an RTX 4090 (SM 89). Inputs and outputs are float32 in
every row. SQNR compares the Q/DQ network in float arithmetic (ONNX Runtime, optimisations off) with the float network
on two held-out random inputs; weights are random, so it says nothing about a trained network.

Needs the extras torch and tensorrt-rtx, and modelopt, for which the script makes an environment of its own. Run:

    python benchmarks/rtx_bytes.py --output docs/placement.md
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import tensorrt_rtx
import torch
from torch import nn

from accuracy.peers.tools import python_of
from calib.inputs import model_inputs
from calib.ranges import Ranges
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from common import put_between
from relu_deploy import graph as files
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.export.run import export_model
from relu_deploy.export.specs import parse_input
from relu_deploy.int8.drift import sqnr_db
from relu_deploy.int8.half import halve
from relu_deploy.int8.run import quantize
from relu_deploy.passes.run import rewrite
from rtx_placement import Detector, Residual

SM = "89"
MARKS = ("<!-- bytes -->", "<!-- end of bytes -->")


class Layer(nn.Module):
    """One layer of an encoder of BERT's plan, with ReLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.project = heads, nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        parts = [layer(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for layer in self.project[:3]]
        mixed = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(batch, tokens, width)
        x = self.norms[0](x + self.project[3](mixed))
        return self.norms[1](x + self.shrink(self.grow(x).relu()))


class Encoder(nn.Sequential):
    """An encoder of MiniLM-L6's size."""

    def __init__(self) -> None:
        super().__init__(*(Layer(384, 12) for _ in range(6)))


class Separable(nn.Sequential):
    """Depthwise and pointwise convolutions in turn, as mobile networks have them."""

    def __init__(self) -> None:
        parts: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU()]
        inside = 32
        for outside, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
            parts += [nn.Conv2d(inside, inside, 3, stride, 1, groups=inside), nn.ReLU()]
            parts += [nn.Conv2d(inside, outside, 1), nn.ReLU()]
            inside = outside
        super().__init__(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 100))


NETWORKS: dict[str, tuple[type[nn.Module], str]] = {
    "detector 320x320": (Detector, "x=1x3x320x320"),
    "residual 320x320": (Residual, "x=1x3x320x320"),
    "separable 224x224": (Separable, "x=1x3x224x224"),
    "encoder, 128 tokens": (Encoder, "x=1x128x384"),
}
OURS: dict[str, dict[str, str]] = {
    "ours": {},
    "ours, a weight scale for each channel": {"weight_granularity": "channel"},
    "ours, one weight scale a layer": {"weight_granularity": "tensor"},
    "ours, float32 float part": {"float_part": "fp32"},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with its data."""

    name: str
    model: onnx.ModelProto
    file: Path
    data: np.ndarray
    ranges: Ranges


@dataclasses.dataclass(frozen=True)
class Row:
    """What a file became."""

    network: str
    file: str
    int8: str
    kernels: int
    megabytes: float
    written: str
    sqnr: float | None


def make_case(name: str, folder: Path) -> Case:
    """Export a seeded network, calibrate it on 4 random samples, keep 2 more."""
    network, spec = NETWORKS[name]
    torch.manual_seed(0)
    file = folder / f"{name.split(maxsplit=1)[0].strip(',')}.onnx"
    export_model(network().eval(), [parse_input(spec)], file)
    model, _ = rewrite(files.load_model(file))
    files.save_model(model, file)
    specs = model_inputs(model)
    data = np.random.default_rng(0).normal(size=(6, *(specs[0].shape or ())[1:])).astype(np.float32)
    return Case(name, model, file, data, calibrate(model, open_source(data[:4], specs)))


def by_modelopt(case: Case, python: Path, method: str) -> onnx.ModelProto:
    """The network as modelopt quantises it, from the same samples."""
    data, output = case.file.with_suffix(".npy"), case.file.with_suffix(f".{method}.onnx")
    np.save(data, case.data[:4])
    command = [
        str(python), "-m", "modelopt.onnx.quantization", f"--onnx_path={case.file}", f"--calibration_data_path={data}",
        "--quantize_mode=int8", f"--calibration_method={method}", "--calibration_eps=cpu", f"--output_path={output}",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return onnx.load(output)


def in_half(case: Case) -> onnx.ModelProto:
    """The float network in float16."""
    lifted = onnx.shape_inference.infer_shapes(files.convert_opset(case.model, lowest=19))
    graph = files.import_graph(lifted)
    halve(graph, {name: (found.min, found.max) for name, found in case.ranges.tensors.items()})
    return files.export_graph(graph, lifted)


def files_of(case: Case, python: Path) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Every file that is compared."""
    yield "float32", case.model
    yield "float16", in_half(case)
    for method in ("max", "entropy"):
        yield f"modelopt, {method}", by_modelopt(case, python, method)
    for name, options in OURS.items():
        yield name, quantize(case.model, case.ranges, target="tensorrt-rtx", **options)[0]  # type: ignore[arg-type]


def sqnr(case: Case, model: onnx.ModelProto) -> float | None:
    """On the held-out samples; None where the outputs are equal."""
    signal, noise = 0.0, 0.0
    exact, other = open_session(case.model), open_session(model)
    for sample in case.data[4:]:
        feed = {exact.get_inputs()[0].name: sample[None]}
        wanted, got = (session.run(None, feed)[0].astype(np.float64) for session in (exact, other))
        signal, noise = signal + float(np.sum(wanted**2)), noise + float(np.sum((wanted - got) ** 2))
    return sqnr_db(signal, noise)


def compiled(case: Case, name: str, model: onnx.ModelProto) -> Row:
    """Build one file."""
    with tempfile.TemporaryDirectory() as folder:
        settings = BuildConfig(target="tensorrt-rtx", sm=(SM,))
        audit = get_backend("tensorrt-rtx").build(model, Path(folder) / "e.plan", settings).audit
    written = Counter(layer.output for layer in audit.linear)
    return Row(
        case.name, name, f"{audit.int8}/{len(audit.linear)}", audit.kernels or 0, (audit.bytes_moved or 0) / 1e6,
        ", ".join(f"{count} {kind}" for kind, count in written.most_common()), sqnr(case, model),
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """Markdown; the ratio is that of bytes to modelopt's with max, on the same network."""
    lines = [
        "| network | file | int8 | kernels | MB moved | of modelopt's | layers write | SQNR, dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = {row.network: row.megabytes for row in rows if row.file == "modelopt, max"}
    for row in rows:
        cells = (
            row.network, row.file, row.int8, str(row.kernels), f"{row.megabytes:.2f}",
            f"{row.megabytes / base[row.network]:.3f}", row.written, "-" if row.sqnr is None else f"{row.sqnr:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table; with ``--output`` also put it between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", choices=NETWORKS, action="append", help="only this one; may be repeated")
    parser.add_argument("--work", type=Path, help="where networks and modelopt's environment are kept")
    parser.add_argument("--output", type=Path, help="page with the marks of this table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        python = python_of("modelopt", folder / "venvs")
        rows = []
        for name in arguments.network or NETWORKS:
            case = make_case(name, folder)
            for file, model in files_of(case, python):
                rows.append(compiled(case, file, model))
                print(rows[-1], flush=True)
    command = shlex.join(
        ["python", "benchmarks/rtx_bytes.py", *(["--output", str(arguments.output)] if arguments.output else [])]
    )
    versions = (
        f"`{command}`; SM {SM}, tensorrt_rtx {tensorrt_rtx.__version__}, nvidia-modelopt 0.47.0, torch "
        f"{torch.__version__}, onnx {onnx.__version__}, onnxruntime {ort.__version__}, built on {platform.machine()} "
        f"{platform.system()} without a GPU."
    )
    text = f"{versions}\n\n{table(rows)}"
    print(text)
    if arguments.output is not None:
        put_between(arguments.output, MARKS, text)


if __name__ == "__main__":
    sys.exit(main())
