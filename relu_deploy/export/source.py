"""Where a model comes from: ``module:factory``, ``file.py:factory``, or a ``.pt2`` archive.

Python named here is the user's own code and is run, as ``python file.py`` would run it. Files of weights and archives
are data and are only read.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from calib.errors import FileError, MissingExtraError, ToolkitError
from relu_deploy.errors import ExportError

if TYPE_CHECKING:
    from torch import nn

    from relu_deploy.export.specs import ExampleInput

_FORMS = "module:factory, path/to/file.py:factory, or model.pt2"


def load_factory(spec: str, *, weights: Path | None = None) -> nn.Module:
    """Make the model that ``spec`` names.

    Args:
        spec: ``module:factory`` or ``file.py:factory``, where the factory is called without arguments and returns a
            ``torch.nn.Module`` (a class, or a module object itself, do too); or a ``.pt2`` archive of
            ``torch.export.save``.
        weights: A ``.safetensors`` or ``.pt`` file with the model's state_dict. A ``.pt2`` brings its own.

    Returns:
        The model, in whatever mode the factory left it.

    Raises:
        ExportError: there is no such module or factory, it fails, returns something else, or the weights do not fit.
        FileError: a file is missing.
        MissingExtraError: torch is not installed.
    """
    require_torch()
    if spec.endswith(".pt2"):
        if weights is not None:
            raise ExportError(f"{spec} brings its own weights", hint="leave --weights out")
        from relu_deploy.export.pt2 import load_pt2

        return load_pt2(Path(spec))
    model = _call(spec)
    if weights is not None:
        from relu_deploy.export.weights import load_weights

        load_weights(model, weights)
    return model


def own_inputs(model: nn.Module) -> tuple[ExampleInput, ...]:
    """The inputs that a ``.pt2`` of fixed sizes tells itself; empty for every other model."""
    from relu_deploy.export.pt2 import Program

    return (model.specs or ()) if isinstance(model, Program) else ()


def require_torch() -> None:
    """Refuse with the name of the extra where torch is missing.

    Raises:
        MissingExtraError: torch or onnxscript is not installed.
    """
    for package in ("torch", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra="torch", purpose="exporting a torch model")


def _call(spec: str) -> nn.Module:
    from torch import nn

    where, separator, name = spec.rpartition(":")
    if not separator or not where or not name.isidentifier():
        raise ExportError(f"cannot read the model {spec!r}", hint=f"write {_FORMS}")
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    made = getattr(module, name, None)
    if made is None:
        raise ExportError(f"{where} has no {name!r}", hint=_similar(module))
    if callable(made) and not isinstance(made, nn.Module):
        try:
            made = made()
        except ToolkitError:
            raise
        except Exception as error:  # the user's function may raise anything; it is their mistake to mend
            raise ExportError(
                f"{spec} failed: {type(error).__name__}: {error}", hint="it is called without arguments"
            ) from error
    if not isinstance(made, nn.Module):
        raise ExportError(f"{spec} gave a {type(made).__name__}, not a torch.nn.Module", hint="return the model itself")
    return made


def _import_module(name: str) -> ModuleType:
    """Import a module by name; the current folder is searched first, as ``python -m`` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise ExportError(f"there is no module {name!r}", hint=f"write {_FORMS}") from error
        raise ExportError(f"{name} needs the module {missing!r}, which is not installed") from error
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ExportError(f"importing {name} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)


def _import_file(path: Path) -> ModuleType:
    """Run a Python file as a module, with its own folder importable as a script's is."""
    if not path.is_file():
        raise FileError(f"cannot read {path}: it does not exist")
    # A name of its own: a file called torch.py or model.py must not take the place of a module of that name.
    spec = importlib.util.spec_from_file_location(f"_relu_deploy_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ExportError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises while it runs
        del sys.modules[spec.name]
        raise ExportError(f"running {path} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module


def _similar(module: ModuleType) -> str:
    names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    own = [name for name in names if getattr(vars(module)[name], "__module__", None) == module.__name__]
    return f"it has {', '.join(own[:8])}" if own else "it defines no functions or classes"
