"""Python that a user names on the command line: ``module:function`` or ``file.py:function``.

It is their own code and is run, as ``python file.py`` would run it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from calib.errors import FileError, ToolkitError


def call_named(spec: str, *, what: str, wanted: type, forms: str, error: type[ToolkitError]) -> Any:
    """What ``module:name`` or ``file.py:name`` is; a function or class is called without arguments.

    Args:
        spec: As a user wrote it.
        what: What it stands for, in messages.
        wanted: An object of this class is taken as it is, though it may be callable.
        forms: How to write it, in messages.
        error: Raised where there is nothing of this name, or where calling it fails.

    Raises:
        FileError: a file is missing.
    """
    where, separator, name = spec.rpartition(":")
    if not separator or not where or not name.isidentifier():
        raise error(f"cannot read the {what} {spec!r}", hint=f"write {forms}")
    module = _import_file(Path(where), error) if where.endswith(".py") else _import_module(where, forms, error)
    made = getattr(module, name, None)
    if made is None:
        raise error(f"{where} has no {name!r}", hint=_similar(module))
    if callable(made) and not isinstance(made, wanted):
        try:
            made = made()
        except ToolkitError:
            raise
        except Exception as failure:  # the user's function may raise anything; it is their mistake to mend
            raise error(
                f"{spec} failed: {type(failure).__name__}: {failure}", hint="it is called without arguments"
            ) from failure
    return made


def _import_module(name: str, forms: str, kind: type[ToolkitError]) -> ModuleType:
    """Import a module by name; the current folder is searched first, as ``python -m`` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise kind(f"there is no module {name!r}", hint=f"write {forms}") from error
        raise kind(f"{name} needs the module {missing!r}, which is not installed") from error
    except Exception as error:  # whatever the user's module raises while it is imported
        raise kind(f"importing {name} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)


def _import_file(path: Path, kind: type[ToolkitError]) -> ModuleType:
    """Run a Python file as a module, with its own folder importable as a script's is."""
    if not path.is_file():
        raise FileError(f"cannot read {path}: it does not exist")
    # A name of its own: a file called torch.py or model.py must not take the place of a module of that name.
    spec = importlib.util.spec_from_file_location(f"_relu_deploy_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise kind(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises while it runs
        del sys.modules[spec.name]
        raise kind(f"running {path} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module


def _similar(module: ModuleType) -> str:
    names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    own = [name for name in names if getattr(vars(module)[name], "__module__", None) == module.__name__]
    return f"it has {', '.join(own[:8])}" if own else "it defines no functions or classes"
