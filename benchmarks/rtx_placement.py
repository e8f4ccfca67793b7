"""Kernels, bytes and error of INT8 networks under alternative placements of Q/DQ, read from the RTX compiler's plans.

Nothing runs on a GPU: counted is what the compiler wrote for an RTX 4090 (SM 89). The error is that of the Q/DQ network
in float arithmetic (ONNX Runtime, optimisations off) on random inputs, with random weights, so it ranks placements and
says nothing about a trained network.

Needs the extras torch and tensorrt-rtx. Run:

    python benchmarks/rtx_placement.py --output docs/placement.md
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import tensorrt_rtx
import torch
from onnx import numpy_helper
from torch import nn

from calib.inputs import model_inputs
from calib.ranges import Ranges
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy import graph as files
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.export.run import export_model
from relu_deploy.export.specs import parse_input
from relu_deploy.int8.formats import number_format
from relu_deploy.int8.place import Placement, place
from relu_deploy.int8.write import write
from relu_deploy.passes.run import rewrite

SM = "89"


def conv(inside: int, outside: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU."""
    layer = nn.Conv2d(inside, outside, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    norm = nn.BatchNorm2d(outside)
    nn.init.uniform_(norm.weight, 0.5, 1.5)  # channels of unlike size, as training leaves them
    nn.init.normal_(norm.bias, 0, 0.2)
    return nn.Sequential(layer, norm, nn.ReLU())


class Bottleneck(nn.Module):
    """Two convolutions, and their input added where asked for."""

    def __init__(self, width: int, *, shortcut: bool) -> None:
        super().__init__()
        self.body, self.shortcut = nn.Sequential(conv(width, width, 1), conv(width, width)), shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class CSP(nn.Module):
    """Cross-stage partial layer: two branches, concatenated."""

    def __init__(self, inside: int, outside: int, depth: int, *, shortcut: bool = True) -> None:
        super().__init__()
        half = outside // 2
        self.left, self.right, self.join = conv(inside, half, 1), conv(inside, half, 1), conv(2 * half, outside, 1)
        self.blocks = nn.Sequential(*(Bottleneck(half, shortcut=shortcut) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(torch.cat((self.blocks(self.left(x)), self.right(x)), 1))


class SPP(nn.Module):
    """Spatial pyramid pooling: the input and three max-pools of it, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = conv(width, width // 2, 1), conv(width * 2, width, 1)
        self.pools = nn.ModuleList(nn.MaxPool2d(size, 1, size // 2) for size in (5, 9, 13))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        return self.leave(torch.cat((x, *(pool(x) for pool in self.pools)), 1))


class Head(nn.Module):
    """Decoupled head of one level: boxes, objectness and classes."""

    def __init__(self, inside: int, width: int, classes: int) -> None:
        super().__init__()
        self.stem = conv(inside, width, 1)
        self.classify = nn.Sequential(conv(width, width), conv(width, width), nn.Conv2d(width, classes, 1))
        self.locate = nn.Sequential(conv(width, width), conv(width, width))
        self.box, self.objectness = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        located = self.locate(x)
        scores = self.objectness(located).sigmoid(), self.classify(x).sigmoid()
        return torch.cat((self.box(located), *scores), 1).flatten(2)


class Detector(nn.Module):
    """A network of YOLOX-S's plan and size: CSPDarknet, SPP, PAFPN and three decoupled heads, ReLU throughout."""

    def __init__(self, width: int = 32, classes: int = 80) -> None:
        super().__init__()
        w = width
        self.stem = conv(12, w)
        self.dark2 = nn.Sequential(conv(w, 2 * w, 3, 2), CSP(2 * w, 2 * w, 1))
        self.dark3 = nn.Sequential(conv(2 * w, 4 * w, 3, 2), CSP(4 * w, 4 * w, 3))
        self.dark4 = nn.Sequential(conv(4 * w, 8 * w, 3, 2), CSP(8 * w, 8 * w, 3))
        self.dark5 = nn.Sequential(conv(8 * w, 16 * w, 3, 2), SPP(16 * w), CSP(16 * w, 16 * w, 1, shortcut=False))
        self.lateral5, self.up4 = conv(16 * w, 8 * w, 1), CSP(16 * w, 8 * w, 1, shortcut=False)
        self.lateral4, self.up3 = conv(8 * w, 4 * w, 1), CSP(8 * w, 4 * w, 1, shortcut=False)
        self.down3, self.out4 = conv(4 * w, 4 * w, 3, 2), CSP(8 * w, 8 * w, 1, shortcut=False)
        self.down4, self.out5 = conv(8 * w, 8 * w, 3, 2), CSP(16 * w, 16 * w, 1, shortcut=False)
        self.heads = nn.ModuleList(Head(factor * w, 4 * w, classes) for factor in (4, 8, 16))
        self.upsample = nn.Upsample(scale_factor=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat((x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]), 1)
        c3 = self.dark3(self.dark2(self.stem(x)))
        c4 = self.dark4(c3)
        p5 = self.lateral5(self.dark5(c4))
        p4 = self.lateral4(self.up4(torch.cat((self.upsample(p5), c4), 1)))
        f3 = self.up3(torch.cat((self.upsample(p4), c3), 1))
        f4 = self.out4(torch.cat((self.down3(f3), p4), 1))
        f5 = self.out5(torch.cat((self.down4(f4), p5), 1))
        return torch.cat([head(level) for head, level in zip(self.heads, (f3, f4, f5), strict=True)], 2)


class Block(nn.Module):
    """Basic block of a residual network: the sum stands before the last ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.act = conv(width, width), conv(width, width)[:2], nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.second(self.first(x)) + x)


class Residual(nn.Module):
    """A small residual network: strided stem, MaxPool, six basic blocks in two widths, classifier."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.stage1 = nn.Sequential(*(Block(width) for _ in range(3)))
        self.stage2 = nn.Sequential(conv(width, 2 * width, 3, 2), *(Block(2 * width) for _ in range(3)))
        self.classify = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


# What is varied: how a placement is changed. A change gets the graph and the placement, and returns another one.
Change = Callable[[gs.Graph, Placement], Placement]


def changed(
    placement: Placement, *, add: Iterable[tuple[str, str]] = (), drop: Iterable[str] = (),
    share: Iterable[Iterable[str]] = ()
) -> Placement:  # fmt: skip
    """A placement with more (tensor, reader) pairs, fewer tensors, more shared scales."""
    uses = {name: set(readers or ()) for name, readers in placement.uses.items()}
    for tensor, reader in add:
        uses.setdefault(tensor, set()).add(reader)
    for tensor in drop:
        uses.pop(tensor, None)
    groups = merged([*placement.groups, *map(frozenset, share)])
    return dataclasses.replace(
        placement,
        uses={name: frozenset(readers) for name, readers in uses.items()},
        groups=tuple(group & uses.keys() for group in groups if len(group & uses.keys()) > 1),
    )


def merged(groups: list[frozenset[str]]) -> list[frozenset[str]]:
    """Groups that overlap, joined."""
    joined: list[frozenset[str]] = []
    for group in groups:
        touching = [other for other in joined if other & group]
        joined = [other for other in joined if not other & group]
        joined.append(group.union(*touching))
    return joined


def around(op: str, *, before: bool, after: bool) -> Change:
    """Q/DQ before and after every operator ``op`` whose output a quantised layer reads, with one scale."""

    def change(graph: gs.Graph, placement: Placement) -> Placement:
        nodes = [n for n in graph.nodes if n.op == op and n.inputs[0].inputs and ahead_of_layers(n, placement)]
        data = {n.name: [t for t in n.inputs if t.inputs] if op == "Concat" else n.inputs[:1] for n in nodes}
        outputs = [node.outputs[0] for node in nodes]
        add = [(t.name, node.name) for node in nodes for t in data[node.name] if before]
        add += [(out.name, reader.name) for out in outputs for reader in out.outputs if after and reader.op == "Concat"]
        share = [[node.outputs[0].name, *(t.name for t in data[node.name])] for node in nodes] if before else []
        return changed(placement, add=add, drop=() if after else [out.name for out in outputs], share=share)

    return change


def ahead_of_layers(node: gs.Node, placement: Placement) -> bool:
    """Whether what a node writes reaches a quantised layer, or a Concat, at once."""
    output = node.outputs[0]
    return any(r.op == "Concat" or r.name in (placement.uses.get(output.name) or ()) for r in output.outputs)


def shortcuts(which: str) -> Change:
    """Which operands of a residual Add are quantised.

    ``none``; ``both``; the ``shortcut`` beside an operand that a convolution writes; those ``quantised`` for a layer
    anyway.
    """

    def change(graph: gs.Graph, placement: Placement) -> Placement:
        adds = [n for n in graph.nodes if n.op == "Add" and all(isinstance(t, gs.Variable) for t in n.inputs)]
        names = {node.name for node in adds}
        rest = {t: (readers or frozenset()) - names for t, readers in placement.uses.items()}
        bare = dataclasses.replace(placement, uses={t: readers for t, readers in rest.items() if readers})
        pairs = [(t.name, node.name) for node in adds for t in node.inputs]
        written = {t.name for node in adds for t in node.inputs if t.inputs and t.inputs[0].op == "Conv"}
        beside = {node.name for node in adds if any(t.name in written for t in node.inputs)}
        chosen = {
            "none": [],
            "both": pairs,
            "shortcut": [(t, node) for t, node in pairs if node in beside and t not in written],
            "quantised": [(t, node) for t, node in pairs if t in bare.uses],
        }
        return changed(bare, add=chosen[which])

    return change


def together(*changes: Change) -> Change:
    """Several changes, one after the other."""

    def change(graph: gs.Graph, placement: Placement) -> Placement:
        for one in changes:
            placement = one(graph, placement)
        return placement

    return change


CHANGES: dict[str, Change] = {
    "default": lambda _, placement: placement,
    "Concat: inputs and output, one scale": around("Concat", before=True, after=True),
    "Concat: inputs only, one scale": around("Concat", before=True, after=False),
    "MaxPool: before and after, one scale": around("MaxPool", before=True, after=True),
    "Resize: before and after, one scale": around("Resize", before=True, after=True),
    "MaxPool and Resize before, Concat both, one scale": together(
        around("Concat", before=True, after=True), around("MaxPool", before=True, after=True),
        around("Resize", before=True, after=True)),
    "Add: neither operand": shortcuts("none"),
    "Add: shortcut beside a convolution": shortcuts("shortcut"),
    "Add: what is quantised for a layer anyway": shortcuts("quantised"),
    "Add: both operands": shortcuts("both"),
}  # fmt: skip


NETWORKS: dict[str, type[nn.Module]] = {"detector": Detector, "residual": Residual}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A float network with its ranges and held-out samples."""

    name: str
    model: onnx.ModelProto
    ranges: Ranges
    held: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """What one file became."""

    network: str
    floats: str
    weights: str
    placement: str
    int8: str
    kernels: int
    megabytes: float
    fused: int
    written: str
    sqnr: float | None


def subject(name: str, model: onnx.ModelProto) -> Subject:
    """Calibrate a network on 4 random samples and hold 2 out."""
    rewritten, _ = rewrite(model)
    (spec,) = model_inputs(rewritten)
    data = np.random.default_rng(0).normal(size=(6, *(spec.shape or ())[1:])).astype(np.float32)
    ranges = calibrate(rewritten, open_source(data[:4], (spec,)))
    return Subject(name, rewritten, ranges, [sample[None] for sample in data[4:]])


def subject_of_file(path: Path, calibration: str, held: str, preprocess: str | None) -> Subject:
    """A trained network with data of its own."""
    rewritten, _ = rewrite(files.load_model(path))
    specs = model_inputs(rewritten)
    ranges = calibrate(rewritten, open_source(calibration, specs, preprocess=preprocess))
    samples = [next(iter(sample.feeds.values())) for sample in open_source(held, specs, preprocess=preprocess)]
    return Subject(path.stem, rewritten, ranges, samples)


def exported(network: type[nn.Module], size: int) -> onnx.ModelProto:
    """A network with seeded weights as ONNX."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_model(network().eval(), [parse_input(f"images=1x3x{size}x{size}")], path)
        return files.load_model(path)


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network in float16: weights, inputs and outputs. Operands that ONNX wants in float32 (Resize) stay."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    fixed = {name for node in half.graph.node if node.op_type == "Resize" for name in node.input[1:]}
    for tensor in half.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in fixed:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del half.graph.value_info[:]
    return half


def quantized(case: Subject, name: str, *, half: bool, granularity: str) -> onnx.ModelProto | None:
    """The INT8 network with a changed placement; None where the change changes nothing in this network."""
    number = number_format("tensorrt-rtx", weight_granularity=granularity)
    source = to_half(case.model) if half else case.model
    source = onnx.shape_inference.infer_shapes(files.convert_opset(source, lowest=19 if half else 13))
    graph = files.import_graph(source)
    bounds = {name: (r.min, r.max) for name, r in case.ranges.tensors.items() if name in graph.tensors()}
    usual = place(graph, bounds, number)
    placement = CHANGES[name](graph, usual)
    if name != "default" and placement == usual:
        return None
    write(graph, placement, bounds, number)
    model = files.export_graph(graph, source)
    files.check_model(model, case.name)
    return model


def run(model: onnx.ModelProto, samples: list[np.ndarray]) -> np.ndarray:
    """First output for each sample, float64, graph optimisations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    kind = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    return np.stack([session.run(None, {name: sample.astype(kind)})[0] for sample in samples]).astype(np.float64)


def row(case: Subject, model: onnx.ModelProto, wanted: np.ndarray | None, *labels: str) -> Row:
    """Build one file and read what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        config = BuildConfig(target="tensorrt-rtx", sm=(SM,))
        audit = get_backend("tensorrt-rtx").build(model, Path(folder) / "e.plan", config).audit
    assert audit.kernels is not None
    assert audit.bytes_moved is not None
    sqnr = None
    if wanted is not None:
        noise = wanted - run(model, case.held)
        sqnr = float(10 * np.log10(np.sum(wanted**2) / np.sum(noise**2)))
    written = ", ".join(f"{n} {kind}" for kind, n in Counter(layer.output for layer in audit.linear).most_common())
    return Row(
        case.name, labels[0], labels[1], labels[2], f"{audit.int8}/{len(audit.linear)}", audit.kernels,
        audit.bytes_moved / 1e6, sum(layer.relu is True for layer in audit.linear), written, sqnr,
    )  # fmt: skip


def rows(case: Subject, names: Iterable[str]) -> Iterable[Row]:
    """Every combination for one network, printed as it comes."""
    wanted = run(case.model, case.held)
    for half in (False, True):
        floats = "fp16" if half else "fp32"
        yield row(case, to_half(case.model) if half else case.model, None, floats, "-", "no INT8")
        for granularity in ("channel", "tensor"):
            for name in names:
                if (model := quantized(case, name, half=half, granularity=granularity)) is not None:
                    yield row(case, model, wanted, floats, granularity, name)


def table(found: list[Row]) -> str:
    """Markdown."""
    heads = ("network", "float part", "weights", "placement", "int8", "kernels", "MB moved", "relu fused",
             "layers write", "SQNR, dB")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in found:
        sqnr = "-" if r.sqnr is None else f"{r.sqnr:.1f}"
        lines.append(
            f"| {r.network} | {r.floats} | {r.weights} | {r.placement} | {r.int8} | {r.kernels} | {r.megabytes:.2f} "
            f"| {r.fused} | {r.written} | {sqnr} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Build everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=320, help="side of the inputs (default: 320)")
    parser.add_argument("--network", action="append", choices=sorted(NETWORKS), help="networks (default: all)")
    parser.add_argument("--model", type=Path, help="a trained ONNX network of one input instead; needs the next two")
    parser.add_argument("--calib", help="its calibration data")
    parser.add_argument("--held", help="held-out data for its SQNR")
    parser.add_argument("--preprocess", help="how images become its input")
    parser.add_argument("--only", action="append", choices=sorted(CHANGES), help="placements to build (default: all)")
    parser.add_argument("--output", type=Path, help="also replace the table in this Markdown file")
    options = parser.parse_args()
    found = []
    if options.model is not None:
        subjects = iter([subject_of_file(options.model, options.calib, options.held, options.preprocess)])
    else:
        names = options.network or NETWORKS
        size = options.size
        subjects = (subject(f"{name} {size}x{size}", exported(NETWORKS[name], size)) for name in names)
    for one in (one for case in subjects for one in rows(case, options.only or CHANGES)):
        print(one, flush=True)
        found.append(one)
    header = (
        f"`python benchmarks/rtx_placement.py {shlex.join(sys.argv[1:])}`; SM {SM}, tensorrt_rtx "
        f"{tensorrt_rtx.__version__}, torch {torch.__version__}, onnx {onnx.__version__}, "
        f"onnxruntime {ort.__version__}, built on {platform.machine()} {platform.system()} without a GPU."
    )
    text = f"{header}\n\n{table(found)}\n"
    print(text)
    if options.output is not None:
        before, _, rest = options.output.read_text().partition("<!-- table -->\n")
        _, _, after = rest.partition("<!-- end of table -->")
        options.output.write_text(f"{before}<!-- table -->\n{text}<!-- end of table -->{after}")


if __name__ == "__main__":
    main()
