"""Activations that are written as calls or formulas in a class's methods, and the same class with modules there.

An expression of a method is an activation if it is a function of one live operand (everything else in it are constants
and elementwise functions) and computes a known smooth function: ``F.gelu(h)``, ``h * torch.sigmoid(h)`` and
``0.5 * h * (1 + torch.erf(h / math.sqrt(2)))`` are one thing here. It becomes ``self.<name>(h)`` in a subclass of the
module's class, made from the original source with the original globals and closure, so ``isinstance``, ``super()``,
line numbers in tracebacks, ``deepcopy`` and pickling go on working. The source is trusted only if it compiles to the
byte code that runs.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import linecache
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from relu_deploy.nn import swap_known
from relu_deploy.nn.swap_known import ELEMENTWISE, PRIMITIVES, Known

_FUTURE: Final = 0x1FF0000  # the bits of compile() that stand for imports from __future__

Position = tuple[int, int, int, int]
_Place = tuple[Position, str, str, bool]  # where, name of the submodule, source of the operand, in place
_ClassPlan = tuple[tuple[type, str, tuple[_Place, ...]], ...]
_OPERAND: Final = "_operand_"
_UNKNOWN: Final = object()
_IMPORTABLE: Final = frozenset(("torch", "math"))


@dataclasses.dataclass(frozen=True)
class Call:
    """An activation in the source of a method.

    Attributes:
        owner: The class that defines the method.
        method: Its name there.
        position: Line and column, first and last, in the file.
        operand: Source of what the activation is applied to.
        known: The function.
        where: ``file:line``.
        inplace: The operand, a plain name, is changed too.
    """

    owner: type
    method: str
    position: Position
    operand: str
    known: Known
    where: str
    inplace: bool


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A method that looks as if it had activations and cannot be rewritten."""

    method: str
    reason: str


def find_calls(module: nn.Module) -> tuple[list[Call], list[Refusal]]:
    """Every activation in the methods of a module's class and the classes it inherits from, in order of the source."""
    calls: list[Call] = []
    refusals: list[Refusal] = []
    if "forward" in vars(module) and swap_known.looks_smooth(vars(module)["forward"]):
        refusals.append(Refusal("forward", "its forward was replaced on the instance, which is not rewritten"))
    for owner in type(module).__mro__:
        if owner is nn.Module or owner.__module__.startswith("torch.") or owner is object:
            continue
        for name, value in vars(owner).items():
            try:
                function = _function_of(value)
                if function is None or name.startswith("__") or not _worth_reading(function):
                    continue
                calls += _calls_of(owner, name, function, module)
            except _CannotRewriteError as error:
                refusals.append(Refusal(name, str(error)))
    return calls, refusals


def rewritten_class(cls: type, plan: _ClassPlan) -> type:
    """A subclass of ``cls`` in which the planned expressions are calls of submodules; the same for the same plan.

    Each class that owns a rewritten method gets a subclass of its own, placed right before it in the resolution order,
    so that ``super().forward(x)`` finds the rewritten method of the parent.
    """
    return _rewritten_class(cls, plan)


def plan_of(edits: list[tuple[Call, str]]) -> _ClassPlan:
    """Group edits (a call, the submodule that takes its place) by method, hashable and picklable."""
    methods: dict[tuple[type, str], list[_Place]] = {}
    for call, attribute in edits:
        place = (call.position, attribute, call.operand, call.inplace)
        methods.setdefault((call.owner, call.method), []).append(place)
    return tuple((owner, name, tuple(places)) for (owner, name), places in methods.items())


class _CannotRewriteError(Exception):
    """Why a method is left; never leaves this module."""


