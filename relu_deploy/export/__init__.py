"""A torch model to an ONNX file that was shown to compute the same. Needs the ``torch`` extra (imported when used).

``specs`` says what the inputs are, ``source`` finds the model (``weights`` and ``pt2`` read untrusted files),
``convert`` runs torch's exporters, ``compare`` holds torch against ONNX Runtime, ``run`` puts them together.
"""

from __future__ import annotations

from relu_deploy.export.report import ExportReport, OutputCheck
from relu_deploy.export.run import DEFAULT_OPSET, export_model
from relu_deploy.export.source import load_factory
from relu_deploy.export.specs import DynamicAxis, ExampleInput

__all__ = [
    "DEFAULT_OPSET",
    "DynamicAxis",
    "ExampleInput",
    "ExportReport",
    "OutputCheck",
    "export_model",
    "load_factory",
]
