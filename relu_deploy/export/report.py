"""What an export did; plain data, without torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from relu_deploy.tensors import TensorSpec


@dataclasses.dataclass(frozen=True)
class OutputCheck:
    """How well one output agrees.

    Attributes:
        name: In the ONNX file.
        dtype: Of its values.
        worst: Largest ``|onnxruntime - torch|`` over all samples.
        limit: What was allowed there, ``atol + rtol * max |torch|``; integers and booleans must be equal, so 0.
    """

    name: str
    dtype: str
    worst: float
    limit: float


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was exported, and how far it agrees.

    Attributes:
        path: The file.
        source: The model, as it was named.
        exporter: ``dynamo`` or ``torchscript``.
        opset: Of the file.
        ir_version: Of the file.
        inputs: Of the file.
        outputs: Each with its worst error against torch.
        samples: How many sets of inputs were compared.
        notes: What a user should know: dropped outputs, unused inputs, sizes that were not tried, the tracer's
            warnings.
    """

    path: Path
    source: str
    exporter: str
    opset: int
    ir_version: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[OutputCheck, ...]
    samples: int
    notes: tuple[str, ...]
