"""Where a model comes from: ``module:factory``, ``file.py:factory``, or a ``.pt2`` archive.

Python named here is the user's own code and is run, as ``python file.py`` would run it. Files of weights and archives
are data and are only read.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from calib.errors import MissingExtraError
from relu_deploy.errors import ExportError
from relu_deploy.user_code import call_named

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

    made = call_named(spec, what="model", wanted=nn.Module, forms=_FORMS, error=ExportError)
    if not isinstance(made, nn.Module):
        raise ExportError(f"{spec} gave a {type(made).__name__}, not a torch.nn.Module", hint="return the model itself")
    return made
