"""Which tools are compared, with which settings, and the environments they need."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LINEAR = ["Conv", "ConvTranspose", "MatMul", "Gemm"]

# Environment -> what pip installs. modelopt needs its own onnx, and a C++ compiler for what cppimport builds.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "ort": ("onnxruntime==1.31.1", "onnx==1.23.2", "sympy"),
    "modelopt": (
        "torch==2.13.0", "nvidia-modelopt==0.47.0", "onnx==1.21.0", "onnxruntime", "onnx-graphsurgeon",
        "onnxconverter-common", "onnxslim", "lief", "cppimport", "polygraphy", "onnxscript",
    ),
    "nncf": ("nncf==3.4.0", "onnx", "onnxruntime==1.31.1", "openvino"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tool:
    """One way to quantise.

    Attributes:
        name: In the table.
        environment: A key of ``ENVIRONMENTS``; ``ours`` runs in this one.
        settings: For the script, ``quantize_<environment>.py``.
        default: As a user gets it who sets nothing.
        symmetric: int8 with zero point 0 for activations, which is what TensorRT takes.
        integer_kernels: How it is evaluated: False computes Q/DQ in float arithmetic, as ONNX defines them, for files
            that are not meant for ONNX Runtime's kernels.
        only: Tasks it is for; empty for all.
    """

    name: str
    environment: str
    settings: Mapping[str, Any]
    default: bool = False
    symmetric: bool = False
    integer_kernels: bool = True
    only: tuple[str, ...] = ()


def tools() -> dict[str, Tool]:
    """All, by name, in the order of the table."""
    listed = [*_ours(), *_ort(), *_nncf(), *_modelopt()]
    return {tool.name: tool for tool in listed}


def _ours() -> list[Tool]:
    listed = [
        Tool("relu-deploy ort", "ours", {"target": "ort"}, default=True),
        Tool("relu-deploy rtx", "ours", {"target": "tensorrt-rtx"}, True, symmetric=True, integer_kernels=False),
    ]
    for grain in ("channel", "tensor"):  # no defaults: what one scale for a layer costs
        settings = {"target": "tensorrt-rtx", "weight_granularity": grain}
        name = f"relu-deploy rtx, weights per {grain}"
        listed.append(Tool(name, "ours", settings, symmetric=True, integer_kernels=False))
    return listed


def _ort() -> list[Tool]:
    tuned = {"method": "MinMax"}
    return [
        Tool("ORT default", "ort", {}, default=True),
        Tool("ORT u8s8 channel, all operators, MinMax", "ort", tuned),
        *(
            Tool(f"ORT u8s8 channel, linear only, {method}", "ort", {**tuned, "op_types": LINEAR, "method": method})
            for method in ("MinMax", "Entropy", "Percentile")
        ),
        # Its adjustment of weights for 32-bit biases fails on magika; on ocr-rec and fashion-dw it changed nothing.
        Tool(
            "ORT u8s8 channel, linear only, MinMax, weights not adjusted",
            "ort",
            {**tuned, "op_types": LINEAR, "extra": {"QDQDisableWeightAdjustForInt32Bias": True}},
            only=("magika",),
        ),
    ]


def _nncf() -> list[Tool]:
    listed = [Tool("NNCF default", "nncf", {}, default=True)]
    for preset, fast in (("mixed", True), ("mixed", False), ("performance", True)):
        settings = {"prepare": True, "preset": preset, "fast": fast}
        listed.append(Tool(f"NNCF prepared, {preset}{'' if fast else ', slow bias'}", "nncf", settings))
    settings = {"prepare": True, "preset": "mixed", "fast": True, "transformer": True}
    return [*listed, Tool("NNCF prepared, mixed, transformer", "nncf", settings, only=("minilm", "bert-relu"))]


def _modelopt() -> list[Tool]:
    listed = []
    for method, simplify in itertools.product(("max", "entropy"), (False, True)):
        name, settings = f"modelopt {method}", {"method": method, "simplify": simplify}
        if not simplify:
            listed.append(Tool(name, "modelopt", settings, default=True, symmetric=True))
            continue
        listed.append(Tool(f"{name}, simplified", "modelopt", settings, symmetric=True))
        name = f"{name}, simplified (float arithmetic)"
        listed.append(Tool(name, "modelopt", settings, symmetric=True, integer_kernels=False))
    return listed


def python_of(environment: str, folder: Path) -> Path:
    """The interpreter of an environment, made now where it is not there yet."""
    if environment == "ours":
        return Path(sys.executable)
    target = folder / environment
    python = target / "bin" / "python"
    if not (target / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(target)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *ENVIRONMENTS[environment]], check=True)
        (target / "ready").write_text("\n".join(ENVIRONMENTS[environment]))
    return python