@functools.cache
def _rewritten_class(cls: type, plan: _ClassPlan) -> type:
    by_owner: dict[type, dict[str, Any]] = {}
    for owner, name, places in plan:
        by_owner.setdefault(owner, {})[name] = _rewritten_method(owner, name, {place[0]: place for place in places})
    parts = [
        type(owner.__name__, (owner,), {**by_owner[owner], "__module__": owner.__module__, "__doc__": owner.__doc__})
        for owner in cls.__mro__
        if owner in by_owner
    ]
    bases = tuple(parts) if cls in by_owner else (cls, *parts)
    body = {
        "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__,
        "__reduce_ex__": lambda self, _protocol: _reduce(self, cls, plan),
    }  # fmt: skip
    return type(cls)(cls.__name__, bases, body)


def _reduce(module: nn.Module, cls: type, plan: _ClassPlan) -> tuple[Any, ...]:
    """Pickle the class as "this class with that plan": its name leads to the class before the rewrite."""
    state = module.__getstate__() if hasattr(module, "__getstate__") else vars(module)  # type: ignore[no-untyped-call]
    return _restore, (cls, plan), state


def _restore(cls: type, plan: _ClassPlan) -> nn.Module:
    rewritten = rewritten_class(cls, plan)
    made: nn.Module = object.__new__(rewritten)
    return made


def _function_of(value: object) -> types.FunctionType | None:
    """The function under the decorators; None for what is no method with ``self``."""
    if isinstance(value, property):
        value = value.fget
    if not isinstance(value, types.FunctionType):
        return None
    inner: object = inspect.unwrap(value)
    return inner if isinstance(inner, types.FunctionType) else None


def _worth_reading(function: types.FunctionType) -> bool:
    """Whether the byte code names a primitive, or a global, closure or attribute that is an activation function."""
    return any(_named_smooth(name, function) for name in _names(function.__code__))


def _named_smooth(name: str, function: types.FunctionType) -> bool:
    if name.lower() in PRIMITIVES or "act" in name.lower():
        return True
    found = _closure(function).get(name, function.__globals__.get(name))
    return swap_known.looks_smooth(found) if callable(found) and not isinstance(found, type) else False


def _names(code: types.CodeType) -> Iterator[str]:
    yield from (*code.co_names, *code.co_freevars)
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _names(part)


def _closure(function: types.FunctionType) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that nothing was put into yet
            values[name] = cell.cell_contents
    return values


@functools.lru_cache(maxsize=64)
def _parsed(filename: str, text: str) -> ast.Module:
    return ast.parse(text, filename)


def _definition(function: types.FunctionType) -> ast.FunctionDef | ast.Lambda:
    """The syntax tree of a function, a private copy; refuses what has no source or another one than it runs."""
    code = function.__code__
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    if not text:
        raise _CannotRewriteError("its source is not available")
    try:
        tree = _parsed(code.co_filename, text)
    except SyntaxError:
        raise _CannotRewriteError("its source no longer compiles") from None
    found = [node for node in ast.walk(tree) if _starts_at(node, code)]
    same = [node for node in found if _same_code(_compiled(node, function), code)]
    if not same:
        raise _CannotRewriteError("its source is not what runs (edited after import, or made by a program)")
    return copy.deepcopy(same[0])  # type: ignore[return-value]


def _starts_at(node: ast.AST, code: types.CodeType) -> bool:
    if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
        return min([node.lineno, *(d.lineno for d in node.decorator_list)]) == code.co_firstlineno
    return isinstance(node, ast.Lambda) and code.co_name == "<lambda>" and node.lineno == code.co_firstlineno


def _same_code(one: types.CodeType, other: types.CodeType) -> bool:
    return (one.co_code, one.co_names, one.co_varnames) == (other.co_code, other.co_names, other.co_varnames)


