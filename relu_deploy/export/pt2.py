"""``.pt2`` archives, read without running anything that is stored in them.

``torch.export.load`` executes what an archive brings in several ways: pickled weights, constants and example inputs;
compiled libraries; ``guards_code``, which becomes a Python function; sizes, which sympy evaluates as Python; names,
which are pasted into generated source; and targets, which may be any attribute of torch. So the archive is first taken
apart as zip and JSON, held against what an exported network needs, and put together again from those parts alone;
torch reads the copy.
"""

from __future__ import annotations

import io
import json
import keyword
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from calib.errors import FileError
from calib.files import require_file
from relu_deploy.errors import ExportError
from relu_deploy.export.convert import quiet
from relu_deploy.export.specs import DTYPES, ExampleInput

# SerializeError is a RuntimeError; the others are what its reader stumbles over.
_TORCH_ERRORS = (RuntimeError, AssertionError, ValueError, LookupError, TypeError, AttributeError)

_MAX_BYTES = 1 << 32  # of an archive: it is held in memory twice
_MAX_JSON = 1 << 27

_MODEL, _EXAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_DATA = re.compile(r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_(format|version)|byteorder|\.data/\w+")
_DROPPED = re.compile(r"extra/.*", re.DOTALL)

_PLAIN = re.compile(r"[A-Za-z0-9_.+\-]*")
_TEXT = re.compile(r"[A-Za-z0-9_.+\-> ,]*")  # padding modes, the equation of an einsum
# A size as sympy's srepr has it: symbols, their small powers (9**9**9 would never end), sums, products, integer
# divisions.
_SYMBOL = re.compile(r"Symbol\('[su]\d{1,9}'(, (positive|nonnegative|integer|real)=True)*\)")
_POWER = re.compile(r"Pow\(x, Integer\((-1|2|3)\)\)")
_SIZE = re.compile(
    r"(x|-?\d{1,18}|[(), ]|(Integer|Add|Mul|FloorDiv|CeilDiv|CleanDiv|ModularIndexing|Mod|PythonMod|Max|Min)(?=\())*"
)
_OPERATOR = re.compile(r"torch\.ops\.(aten|prims)\.(\w+)\.(\w+)")
_OTHER_TARGETS = re.compile(
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|g[te]|l[te]|eq|ne)|torch\.sym_(int|float|max|min|not|sum)"
    r"|math\.(ceil|floor|trunc)|torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled)"
)
_TREES = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None}


class Program(nn.Module):
    """An exported program as a module that takes its inputs by position.

    Attributes:
        specs: Its inputs where all their sizes are fixed; else None, and the caller has to say them.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        # Guards are code; none came with the copy, and shapes are compared anyway.
        self.inner = program.module(check_guards=False)
        self.specs = _specs(program)
        self._in_spec = program.call_spec.in_spec

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Call the program with its own nesting of the inputs."""
        if len(inputs) != self._in_spec.num_leaves:
            raise ExportError(f"the program takes {self._in_spec.num_leaves} inputs, {len(inputs)} are given")
        args, kwargs = pytree.tree_unflatten(inputs, self._in_spec)
        return self.inner(*args, **kwargs)

    def train(self, mode: bool = True) -> Program:
        """Nothing to switch: the mode was fixed when the program was exported. Training was refused on loading."""
        if mode:
            raise ExportError("an exported program cannot be trained")
        return self


def load_pt2(path: Path) -> Program:
    """Read an archive of ``torch.export.save`` (torch 2.8 or newer).

    Raises:
        FileError: it is missing or unreadable.
        ExportError: it is damaged, brings pickled objects, compiled code or custom operators, was exported in training
            mode, or torch cannot read it.
    """
    parts = _read_parts(path)
    try:
        for name in _CONFIGS:
            _check_payload(json.loads(parts[name]), parts, path)
        parts[_MODEL] = _clean_program(json.loads(parts[_MODEL]), path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"{path} is not an archive of torch.export.save: {type(error).__name__}: {error}") from error
    parts[_EXAMPLES] = b""  # a pickle that nothing here needs
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(f"model/{name}", data)
    copy.seek(0)
    try:
        with quiet():
            program = torch.export.load(copy)
            _check_mode(program, path)
            return Program(program)
    except _TORCH_ERRORS as error:
        raise ExportError(
            f"torch cannot read {path}: {(str(error).splitlines() or ['no reason given'])[0][:300]}"
        ) from error


