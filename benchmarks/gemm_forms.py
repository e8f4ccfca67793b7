"""MatMul + Add against Gemm between two Reshapes, for TensorRT-RTX: kernels and bytes moved, read from the plans.

What is counted is what the compiler wrote for an RTX 4090 (SM 89); nothing runs on a GPU. The networks have random
weights. `relu_deploy.passes.gemm` follows from this table: products of two axes become Gemm, those of more stay.

Needs the extras torch and tensorrt-rtx, and transformers. Run:

    python benchmarks/gemm_forms.py
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import tensorrt_rtx
import torch
from torch import nn
from transformers import BertConfig, BertModel

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy import graph as files
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.export.run import export_model
from relu_deploy.export.specs import parse_input
from relu_deploy.int8.run import quantize
from relu_deploy.passes.gemm import products_to_gemm
from relu_deploy.passes.shapes import annotate

WIDTH, INNER, TOKENS = 256, 1024, 128


class FFN(nn.Module):
    """Residual blocks of LayerNorm and two products with a ReLU in between: half of a transformer."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(WIDTH, INNER) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(INNER, WIDTH) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return x


class Encoder(nn.Module):
    """A small BERT with ReLU, from embeddings on."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=64, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=INNER,
            hidden_act="relu", attn_implementation="eager",
        )  # fmt: skip
        self.encoder = BertModel(config).encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)[0]


class MLP(nn.Module):
    """Products of two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def exported(network: nn.Module, shape: str) -> onnx.ModelProto:
    """A network with seeded weights as ONNX, products spelled as MatMul and Add."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_model(network.eval(), [parse_input(f"x={shape}")], path)
        return products_spelled_out(files.load_model(path))


def products_spelled_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every Gemm of ``nn.Linear`` as the MatMul and Add that exporters write for more axes."""
    nodes = []
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Gemm":
            nodes.append(node)
            continue
        matrix = onnx.numpy_helper.to_array(weights[node.input[1]])
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        name = f"{node.name}/matrix"
        model.graph.initializer.append(onnx.numpy_helper.from_array(matrix.T if transposed else matrix, name))
        nodes.append(onnx.helper.make_node("MatMul", [node.input[0], name], [f"{name}/y"], node.name))
        nodes.append(onnx.helper.make_node("Add", [f"{name}/y", node.input[2]], node.output, f"{node.name}/add"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def as_gemm(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with a Gemm for every product with a bias."""
    graph = files.import_graph(model)
    annotate(graph, model)
    products_to_gemm(graph, rows=True)
    return files.export_graph(graph, model)


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network in float16: weights, inputs and outputs."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    for tensor in half.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for node in half.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.FLOAT16
    del half.graph.value_info[:]
    return half


def int8(model: onnx.ModelProto, granularity: str) -> onnx.ModelProto:
    """Calibrated on two random samples, quantised for TensorRT-RTX."""
    (spec,) = model_inputs(model)
    data = np.random.default_rng(0).normal(size=(2, *(spec.shape or ())[1:])).astype(np.float32)
    ranges = calibrate(model, open_source(data, (spec,)))
    return quantize(model, ranges, target="tensorrt-rtx", weight_granularity=granularity, float_part="fp32")[0]


def row(name: str, form: str, number: str, model: onnx.ModelProto) -> str:
    """Build one file and read what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        config = BuildConfig(target="tensorrt-rtx", sm=("89",))
        audit = get_backend("tensorrt-rtx").build(model, Path(folder) / "e.plan", config).audit
    assert audit.bytes_moved is not None
    fused = sum(layer.relu is True for layer in audit.linear)
    return (
        f"| {name} | {number} | {form} | {audit.int8}/{len(audit.linear)} | {audit.kernels} "
        f"| {audit.bytes_moved / 1e6:.2f} | {fused} |"
    )


def rows() -> Iterator[str]:
    """Every network in every number format, in both forms."""
    torch.manual_seed(0)
    subjects = {
        "MLP, 2 axes": (MLP(), f"{TOKENS}x{WIDTH}"),
        "FFN, 3 axes": (FFN(), f"1x{TOKENS}x{WIDTH}"),
        "BERT, 3 axes": (Encoder(), f"1x{TOKENS}x{WIDTH}"),
    }
    for name, (network, shape) in subjects.items():
        apart = exported(network, shape)
        for form, model in (("MatMul + Add", apart), ("Gemm", as_gemm(apart))):
            assert form == "Gemm" or not any(node.op_type == "Gemm" for node in model.graph.node)
            yield row(name, form, "float32", model)
            yield row(name, form, "float16", to_half(model))
            for granularity in ("channel", "tensor"):
                yield row(name, form, f"int8, scale a {granularity}", int8(model, granularity))


def main() -> None:
    """Build everything and print the table."""
    print(
        f"`python benchmarks/gemm_forms.py`; SM 89, tensorrt_rtx {tensorrt_rtx.__version__}, "
        f"torch {torch.__version__}, onnx {onnx.__version__}, "
        f"built on {platform.machine()} {platform.system()} without a GPU.\n"
    )
    print("| network | numbers | products as | int8 | kernels | MB moved | relu fused |\n|---|---|---|---|---|---|---|")
    for line in rows():
        print(line, flush=True)


if __name__ == "__main__":
    main()
