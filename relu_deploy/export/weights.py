"""Weights files, read and never executed: ``.safetensors``, and ``.pt`` as far as ``weights_only`` takes it."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import FileError, MissingExtraError
from calib.files import require_file
from relu_deploy.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor, nn

# What training scripts call the state_dict inside a checkpoint.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_SHOWN = 5
# What torch's unpickler stumbles over when the bytes are damaged: it calls functions of its own with what it read.
_DAMAGED = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict file into a model, in place; every key and every shape must fit.

    Raises:
        FileError: the file is missing or unreadable.
        ExportError: it is damaged, of another kind, needs pickle to execute code, holds no state_dict, or does not fit.
        MissingExtraError: safetensors is not installed.
    """
    fit_state(model, read_state(path), path)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state_dict inside a ``.safetensors`` or ``.pt`` file, on the CPU. Raises as :func:`load_weights`."""
    require_file(path, to="read the weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in {".pt", ".pth", ".bin", ".ckpt"}:
        return _read_pt(path)
    raise ExportError(f"{path} is not a weights file this package reads", hint="use .safetensors or .pt")


def fit_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy a state_dict into a model, or say which keys and shapes do not fit; the model is then unchanged."""
    own = model.state_dict()
    # DistributedDataParallel saves every key under "module.".
    if state and all(key.startswith("module.") for key in state) and not any(key in own for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    wrong = [
        f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    parts = [
        _listed("missing from the file", missing),
        _listed("unknown to the model", unknown),
        _listed("wrong shape", wrong),
    ]  # fmt: skip
    if any(parts):
        raise ExportError(
            f"the weights {path} do not fit {type(model).__name__}: {'; '.join(part for part in parts if part)}",
            hint="is it the weights file of this model, built with the same options? A factory may also load what fits "
            "by itself, and then needs no --weights",
        )
    model.load_state_dict(dict(state))


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise MissingExtraError("safetensors", extra="torch", purpose=f"reading {path.name}") from error
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ExportError(
            f"{path} is not a safetensors file, or is cut short: {error}", hint="copy it again"
        ) from error
    except OSError as error:
        raise FileError(f"cannot read the weights {path}: {error.strerror or error}") from error


def _read_pt(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's doubts about a file end in an error of ours or do not matter
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"{path} cannot be read without executing code that is stored in it, or is damaged: {_reason(error)}",
            hint="load it where you trust it and save model.state_dict() alone, best as .safetensors",
        ) from error
    except _DAMAGED as error:
        raise ExportError(f"{path} is not a torch weights file, or is cut short: {_reason(error)}") from error
    except OSError as error:
        raise FileError(f"cannot read the weights {path}: {error.strerror or error}") from error
    return _find_state(loaded, path)


def _find_state(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state_dict itself, or the one that a checkpoint wraps."""
    import torch

    if isinstance(loaded, Mapping):
        if loaded and all(isinstance(value, torch.Tensor) for value in loaded.values()):
            return {str(key): value for key, value in loaded.items()}
        for key in _WRAPPERS:
            if isinstance(loaded.get(key), Mapping):
                return _find_state(loaded[key], path)
    found = (
        f"the keys {', '.join(map(str, list(loaded)[:_SHOWN]))}"
        if isinstance(loaded, Mapping)
        else type(loaded).__name__
    )
    raise ExportError(
        f"{path} holds no state_dict but {found}", hint=f"save model.state_dict(), or under one of {_WRAPPERS}"
    )


def _reason(error: Exception) -> str:
    """The line of torch's long message that tells the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next(
        (line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0] if lines else "no reason given"
    )
    return told[:300]
