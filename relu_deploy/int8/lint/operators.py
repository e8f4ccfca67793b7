"""Rules about operators and versions that a target does not know."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from relu_deploy import graph as files
from relu_deploy.errors import ModelError
from relu_deploy.int8.lint.finding import Finding, like_rtx
from relu_deploy.int8.lint.network import CONTRIB, OWN_DOMAINS, Network
from relu_deploy.targets import Target

# Integer arithmetic of ONNX itself.
_INTEGER = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
# Those that --fix spells with Q/DQ: relu_deploy/int8/lint/fix_operators.py.
SPELLED = (
    "QLinearConv", "QLinearMatMul", "QGemm", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu",
    "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearConcat", "QLinearSoftmax",
)  # fmt: skip


def integer_operators(net: Network, target: Target) -> Iterator[Finding]:
    """``integer-operator``: QLinearConv and its like, which quantisers write for ONNX Runtime (QOperator format)."""
    if target == "ort":
        return
    for node in net.nodes:
        ours = node.domain in OWN_DOMAINS and node.op_type in _INTEGER
        if ours or (node.domain == CONTRIB and node.op_type.startswith("Q") and node.op_type != "QuantizeLinear"):
            dynamic = node.op_type in ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
            yield Finding(
                "integer-operator", node.name, "rejected",
                like_rtx(target, f"the parser does not know {node.op_type}"),
                "quantise statically with Q/DQ" if dynamic else "spell it with Q/DQ",
                automatic=node.op_type in SPELLED,
            )  # fmt: skip


def foreign_operators(net: Network, target: Target) -> Iterator[Finding]:
    """``foreign-operator``: other operators of ONNX Runtime's own.

    The parser looks at the name only: one that ONNX has as well (Gelu, QuantizeLinear) is taken for ONNX's.
    """
    if target == "ort":
        return
    for node in net.nodes:
        known = onnx.defs.has(node.op_type) or node.op_type.startswith("Q")
        if node.domain == CONTRIB and not known:
            yield Finding(
                "foreign-operator", node.name, "rejected",
                like_rtx(target, f"the parser does not know {CONTRIB}.{node.op_type}"),
                "export or quantise without ONNX Runtime's graph optimisations",
            )  # fmt: skip


def versions(net: Network, target: Target) -> Iterator[Finding]:
    """``version``: opset or IR newer than the runtime reads. TensorRT-RTX reads every version."""
    if target != "ort":
        return
    ir = net.model.ir_version
    if ir > files.MAX_IR_VERSION:
        yield Finding(
            "version", "", "rejected", f"IR version {ir}; onnxruntime 1.31 reads up to {files.MAX_IR_VERSION}",
            "a lower IR version, which is enough where nothing newer is used", automatic=True,
        )  # fmt: skip
    if net.opset > files.MAX_OPSET:
        yield Finding(
            "version", "", "rejected", f"opset {net.opset}; onnxruntime 1.31 reads up to {files.MAX_OPSET}",
            "export with a lower opset", automatic=True,
        )  # fmt: skip


def validity(net: Network, target: Target) -> Iterator[Finding]:
    """``invalid``: what onnx's checker refuses: scales of another type, float16 Q/DQ before opset 19, and so on."""
    try:
        files.check_model(net.model, "the file")
    except ModelError as error:
        ort = target == "ort"
        yield Finding(
            "invalid", "", "rejected" if ort else "note",
            str(error) + ("" if ort else f"; {like_rtx(target, 'the parser does not check that')}"),
            "write the file as ONNX wants it, of an opset that has these types",
        )  # fmt: skip
