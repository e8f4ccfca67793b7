"""ONNX files in and out: safe loading, whole writing, names, opset and IR limits.

A file is untrusted: its size is bounded, it is parsed and never executed, and external data is read only from inside
the folder of the model.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from pathlib import Path

import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import external_data_helper
from onnx.version_converter import ConvertError

from calib.errors import first_line
from calib.files import atomic_path, behind_links, check_writable, require_file
from calib.model import PROTOBUF_LIMIT, STANDARD_DOMAINS, all_nodes, fits_one_message, opset, tensor_bytes
from relu_deploy import ops
from relu_deploy.distinct import make_distinct
from relu_deploy.errors import FileError, ModelError, NetworkWarning
from relu_deploy.order import sort_nodes
from relu_deploy.untrusted import check_parsed

# Far above any network that runs on one card, far below what a forged length could make us allocate.
MAX_EXTERNAL_BYTES = 1 << 36
# The newest that onnxruntime 1.31 reads, as tests/test_limits.py asks it; onnx 1.23 writes newer ones. TensorRT-RTX 1.7
# reads any version of IR and opset, as far as it knows the operators.
MAX_IR_VERSION = 13
MAX_OPSET = 26
MIN_OPSET = 7
# The first IR version with local functions, and the first whose initialisers need not be inputs of the graph too.
_FUNCTION_IR = 8
_PLAIN_INITIALISERS_IR = 4
# Metadata of a network whose activations were replaced without training; the value says what it is for.
WHAT_IF = "relu_deploy.what_if"
# The checker is C++: besides its own errors come those of the standard library, and of names that are no text.
_CHECKER_ERRORS = (
    onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError, IndexError,
)  # fmt: skip

# It prints its remarks on types to standard output, where JSON is expected.
gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR

__all__ = [
    "MAX_EXTERNAL_BYTES",
    "MAX_IR_VERSION",
    "MAX_OPSET",
    "MIN_OPSET",
    "PROTOBUF_LIMIT",
    "WHAT_IF",
    "all_nodes",
    "check_model",
    "check_versions",
    "convert_opset",
    "count_ops",
    "export_graph",
    "fits_one_message",
    "import_graph",
    "load_model",
    "name_nodes",
    "opset",
    "parse_model",
    "read_model",
    "save_model",
    "tensor_bytes",
    "tidy",
]


def load_model(path: Path) -> onnx.ModelProto:
    """Read and check an ONNX file, with its external data.

    Args:
        path: The ``.onnx`` file.

    Returns:
        The model, all tensors inside it, every node named. One that ``survey --what-if`` wrote comes with a
        ``NetworkWarning``.

    Raises:
        FileError: ``path`` is missing or not a file.
        ModelError: it is damaged, truncated, fails onnx's checker, is of an unsupported version, or its external data
            is missing, too short or outside the folder of the model.
    """
    model = parse_model(path)
    check_versions(model, path)
    _complete(model, path)
    _check_operators(model, path)
    sort_nodes(model.graph)
    _infer_outputs(model)
    check_model(model, path)
    name_nodes(model.graph)
    for entry in model.metadata_props:
        if entry.key == WHAT_IF:
            warnings.warn(f"{path}: its activations were replaced by ReLU, {entry.value}", NetworkWarning, stacklevel=2)
    return model


def _infer_outputs(model: onnx.ModelProto) -> None:
    """Give outputs that have none the shapes that follow from the network, in place.

    Exporters that do not know one leave it out, and runtimes do not ask for it; onnx's checker does.
    """
    bare = [
        v for v in model.graph.output if v.type.HasField("tensor_type") and not v.type.tensor_type.HasField("shape")
    ]
    if not bare or not fits_one_message(model):
        return
    try:
        found = onnx.shape_inference.infer_shapes(model).graph.output
    except _CHECKER_ERRORS:
        return  # the checker will say what is wrong
    shapes = {value.name: value.type.tensor_type.shape for value in found if value.type.tensor_type.HasField("shape")}
    for value in bare:
        if value.name in shapes:
            value.type.tensor_type.shape.CopyFrom(shapes[value.name])


def read_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file that may be of any version and fail onnx's checker, as one that is looked at for faults.

    Raises:
        FileError: ``path`` is missing or not a file.
        ModelError: it is damaged or truncated, or its external data is missing, too short or outside its folder.
    """
    model = parse_model(path)
    _complete(model, path)
    name_nodes(model.graph)
    return model


