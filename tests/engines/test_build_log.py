from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relu_deploy.engines.log import read_log

ENTRY = (
    "Name: conv 1_myl0_3, LayerType: correlation, "
    "Inputs: [ { Name: a, Dimensions: [1,8,-1,4], Strides: [8,1], StrideOrder: [3,0], Datatype: Int8, Format: x }], "
    "Constants: [ { Name: w, Dimensions: [4,8,1,1], Strides: [8,1], StrideOrder: [3,0], Datatype: Int8, Format: x }, "
    "{ Name: __mye1_const-lit-in_myl0, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: y }], "
    "Outputs: [ { Name: b, Dimensions: [1,4,8,4], Strides: [8,1], StrideOrder: [3,0], Datatype: Half, Format: z }], "
    "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: conv 1]\x1e[ONNX Layer: a_dq]"
)
SIGNAL = (
    "Name: s_myl0_0, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 1, Metadata: "
)
MESSAGES = [
    "Parsing node: conv 1 [Conv]",
    "Parsing node: broken",
    f"Layers:\n{SIGNAL}\n{ENTRY}\n\nI/O Tensors:\n Name: a",
]


def test_reads_nodes_and_kernels() -> None:
    log = read_log(MESSAGES, errors=["bad"])
    assert log.nodes == {"conv 1": "Conv"}
    assert log.errors == ("bad",)
    (kernel,) = log.kernels
    assert (kernel.name, kernel.layers) == ("conv 1", ("conv 1", "a_dq"))
    assert kernel.reads[0].dims == (1, 8, "?", 4)
    assert [operand.name for operand in kernel.reads] == ["a", "w"]
    (op,) = kernel.linear
    assert (op.data, op.weight, op.output, op.fused) == ("int8", "int8", "fp16", None)


def test_a_residual_is_no_weight_and_a_factor_is_none_either() -> None:
    residual = "{ Name: r, Dimensions: [1,4,8,4], Strides: [8,1], StrideOrder: [3,0], Datatype: Float, Format: x }"
    added = ENTRY.replace("Format: x }], Constants", f"Format: x }}, {residual}], Constants", 1)
    (op,) = read_log([f"Layers:\n{added}"]).kernels[0].linear
    assert (op.data, op.weight) == ("int8", "int8")
    # A product of two activations: what is stored beside them is its alpha.
    computed = added.replace("Dimensions: [4,8,1,1]", "Dimensions: [1]")
    (op,) = read_log([f"Layers:\n{computed}"]).kernels[0].linear
    assert (op.data, op.weight) == ("int8", "fp32")


def test_a_log_that_ends_early_has_no_kernels() -> None:
    assert read_log(MESSAGES[:2]).kernels == ()


@given(st.integers(0, len(ENTRY)), st.text(max_size=30), st.integers(0, 40))
def test_damage_never_raises(at: int, inserted: str, removed: int) -> None:
    damaged = ENTRY[:at] + inserted + ENTRY[at + removed :]
    assert len(read_log([f"Layers:\n{damaged}"]).kernels) <= 1 + inserted.count("\nName: ")
