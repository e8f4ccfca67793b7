"""What every target shares: how a build is asked for, what it reports, and how an engine is opened and run.

Opening and running imports neither onnx nor graphsurgeon: a process that only runs engines starts without them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from relu_deploy.engines.audit import Audit
from relu_deploy.errors import DataError, EngineError
from relu_deploy.targets import TARGETS, Target
from relu_deploy.tensors import TensorSpec

if TYPE_CHECKING:
    import onnx

Arrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class ShapeRange:
    """The shapes an engine has to accept at one dynamic input, and the one it is made fastest for.

    Raises:
        EngineError: the three differ in length, or are not ordered axis by axis.
    """

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.minimum), len(self.optimum), len(self.maximum)}
        ordered = zip(self.minimum, self.optimum, self.maximum, strict=False)
        if len(lengths) != 1 or not all(0 <= low <= middle <= high for low, middle, high in ordered):
            raise EngineError(
                f"a shape range needs min <= opt <= max on every axis, not {self.minimum}, {self.optimum}, "
                f"{self.maximum}"
            )


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """How an engine is to be built. Checked once, here.

    Attributes:
        target: The runtime.
        sm: Compute capabilities without the dot, for ``tensorrt-rtx`` (89 is an RTX 4090); other targets ignore it.
        shapes: Range of each dynamic input, by name; TensorRT needs one, ONNX Runtime does not.
        optimization_level: TensorRT's 0 to 5; None leaves the compiler's default.
        workspace_mib: Most scratch memory a kernel may take on the card, MiB; None: no limit.
        require_int8: Write no engine when a layer that the Q/DQ network promised in int8 runs in float.
        log: Also write TensorRT's verbose build log here.

    Raises:
        EngineError: a value is out of range, naming it.
    """

    target: Target = "ort"
    sm: tuple[str, ...] = ("89",)
    shapes: Mapping[str, ShapeRange] = dataclasses.field(default_factory=dict)
    optimization_level: int | None = None
    workspace_mib: int | None = None
    require_int8: bool = False
    log: Path | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise EngineError(f"unknown target {self.target!r}", hint=f"one of {', '.join(TARGETS)}")
        if not self.sm or len(set(self.sm)) != len(self.sm) or not all(re.fullmatch(r"\d{2,3}", sm) for sm in self.sm):
            raise EngineError(f"{self.sm} is not a list of compute capabilities", hint="for example 89, or 86 and 120")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise EngineError(f"optimisation level {self.optimization_level} is not between 0 and 5")
        if self.workspace_mib is not None and self.workspace_mib <= 0:
            raise EngineError(f"a workspace of {self.workspace_mib} MiB is not positive")


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What was built, with what, from what, and what the compiler made of it.

    Attributes:
        target: The runtime the engine is for.
        sm: Compute capabilities it was compiled for; empty for ``ort``.
        versions: Package name -> version, of everything that took part.
        model_sha256: Fingerprint of the network (:func:`calib.fingerprint.model_fingerprint`).
        model_bytes: Size of the network's stored tensors.
        engine_bytes: Size of the engine, with external data where it has some.
        build_seconds: Wall time of the compiler.
        inputs: What the engine takes.
        outputs: What it gives.
        shapes: Shape ranges it accepts, by input; empty where it has no profile.
        audit: What the compiler really did.
        disagreements: Where that differs from what the Q/DQ network promised; empty when all is as promised.
    """

    target: Target
    sm: tuple[str, ...]
    versions: dict[str, str]
    model_sha256: str
    model_bytes: int
    engine_bytes: int
    build_seconds: float
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shapes: dict[str, ShapeRange]
    audit: Audit
    disagreements: tuple[str, ...]


class Engine(Protocol):
    """An open engine."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it takes."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it gives."""

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """One inference: every input by name in, every output by name out.

        Raises:
            DataError: a name, shape or dtype is not what the engine takes.
            EngineError: the runtime failed.
        """


class Backend(Protocol):
    """A target: builds engines and opens them."""

    def check(self, model: onnx.ModelProto, config: BuildConfig) -> None:
        """Refuse a build that cannot succeed, before anyone calibrates for it; compiles nothing.

        Args:
            model: What will be built, or the float network it will be made from: the inputs are the same.
            config: As for :meth:`build`.

        Raises:
            EngineError: a shape range is missing or does not fit, or the compiler does not know the card.
            MissingExtraError, BackendUnavailableError: the package or the GPU it needs is not there.
        """

    def build(self, model: Path | onnx.ModelProto, out: Path, config: BuildConfig) -> BuildReport:
        """Compile ``model`` into ``out``, with its manifest ``<out>.json`` beside it; both whole or not at all.

        Raises:
            ModelError, FileError: the model cannot be read, or ``out`` not written.
            EngineError: the compiler refused it, naming the node where that is known.
            CheckFailedError: ``config.require_int8`` and a promised layer is not int8.
            MissingExtraError, BackendUnavailableError: the package or the GPU it needs is not there.
        """

    def open(self, engine: Path, *, threads: int | None = None) -> AbstractContextManager[Engine]:
        """Load an engine for as long as the context lasts.

        Args:
            engine: Written by :meth:`build`; its manifest has to lie beside it.
            threads: CPU threads for ``ort`` (None: one for each physical core); a GPU engine ignores it.

        Raises:
            FileError: the engine or its manifest is missing.
            EngineError: the engine is not the one its manifest describes, or cannot be loaded.
            BackendUnavailableError: no GPU, driver or package to run it with.
        """


def get_backend(target: str) -> Backend:
    """The backend of a target. Imports nothing that is not installed with the core package.

    Raises:
        EngineError: unknown target.
    """
    if target == "ort":
        from relu_deploy.engines.ort import OrtBackend

        return OrtBackend()
    if target in ("tensorrt-rtx", "tensorrt"):
        from relu_deploy.engines.tensorrt import TensorRTBackend

        return TensorRTBackend("tensorrt-rtx" if target == "tensorrt-rtx" else "tensorrt")
    raise EngineError(f"unknown target {target!r}", hint=f"one of {', '.join(TARGETS)}")


def check_feeds(specs: tuple[TensorSpec, ...], feeds: Mapping[str, npt.NDArray[Any]]) -> None:
    """Refuse feeds that do not fit, before a runtime says so in its own words.

    Raises:
        DataError: an input is missing or unknown, or its rank, a fixed axis or its dtype differs.
    """
    names = [spec.name for spec in specs]
    missing, unknown = [n for n in names if n not in feeds], [n for n in feeds if n not in names]
    if missing or unknown:
        wrong = [f"missing {', '.join(missing)}"] if missing else []
        wrong += [f"unknown {', '.join(unknown)}"] if unknown else []
        raise DataError(f"wrong inputs: {'; '.join(wrong)}", hint=f"the engine takes {', '.join(map(str, specs))}")
    for spec in specs:
        value = feeds[spec.name]
        fits = spec.accepts(value.shape)
        if not fits or value.dtype.name != spec.dtype:
            raise DataError(
                f"input {spec.name!r} is {value.dtype.name}{list(value.shape)}; the engine takes {spec}",
                hint=f"convert it with .astype({spec.dtype!r})" if fits else None,
            )
