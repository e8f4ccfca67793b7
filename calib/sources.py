"""Where samples come from: ``DATA`` on a command line, or arrays and functions in Python.

===================  ============================================================================================
``x.npy``            one array, samples on axis 0; for networks of one input
``x.npz``            arrays named by input, samples on axis 0; names beyond the inputs are ignored
folder of ``.npy``   one sample or more a file, told by the array's rank; for networks of one input
folder of ``.npz``   one sample or more a file
folder of images     one sample a file, as ``--preprocess`` says; for networks of one input
``module:function``  called without arguments; returns or yields arrays or dicts. ``file.py:function`` works too
===================  ============================================================================================

Folders are read with their subfolders, in the order of sorted names. See :func:`calib.inputs.split_samples` for how
the sample axis is recognised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from calib.arrays import open_npy, open_npz
from calib.errors import DataError
from calib.images import SUFFIXES, Preprocess, complete, load_image, parse_preprocess
from calib.inputs import Column, InputSpec, MemoryColumn, Sample, count_samples, make_sample, split_samples

_FUNCTION = re.compile(r"(?P<module>[\w.]+|.*\.py):(?P<function>[A-Za-z_]\w*)")


class Source(Protocol):
    """Samples for a network, in a fixed order; each iteration starts anew."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The network's inputs."""

    @property
    def length(self) -> int | None:
        """How many samples there are; None where only reading them all would tell."""

    def __iter__(self) -> Iterator[Sample]:
        """Yield checked samples."""


def open_source(
    data: str | Path | Callable[[], Any] | Any,
    inputs: Iterable[InputSpec],
    *,
    preprocess: Preprocess | str | None = None,
) -> Source:
    """Make a source of what a user named.

    Args:
        data: A path, ``module:function``, or in Python also an array, a mapping of arrays by input name, a callable,
            or an iterable of either.
        inputs: What the network expects, from :func:`calib.inputs.model_inputs`.
        preprocess: For folders of images.

    Raises:
        DataError: it does not exist, is of no known kind, is empty, or does not fit the network.
    """
    specs = tuple(inputs)
    if not isinstance(data, (str, Path)):
        source: Source = FunctionSource(data if callable(data) else lambda: data, specs, "the data")
    elif (path := Path(data)).exists():
        source = _open_path(path, specs, preprocess)
    elif match := _FUNCTION.fullmatch(str(data)):
        source = FunctionSource(_find_function(match["module"], match["function"]), specs, str(data))
    else:
        raise DataError(
            f"the data {data} does not exist", hint="give a .npy or .npz file, a folder, or module:function"
        )
    if preprocess is not None and not isinstance(source, ImageSource):
        raise DataError(f"--preprocess is for folders of images; {data} is none", hint="leave --preprocess out")
    return source


def _open_path(path: Path, specs: tuple[InputSpec, ...], preprocess: Preprocess | str | None) -> Source:
    """Choose the source by what lies at the path."""
    if not path.is_dir():
        if path.suffix not in (".npy", ".npz"):
            raise DataError(
                f"{path} is neither a .npy nor a .npz file", hint="images are given as the folder they are in"
            )
        return FileSource((path,), specs)
    kinds: dict[str, list[Path]] = {}
    for file in path.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        suffix = file.suffix.lower()
        kind = "images" if suffix in SUFFIXES else suffix if suffix in (".npy", ".npz") else None
        if kind and not hidden and file.is_file():
            kinds.setdefault(kind, []).append(file)
    if not kinds:
        raise DataError(f"the folder {path} is empty: it holds no .npy, .npz or image file ({' '.join(SUFFIXES)})")
    if len(kinds) > 1:
        raise DataError(
            f"the folder {path} holds files of several kinds: {', '.join(sorted(kinds))}", hint="keep one kind"
        )
    kind, files = kinds.popitem()
    ordered = tuple(sorted(files, key=lambda file: file.relative_to(path).as_posix()))
    return ImageSource.create(ordered, specs, preprocess) if kind == "images" else FileSource(ordered, specs)