def _complete(model: onnx.ModelProto, path: Path) -> None:
    """Check what was parsed, and read its external data into it."""
    check_parsed(model, path)
    _load_external_data(model, path)


def _check_operators(model: onnx.ModelProto, path: Path) -> None:
    """Refuse faulty operators of this package's domain, and define them where a file uses them undefined."""
    try:
        ops.check_operators(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", hint=error.hint) from error
    if opset(model) >= ops.DEFINITION_OPSET and model.ir_version >= _FUNCTION_IR:
        ops.define_operators(model, opset(model))


def parse_model(path: Path) -> onnx.ModelProto:
    """Parse the file and nothing else: no external data, no checker. Raises as :func:`load_model`."""
    require_file(path, to="read the model")
    if path.stat().st_size > PROTOBUF_LIMIT:
        raise ModelError(f"{path} is larger than 2 GiB, which no ONNX file can be", hint="is it a weights file?")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ModelError(
            f"{path} is not an ONNX file, or is cut short", hint="compare its size with the source and copy it again"
        ) from error
    except OSError as error:
        raise FileError(f"cannot read the model {path}: {error.strerror or error}") from error
    if not model.graph.node and not model.graph.output:
        raise ModelError(f"{path} holds no graph: it is empty, cut short, or not an ONNX file")
    return model


def check_model(model: onnx.ModelProto, source: Path | str) -> None:
    """Run onnx's checker with shape inference; ``source`` names the model in the message.

    Where nothing is wrong but the shapes that outputs are declared with, which runtimes pass over, those are mended.

    Raises:
        ModelError: the checker refused it.
    """
    # The checker knows only the standard operators, and ours by their definition; a graph with others is checked as far
    # as they allow.
    defined = {function.domain for function in model.functions if ops.is_definition(function)}
    known = (*STANDARD_DOMAINS, "ai.onnx.ml", *defined)
    foreign = any(node.domain not in known for node in all_nodes(model.graph))
    try:
        if fits_one_message(model):
            onnx.checker.check_model(model, full_check=not foreign)
    except _CHECKER_ERRORS as error:
        if foreign or not _mend_outputs(model):
            raise ModelError(f"{source} is not a valid ONNX model: {first_line(error)}") from error


def _mend_outputs(model: onnx.ModelProto) -> bool:
    """Give outputs the shapes that follow from the network, in place, if it is valid then; whether it is."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for value in bare.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        found = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True).graph.output
        for value, inferred, declared in zip(bare.graph.output, found, model.graph.output, strict=True):
            known = inferred if inferred.type.tensor_type.HasField("shape") else declared
            value.CopyFrom(known)
        onnx.checker.check_model(bare, full_check=True)
    except _CHECKER_ERRORS:
        return False
    for value, right in zip(model.graph.output, bare.graph.output, strict=True):
        value.CopyFrom(right)
    return True


def check_versions(model: onnx.ModelProto, source: Path | str) -> None:
    """Refuse IR and opset versions outside what this package reads, naming what was found.

    Raises:
        ModelError: the IR version is too new or missing, or the opset is too old or too new.
    """
    if not 3 <= model.ir_version <= MAX_IR_VERSION:
        raise ModelError(
            f"{source} has IR version {model.ir_version}; supported are 3 to {MAX_IR_VERSION}",
            hint="set model.ir_version = 10 and save it again; that is enough where it uses nothing newer"
            if model.ir_version > MAX_IR_VERSION
            else "export the model again",
        )
    found = opset(model)
    if not MIN_OPSET <= found <= min(MAX_OPSET, onnx.defs.onnx_opset_version()):
        raise ModelError(
            f"{source} uses opset {found}; supported are {MIN_OPSET} to {MAX_OPSET}",
            hint="export it again with opset_version=20, which every runtime here reads",
        )


def convert_opset(model: onnx.ModelProto, *, lowest: int, source: Path | str = "the model") -> onnx.ModelProto:
    """Lift a model to opset ``lowest`` when it is older; a newer one is returned as it is.

    Raises:
        ModelError: onnx's version converter has no rule for one of its operators.
    """
    if opset(model) >= lowest:
        return model
    ours = [(f.domain, f.name) for f in model.functions if ops.is_definition(f)]
    try:
        # The converter drops local functions; those of users are unfolded, ours are defined anew for the opset.
        if len(ours) < len(model.functions):
            model = onnx.inliner.inline_selected_functions(model, ours, exclude=True)
        converted = onnx.version_converter.convert_version(model, lowest)
    except (RuntimeError, IndexError, ValueError, ConvertError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"{source} uses opset {opset(model)} and cannot be lifted to {lowest}: {first_line(error)}",
            hint=f"export the model again with opset {lowest} or newer",
        ) from error
    ops.define_operators(converted, lowest)
    converted.metadata_props.extend(p for p in model.metadata_props if p not in converted.metadata_props)
    _restore_tensor_names(model.graph, converted.graph)
    name_nodes(converted.graph)
    with contextlib.suppress(ModelError):  # of newer operators more can be told: that a declared shape was wrong
        check_model(converted, source)
    return converted


def _restore_tensor_names(before: onnx.GraphProto, after: onnx.GraphProto) -> None:
    """Undo what the converter renamed, in place: what it replaces gets outputs named anew, and ranges go by name.

    A tensor is recognised by its readers: the same operand of the same node had another name before.
    """
    old, new = (
        {name for node in all_nodes(graph) for name in node.output} | {tensor.name for tensor in graph.initializer}
        for graph in (before, after)
    )
    gone, made = old - new, new - old
    nodes = {node.name: node for node in all_nodes(after)}
    renamed: dict[str, str] = {}
    for node in all_nodes(before):
        same = nodes.get(node.name)
        if same is not None and same.op_type == node.op_type:
            pairs = zip(same.input, node.input, strict=False)
            renamed |= {found: name for found, name in pairs if name in gone and found in made}
    for node in all_nodes(after):
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for value in after.value_info:
        value.name = renamed.get(value.name, value.name)


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model whole or not at all; weights go to ``<name>.data`` beside it when it would pass 2 GiB.

    Raises:
        FileError: ``path`` cannot be written.
    """
    check_writable(path)
    path = behind_links(path)  # the weights go beside the file, not beside a link to it
    if fits_one_message(model):
        with atomic_path(path) as temporary:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        return
    data_path = path.with_name(f"{path.name}.data")
    stored = onnx.ModelProto()
    stored.CopyFrom(model)
    with atomic_path(data_path) as data, atomic_path(path) as temporary:
        external_data_helper.convert_model_to_external_data(stored, location=data.name)
        onnx.save_model(stored, temporary)
        for tensor in external_data_helper._get_all_tensors(stored):  # noqa: SLF001
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = data_path.name
        temporary.write_bytes(stored.SerializeToString(deterministic=True))


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """Graphsurgeon's view of a model whose nodes are all named. The model is not changed.

    Raises:
        ModelError: an input or output is neither a tensor nor a sequence, or an attribute is not what it says.
    """
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.WhichOneof("value")
        if kind not in (None, "tensor_type", "sequence_type"):
            raise ModelError(
                f"the input or output {value.name!r} is of type {kind}; only tensors and sequences can be worked with",
                hint="export the model with plain tensors as inputs and outputs",
            )
    name_nodes(model.graph)
    try:
        return gs.import_onnx(model)
    except (ValueError, KeyError, TypeError, IndexError) as error:  # text attributes that are no text, among others
        raise ModelError(
            f"the network cannot be worked with: {first_line(error)}", hint="copy or export the model again"
        ) from error


def tidy(graph: gs.Graph) -> None:
    """Tell tensors of one name apart, drop what nobody reads and sort the nodes, in place.

    Not the local functions: graphsurgeon 0.6.1 recurses without end where there are functions and an If, Loop or Scan.
    """
    make_distinct(graph)  # while new nodes still stand behind the old ones
    graph.cleanup(remove_unused_graph_inputs=False).toposort(mode="nodes")


def export_graph(graph: gs.Graph, like: onnx.ModelProto) -> onnx.ModelProto:
    """Turn a graph back into a model that keeps the IR version (of 4 and later), metadata and producer of ``like``."""
    tidy(graph)
    empty = _take_empty_lists(graph)
    model: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    _put_empty_lists(model, like, empty)
    model.ir_version = max(like.ir_version, _PLAIN_INITIALISERS_IR)
    model.producer_name, model.producer_version = like.producer_name, like.producer_version
    model.domain, model.model_version, model.doc_string = like.domain, like.model_version, like.doc_string
    del model.metadata_props[:]
    model.metadata_props.extend(like.metadata_props)
    _keep_shapes(model, like)
    ops.drop_definitions(model)
    ops.define_operators(model, opset(model))
    name_nodes(model.graph)
    return model


def _take_empty_lists(graph: gs.Graph) -> dict[str, list[str]]:
    """Names of attributes that are empty lists, by node, taken out: graphsurgeon cannot write one (``shape = []``)."""
    taken: dict[str, list[str]] = {}
    for node in graph.nodes:
        for name in [name for name, value in node.attrs.items() if isinstance(value, list) and not value]:
            del node.attrs[name]
            taken.setdefault(node.name, []).append(name)
    return taken


def _put_empty_lists(model: onnx.ModelProto, like: onnx.ModelProto, taken: dict[str, list[str]]) -> None:
    """Give them back, in place, in the type that they have in ``like``; of integers where they are new."""
    if not taken:
        return
    kinds = {(node.name, a.name): a.type for node in like.graph.node if node.name in taken for a in node.attribute}
    for node in model.graph.node:
        for name in taken.get(node.name, ()):
            kind = kinds.get((node.name, name), onnx.AttributeProto.INTS)
            node.attribute.append(onnx.AttributeProto(name=name, type=kind))


def _keep_shapes(model: onnx.ModelProto, like: onnx.ModelProto) -> None:
    """Give outputs the shapes declared in ``like``: graphsurgeon loses them where an intermediate entry has none."""
    declared = {value.name: value.type.tensor_type for value in like.graph.output}
    for value in model.graph.output:
        known = declared.get(value.name)
        if known is not None and known.HasField("shape") and not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.CopyFrom(known.shape)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a unique name, in place: reports speak of nodes by name.

    >>> graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
    >>> name_nodes(graph); graph.node[0].name
    'Relu_0'
    """
    taken: set[str] = set()
    for index, node in enumerate(all_nodes(graph)):
        if not node.name or node.name in taken:
            base = node.name or node.op_type
            name, number = f"{base}_{index}", index
            while name in taken:
                number += 1
                name = f"{base}_{number}"
            node.name = name
        taken.add(node.name)


def count_ops(model: onnx.ModelProto) -> dict[str, int]:
    """How many nodes of each operator type the main graph holds."""
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def _load_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Read every external tensor into the model, after checking where it lies and that it is whole."""
    folder = path.resolve().parent
    total = 0
    for tensor in external_data_helper._get_all_tensors(model):  # noqa: SLF001
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        file, offset, length = _external_range(tensor, folder, path)
        total += length
        if total > MAX_EXTERNAL_BYTES:
            raise ModelError(f"{path} refers to more than {MAX_EXTERNAL_BYTES >> 30} GiB of external data")
        with file.open("rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _external_range(tensor: onnx.TensorProto, folder: Path, path: Path) -> tuple[Path, int, int]:
    """File, offset and length of one external tensor, all of them checked."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    location = where.get("location", "")
    file = Path(os.path.realpath(folder / location))
    if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
        raise ModelError(
            f"{path}: tensor {tensor.name!r} keeps its data in {location!r}, outside the folder of the model",
            hint="external data is read only from beside the model; copy it there and save the model again",
        )
    if not file.is_file():
        raise ModelError(
            f"{path}: the external data of tensor {tensor.name!r} is missing: {file} does not exist",
            hint="copy the data file next to the model",
        )
    try:
        offset, size = int(where.get("offset", 0)), file.stat().st_size
        length = int(where.get("length", max(size - offset, 0)))
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: tensor {tensor.name!r} describes its external data wrongly: {error}") from error
    needed = math.prod(tensor.dims) * itemsize
    if min(offset, length) < 0 or offset + length > size or (length < needed and itemsize > 1):
        raise ModelError(
            f"{path}: the external data of tensor {tensor.name!r} is cut short: {file.name} has {size} bytes, "
            f"{offset + max(length, needed)} are needed",
            hint="copy the data file again",
        )
    return file, offset, length