def _read_parts(path: Path) -> dict[str, bytes]:
    """Every needed entry of the archive, after its names and sizes were checked."""
    require_file(path)
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ExportError(
            f"{path} is larger than {_MAX_BYTES >> 30} GiB", hint="export from module:factory and --weights"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # Stored and not larger together than the file: no entry unpacks to more, none lie on top of each other.
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
                raise ExportError(f"{path} is a zip file, but not one that torch.export.save writes")
            parts = {entry.filename.partition("/")[2]: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:  # names that are no text, passwords
        raise ExportError(f"{path} is not a .pt2 archive, or is cut short: {error}", hint="copy it again") from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    for name in (_MODEL, *_CONFIGS):
        if name not in parts:
            raise ExportError(
                f"{path} has no {name}: it is cut short, or not an archive of torch.export.save",
                hint="copy it again, or save it with torch 2.8 or newer",
            )
        if len(parts[name]) > _MAX_JSON:
            raise ExportError(f"{path}: {name} is larger than {_MAX_JSON >> 20} MiB, which no network's description is")
    for name in parts:
        if name not in (_MODEL, _EXAMPLES, *_CONFIGS) and not _DATA.fullmatch(name) and not _DROPPED.fullmatch(name):
            raise ExportError(
                f"{path} holds {name[:100]!r}, which is compiled code or a pickled object, and is not loaded",
                hint="export the plain module: torch.export.save(torch.export.export(model.eval(), inputs), path)",
            )
    return {name: data for name, data in parts.items() if not _DROPPED.fullmatch(name)}


def _check_payload(config: dict[str, Any], parts: dict[str, bytes], path: Path) -> None:
    """Weights and constants must be plain bytes: no pickle, and no tensor that is large without being stored."""
    _check_strings(config, "", path)
    for name, meta in config["config"].items():
        if meta["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", meta["path_name"]):
            raise ExportError(
                f"{path}: {name!r} is stored as a pickled object, which is not loaded",
                hint="export a model of plain tensors",
            )
        stored = next(len(data) for entry, data in parts.items() if entry.endswith(f"/{meta['path_name']}"))
        if not stored and math.prod(size["as_int"] for size in meta["tensor_meta"]["sizes"]):
            raise ExportError(f"{path}: the data of {name!r} is missing")


def _clean_program(program: dict[str, Any], path: Path) -> bytes:
    """The program without guards and remarks, every string in it checked."""
    program["guards_code"] = []
    program["graph_module"]["metadata"] = {}
    for graph in _graphs(program["graph_module"]["graph"]):
        for node in graph["nodes"]:
            node["metadata"] = {}
            _check_target(node["target"], path)
    _check_strings(program, "", path)
    return json.dumps(program).encode()


def _graphs(graph: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A graph and the graphs in the arguments of its nodes (torch.cond)."""
    yield graph
    for node in graph["nodes"]:
        for argument in node["inputs"]:
            inner = argument["arg"].get("as_graph")
            if inner:
                yield from _graphs(inner["graph"])


def _check_target(target: str, path: Path) -> None:
    """Only operators that compute tensors: no file access, no attribute of torch that happens to be callable."""
    if _OTHER_TARGETS.fullmatch(target):
        return
    match = _OPERATOR.fullmatch(target)
    overload: Any = torch.ops
    for name in match.groups() if match else ():
        overload = getattr(overload, name, None)
    if isinstance(overload, torch._ops.OpOverload):  # noqa: SLF001  # the class of every operator; it has no public name
        schema = overload._schema  # noqa: SLF001
        computes = all("str" not in str(value.type) and "Any" not in str(value.type) for value in schema.returns)
        if schema.returns and computes and not any("file" in argument.name for argument in schema.arguments):
            return
    raise ExportError(
        f"{path} calls {target[:100]!r}, which is not an operator of plain tensors, and is not loaded",
        hint="custom operators: export from module:factory, where your own code registers them",
    )


def _check_strings(value: Any, key: str, path: Path) -> None:
    """Refuse every string that torch could take for code."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not _PLAIN.fullmatch(name):
                raise ExportError(f"{path} holds the name {name[:60]!r}, which is not one that torch writes")
            _check_strings(item, name, path)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item, key, path)
    elif isinstance(value, str) and not _is_harmless(value, key):
        raise ExportError(f"{path} holds {value[:60]!r} as {key}, which is not what torch writes there")


def _is_harmless(text: str, key: str) -> bool:
    if key in ("in_spec", "out_spec"):
        return _is_plain_tree(json.loads(text)[1])
    if key == "expr_str":
        return len(text) < 2000 and bool(_SIZE.fullmatch(_POWER.sub("x", _SYMBOL.sub("x", text))))
    if key in ("name", "as_name", "forward_arg_names"):
        return not text or (text.isidentifier() and text.isascii() and not keyword.iskeyword(text))
    if key in ("as_string", "as_strings"):
        return bool(_TEXT.fullmatch(text))
    return bool(_PLAIN.fullmatch(text))


def _is_plain_tree(tree: dict[str, Any]) -> bool:
    """Nested tuples, lists and dicts with plain keys: other node types import modules by name."""
    context = json.loads(tree["context"]) if tree["context"] else None
    plain = context is None or (isinstance(context, list) and all(isinstance(key, (str, int)) for key in context))
    return tree["type"] in _TREES and plain and all(_is_plain_tree(child) for child in tree["children_spec"])


def _check_mode(program: ExportedProgram, path: Path) -> None:
    """A program that updates BatchNorm's statistics was exported in training mode and would normalise by the batch."""
    mutated = program.graph_signature.buffers_to_mutate
    trains = any(
        argument.name in ("training", "train") and value is True
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)  # noqa: SLF001
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False)  # noqa: SLF001
    )
    if mutated or trains:
        raise ExportError(
            f"{path} was exported in training mode: BatchNorm or dropout would behave as in training",
            hint="call model.eval() before torch.export.export",
        )


def _specs(program: ExportedProgram) -> tuple[ExampleInput, ...] | None:
    specs = []
    names = program.graph_signature.user_inputs
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in names:
            continue
        value = node.meta["val"]
        dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
        if dtype not in DTYPES or not all(isinstance(size, int) for size in value.shape):
            return None
        specs.append(ExampleInput(node.name, tuple(value.shape), dtype))
    return tuple(specs)