def _compiled(node: ast.AST, function: types.FunctionType) -> types.CodeType:
    """Compile a definition as a method of its class (for mangled names, super) that sees the closure's names."""
    node = copy.deepcopy(node)
    if isinstance(node, ast.FunctionDef):
        node.decorator_list = []
        inner: ast.stmt = node
    else:
        inner = ast.copy_location(ast.Expr(node), node)  # type: ignore[arg-type]
    owner = function.__qualname__.split(".<locals>.")[-1].split(".")
    free = [name for name in function.__code__.co_freevars if name != "__class__"]
    outer = ast.parse(
        f"def _outer({', '.join(free)}):\n    class {owner[-2] if len(owner) > 1 else '_'}:\n        pass"
    )
    outer.body[0].body[0].body = [inner]  # type: ignore[attr-defined]
    outer.body[:0] = _imports(function)
    ast.fix_missing_locations(outer)
    flags = function.__code__.co_flags & _FUTURE
    code = compile(outer, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    for _ in range(2):  # _outer, then the class
        code = next(part for part in code.co_consts if isinstance(part, types.CodeType))
    wanted = function.__code__.co_name
    return next(p for p in code.co_consts if isinstance(p, types.CodeType) and p.co_name == wanted)


def _imports(function: types.FunctionType) -> list[ast.stmt]:
    """The imports at the top of the function's file: CPython compiles ``F.gelu(x)`` otherwise where F is an import."""
    filename = function.__code__.co_filename
    tree = _parsed(filename, "".join(linecache.getlines(filename, function.__globals__)))
    found = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return [copy.deepcopy(node) for node in found if getattr(node, "module", None) != "__future__"]


def _calls_of(owner: type, name: str, function: types.FunctionType, module: nn.Module) -> list[Call]:
    tree = _definition(function)
    finder = _Finder(tree, function, module)
    found = list(finder.search(tree))
    if found and finder.shadowed:
        raise _CannotRewriteError(f"it has a second meaning of {finder.this!r}, so a module cannot be reached")
    if found and _rewrap(vars(owner)[name], function, function) is None:
        raise _CannotRewriteError("it stands under a decorator that hides it")
    file = Path(function.__code__.co_filename).name
    return [
        Call(owner, name, _position(node), ast.unparse(operand), known, f"{file}:{node.lineno}", inplace)
        for node, operand, known, inplace in found
    ]


def _position(node: ast.expr) -> Position:
    return node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0


def _rewritten_method(owner: type, name: str, places: dict[Position, _Place]) -> Any:
    original = vars(owner)[name]
    function = _function_of(original)
    assert function is not None  # noqa: S101  # find_calls saw it
    tree = _definition(function)
    this = _first_argument(tree)
    finder = _Replacer(places, this)
    tree = finder.visit(tree)
    ast.fix_missing_locations(tree)
    code = _compiled(tree, function)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    # A name that only the replaced expression used is no longer free; a name can not become free that was not.
    closure = tuple(cells[free] for free in code.co_freevars)
    made = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    functools.update_wrapper(made, function)
    del made.__wrapped__  # type: ignore[attr-defined]
    made.__kwdefaults__ = function.__kwdefaults__
    return _rewrap(original, function, made)


def _rewrap(value: Any, old: types.FunctionType, new: types.FunctionType) -> Any:
    """The decorated value with another function inside; None if a decorator keeps the old one out of reach."""
    if value is old:
        return new
    if isinstance(value, property):
        inner = _rewrap(value.fget, old, new)
        return None if inner is None else property(inner, value.fset, value.fdel, value.__doc__)
    if not isinstance(value, types.FunctionType) or not hasattr(value, "__wrapped__"):
        return None
    inner = _rewrap(value.__wrapped__, old, new)
    cells = list(value.__closure__ or ())
    held = [i for i, cell in enumerate(cells) if _content(cell) is value.__wrapped__]
    if inner is None or not held:
        return None
    for i in held:
        cells[i] = types.CellType(inner)
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
    functools.update_wrapper(made, value)
    made.__kwdefaults__ = value.__kwdefaults__
    made.__wrapped__ = inner  # type: ignore[attr-defined]
    return made


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _first_argument(tree: ast.FunctionDef | ast.Lambda) -> str:
    arguments = [*tree.args.posonlyargs, *tree.args.args]
    return arguments[0].arg if arguments else ""


class _Replacer(ast.NodeTransformer):
    """Puts ``self.<name>(operand)`` where the plan says; operands are rewritten in turn."""

    def __init__(self, places: dict[Position, _Place], this: str) -> None:
        self.places, self.this = places, this

    def visit(self, node: ast.AST) -> Any:
        """Every node; what is not planned is copied as it stands."""
        place = self.places.get(_position(node)) if isinstance(node, (ast.Call, ast.BinOp)) else None
        if place is None:
            return self.generic_visit(node)
        _, attribute, text, inplace = place
        operand = next(part for part in _parts(node) if ast.unparse(part) == text)
        target = ast.Attribute(ast.Name(self.this, ast.Load()), attribute, ast.Load())
        made: ast.expr = ast.Call(target, [self.visit(copy.deepcopy(operand))], [])
        if inplace:
            made = ast.NamedExpr(ast.Name(text, ast.Store()), made)
        return ast.copy_location(made, node)


class _Finder:
    """Looks for the activations of one method, from the outermost expression inwards."""

    def __init__(self, tree: ast.FunctionDef | ast.Lambda, function: types.FunctionType, module: nn.Module) -> None:
        self.tree = tree
        self.this = _first_argument(tree)
        arguments = [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
        stored = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]
        self.shadowed = arguments.count(self.this) != 1 or self.this in stored
        self.live = {*arguments, *stored} - {self.this}
        imports = _local_imports(tree)
        self.scope = {**function.__globals__, **_closure(function), **imports, self.this: module}

    def search(self, node: ast.AST) -> Iterator[tuple[ast.Call | ast.BinOp, ast.expr, Known, bool]]:
        """Expressions with their operand, function, and whether the operand is changed in place."""
        inner: ast.AST = node
        if isinstance(node, (ast.Call, ast.BinOp)):
            found = self._activation(node)
            if found is not None:
                operand, known = found
                yield node, operand, known, isinstance(operand, ast.Name) and _is_inplace(node)
                inner = operand
                if isinstance(inner, (ast.Call, ast.BinOp)):
                    yield from self.search(inner)
                    return
        for child in ast.iter_child_nodes(inner):
            yield from self.search(child)

    def _activation(self, node: ast.Call | ast.BinOp) -> tuple[ast.expr, Known] | None:
        if isinstance(node, ast.Call) and self._is_own_attribute(node.func):
            return None  # a module, or a function in an attribute: replaced there, for all its calls
        dumps = [(part, ast.dump(part)) for part in _parts(node) if part is not node and self._is_live(part)]
        for operand, dump in sorted(dumps, key=lambda pair: -len(pair[1])):
            again = sum(dump == other for _, other in dumps) > 1
            if again and any(isinstance(part, (ast.Call, ast.NamedExpr)) for part in ast.walk(operand)):
                continue  # two calls of a layer are two values where it drops out
            formula = _Substitute(dump).visit(copy.deepcopy(node))
            if not self._is_live(formula) and self._allowed(formula):
                known = swap_known.recognise(self._function(formula))
                if known is not None:
                    return operand, known
        return None

    def _is_own_attribute(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.this

    def _is_live(self, node: ast.AST) -> bool:
        return any(isinstance(part, ast.Name) and part.id in self.live for part in ast.walk(node))

    def _function(self, formula: ast.expr) -> Callable[[Tensor], Any]:
        arguments = ast.arguments([], [ast.arg(_OPERAND)], None, [], [], None, [])
        made = ast.fix_missing_locations(ast.Expression(ast.Lambda(arguments, formula)))
        return eval(compile(made, "<activation>", "eval"), dict(self.scope))  # type: ignore[no-any-return]  # noqa: S307  # the model's own code

    def _allowed(self, node: ast.expr) -> bool:
        """Only constants, arithmetic and elementwise functions: anything else is not called."""
        if isinstance(node, ast.BinOp):
            return self._allowed(node.left) and self._allowed(node.right)
        if isinstance(node, ast.UnaryOp):
            return self._allowed(node.operand)
        if isinstance(node, ast.Call):
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            return self._may_call(node.func) and all(self._allowed(value) for value in values)
        if isinstance(node, ast.Name) and node.id == _OPERAND:
            return True
        return isinstance(self._value(node), (int, float, str, bool, type(None)))

    def _may_call(self, func: ast.expr) -> bool:
        operand = any(isinstance(part, ast.Name) and part.id == _OPERAND for part in ast.walk(func))
        if operand:
            return (
                isinstance(func, ast.Attribute) and func.attr.rstrip("_") in ELEMENTWISE and self._allowed(func.value)
            )
        if isinstance(func, ast.Call):  # nn.GELU()(x): a module made where it is called
            made = self._value(func.func)
            options = [*func.args, *(keyword.value for keyword in func.keywords)]
            return (
                isinstance(made, type)
                and issubclass(made, nn.Module)
                and made.__module__.startswith("torch.nn.")
                and made.__name__.lower() in PRIMITIVES
                and all(isinstance(value, ast.Constant) for value in options)
            )
        value = self._value(func)
        if isinstance(value, nn.Module):
            return not [*value.parameters(), *value.buffers()] and type(value).__name__.lower() != "dropout"
        if getattr(value, "__module__", None) == math.__name__:
            return True
        name = str(getattr(value, "__name__", "")).rstrip("_")
        torchs = isinstance(value, types.BuiltinFunctionType) or str(getattr(value, "__module__", "")).startswith(
            "torch"
        )
        return (torchs and name in ELEMENTWISE) or (callable(value) and swap_known.looks_smooth(value))

    def _value(self, node: ast.expr) -> object:
        """The value of a chain of names, attributes and constant subscripts, as the method would find it; or a mark."""
        chain = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Load)
        if any(not isinstance(part, chain) for part in ast.walk(node)):
            return _UNKNOWN
        try:
            code = compile(ast.fix_missing_locations(ast.Expression(copy.deepcopy(node))), "<name>", "eval")
            return eval(code, dict(self.scope))  # noqa: S307  # the model's own names
        except Exception:  # noqa: BLE001  # a stranger's property, or a name that is not there yet
            return _UNKNOWN


class _Substitute(ast.NodeTransformer):
    """Puts a placeholder where the operand stands."""

    def __init__(self, dump: str) -> None:
        self.dump = dump

    def visit(self, node: ast.AST) -> Any:
        """Every node."""
        if isinstance(node, ast.expr) and ast.dump(node) == self.dump:
            return ast.copy_location(ast.Name(_OPERAND, ast.Load()), node)
        return self.generic_visit(node)


def _parts(node: ast.AST) -> list[ast.expr]:
    return [part for part in ast.walk(node) if isinstance(part, ast.expr)]


def _is_inplace(node: ast.Call | ast.BinOp) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    flags = [k.value for k in node.keywords if k.arg == "inplace"]
    return name.endswith("_") or any(not isinstance(f, ast.Constant) or bool(f.value) for f in flags)


def _local_imports(tree: ast.AST) -> dict[str, Any]:
    """Names that a method imports from torch or math itself: as constant as a global."""
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in _IMPORTABLE:
                    found = importlib.import_module(alias.name)
                    root = importlib.import_module(alias.name.split(".")[0])
                    names[alias.asname or alias.name.split(".")[0]] = found if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _IMPORTABLE and not node.level:
            source = importlib.import_module(node.module or "")
            names.update({a.asname or a.name: getattr(source, a.name) for a in node.names if hasattr(source, a.name)})
    return names