def _only(specs: tuple[InputSpec, ...], what: str) -> InputSpec:
    """The one input of a network that has one. Raises: DataError."""
    if len(specs) > 1:
        names = ", ".join(spec.name for spec in specs)
        raise DataError(
            f"{what} has no input names, and the model has {len(specs)} inputs: {names}", hint="use .npz files"
        )
    return specs[0]


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Samples of ``.npy`` or ``.npz`` files, each read as a stream."""

    files: tuple[Path, ...]
    inputs: tuple[InputSpec, ...]

    @property
    def length(self) -> int | None:
        """Number of samples, from the headers of all files."""
        total = 0
        for file in self.files:
            with self._columns(file) as columns:
                total += count_samples(columns, self.inputs, str(file))
        return total

    def __iter__(self) -> Iterator[Sample]:
        """Yield checked samples."""
        for file in self.files:
            with self._columns(file) as columns:
                yield from split_samples(columns, self.inputs, str(file))

    @contextlib.contextmanager
    def _columns(self, file: Path) -> Iterator[Mapping[str, Column]]:
        if file.suffix.lower() == ".npz":
            with open_npz(file) as columns:
                yield columns
        else:
            with open_npy(file) as column:
                yield {_only(self.inputs, str(file)).name: column}


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Samples of image files, decoded when they are needed."""

    files: tuple[Path, ...]
    inputs: tuple[InputSpec, ...]
    preprocess: Preprocess

    @classmethod
    def create(
        cls, files: tuple[Path, ...], specs: tuple[InputSpec, ...], preprocess: Preprocess | str | None
    ) -> ImageSource:
        """Complete the specification from the network's input. Raises: DataError."""
        spec = _only(specs, "a folder of images")
        chosen = parse_preprocess(preprocess) if isinstance(preprocess, str) else preprocess or Preprocess()
        return cls(files, specs, complete(chosen, spec))

    @property
    def length(self) -> int | None:
        """Number of images."""
        return len(self.files)

    def __iter__(self) -> Iterator[Sample]:
        """Yield checked samples."""
        spec = self.inputs[0]
        for file in self.files:
            yield make_sample({spec.name: load_image(file, self.preprocess)}, self.inputs, str(file))


@dataclasses.dataclass(frozen=True)
class FunctionSource:
    """Samples that a function returns or yields: arrays (networks of one input) or dicts of arrays by input name."""

    function: Callable[[], Any]
    inputs: tuple[InputSpec, ...]
    origin: str

    @property
    def length(self) -> int | None:
        """Not known before all samples were made."""
        return None

    def __iter__(self) -> Iterator[Sample]:
        """Yield checked samples."""
        made = _guarded(self.function, self.origin)
        if isinstance(made, Mapping) or hasattr(made, "__array__"):
            yield from split_samples(self._columns(made, self.origin), self.inputs, self.origin)
            return
        if isinstance(made, (str, bytes)) or not isinstance(made, Iterable):
            raise DataError(f"{self.origin} gives {type(made).__name__}, not arrays or dicts of arrays")
        items, number, found = iter(made), 0, 0
        end = object()
        while (item := _guarded(lambda: next(items, end), self.origin)) is not end:
            where = f"{self.origin}, item {number}"
            for sample in split_samples(self._columns(item, where), self.inputs, where):
                found += 1
                yield sample
            number += 1
        if not found:
            raise DataError(f"{self.origin} is empty: it gives no sample")

    def _columns(self, item: Any, where: str) -> dict[str, Column]:
        """Name the arrays of one item."""
        if not isinstance(item, Mapping):
            if not hasattr(item, "__array__"):
                raise DataError(
                    f"{where} is of type {type(item).__name__}; arrays or dicts of arrays by input name are needed",
                    hint="leave labels out: give the network's inputs only",
                )
            item = {_only(self.inputs, where).name: item}
        return {str(name): MemoryColumn(_numbers(value, f"{where}, array {name!r}")) for name, value in item.items()}


def _guarded(call: Callable[[], Any], origin: str) -> Any:
    """Run the user's code. Whatever it raises is theirs to mend: named with its place instead of a traceback."""
    try:
        return call()
    except (Exception, SystemExit) as error:  # foreign code may raise anything; a script may read its command line
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(
            f"{origin} failed with {type(error).__name__}: {error}", hint=f"see {frame.filename}, line {frame.lineno}"
        ) from error


def _numbers(value: Any, where: str) -> np.ndarray[Any, np.dtype[Any]]:
    """An array of numbers. Raises: DataError."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where} cannot be read as an array: {error}") from error
    if array.dtype.hasobject:
        raise DataError(f"{where} holds Python objects, not numbers")
    return array


def _find_function(module_name: str, function: str) -> Callable[[], Any]:
    """Import a module by name, from the current folder too, or a ``.py`` file by path. Raises: DataError."""
    path = Path(module_name)
    sys.path.insert(0, "")
    try:
        found = path.is_file() if path.suffix == ".py" else importlib.util.find_spec(module_name.partition(".")[0])
        if not found:
            raise DataError(
                f"there is no module {module_name!r} for the data {module_name}:{function}",
                hint="it is looked for in the current folder and among installed packages",
            )
        module = _guarded(
            lambda: _import_file(path) if path.suffix == ".py" else importlib.import_module(module_name),
            f"the import of {module_name!r}, for the data {module_name}:{function},",
        )
    finally:
        sys.path.remove("")
    made: Callable[[], Any] | None = getattr(module, function, None)
    if not callable(made):
        raise DataError(f"{module_name} has no function {function!r}")
    return made


def _import_file(path: Path) -> ModuleType:
    """Run a Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
