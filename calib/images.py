"""A folder of images as samples: one explicit line says how pixels become the network's input."""

from __future__ import annotations

import dataclasses
import math
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from calib.errors import DataError, MissingExtraError
from calib.inputs import Array, InputSpec

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")

MAX_EXTENT = 1 << 14


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes an input: ``(pixel * scale - mean) / std`` after resizing. None: as the input says.

    Attributes:
        resize: Height and width in pixels.
        fit: ``stretch``, ``letterbox`` (keep the aspect, fill with ``pad``; centred) or ``crop`` (centre).
        pad: Grey level 0..255 of the letterbox.
        filter: How pixels are resampled.
        channels: ``rgb``, ``bgr`` or ``gray``; ``mean`` and ``std`` are in this order.
        scale: Factor on pixel values 0..255.
        mean: Subtracted after ``scale``; one number, or one a channel.
        std: Divided by after ``mean``.
        layout: ``nchw`` or ``nhwc``.
        dtype: numpy name of the type that is fed.
    """

    resize: tuple[int, int] | None = None
    fit: str = "stretch"
    pad: int = 114
    filter: str = "bilinear"
    channels: str | None = None
    scale: float | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str | None = None
    dtype: str | None = None


_CHOICES = {
    "fit": ("stretch", "letterbox", "crop"),
    "filter": ("bilinear", "nearest", "bicubic", "area"),
    "channels": ("rgb", "bgr", "gray"),
    "layout": ("nchw", "nhwc"),
    "dtype": ("float32", "float16", "float64", "uint8", "int8", "int32", "int64"),
}


def parse_preprocess(text: str) -> Preprocess:
    """Read a specification such as ``resize=320x320,letterbox,scale=1/255,mean=0.485:0.456:0.406``.

    Raises:
        DataError: an unknown key (with the list of keys), a value that does not parse, or a key given twice.

    >>> parse_preprocess("resize=32x48,letterbox,scale=1/255").resize
    (32, 48)
    """
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = ("fit", "=", item) if item in _CHOICES["fit"] else item.partition("=")
        if key in values:
            raise DataError(f"--preprocess gives {key} twice: {text!r}")
        values[key] = _value(key.strip(), value.strip())
    if 0 in values.get("std", ()):
        raise DataError("--preprocess: std=0 would divide by zero")
    if values.get("scale") == 0:
        raise DataError("--preprocess: scale=0 would make every image the same")
    if not 0 <= values.get("pad", 0) <= 255:
        raise DataError(f"--preprocess pad={values['pad']} is not in 0..255")
    if not all(0 < extent <= MAX_EXTENT for extent in values.get("resize", ())):
        raise DataError(f"--preprocess resize must be between 1x1 and {MAX_EXTENT}x{MAX_EXTENT}")
    return Preprocess(**values)


def _value(key: str, text: str) -> Any:
    """Parse one value by its key."""
    if key in _CHOICES:
        if text not in _CHOICES[key]:
            raise DataError(f"--preprocess {key}={text!r} is not one of {', '.join(_CHOICES[key])}")
        return text
    try:
        if key == "resize":
            height, width = (int(part) for part in text.lower().split("x"))
            return height, width
        if key == "pad":
            return int(text)
        if key in ("mean", "std"):
            return tuple(_ratio(part) for part in text.split(":"))
        if key == "scale":
            return _ratio(text)
    except (ValueError, ZeroDivisionError) as error:
        raise DataError(
            f"--preprocess {key}={text!r} cannot be read",
            hint="examples: resize=320x320, scale=1/255, mean=0.485:0.456:0.406",
        ) from error
    keys = ", ".join(field.name for field in dataclasses.fields(Preprocess))
    raise DataError(
        f"--preprocess has no key {key!r}", hint=f"the keys are {keys}; letterbox is short for fit=letterbox"
    )


def _ratio(text: str) -> float:
    """A finite number, or one number over another. Raises: ValueError, ZeroDivisionError."""
    top, _, bottom = text.partition("/")
    value = float(top) / float(bottom or 1)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def complete(preprocess: Preprocess, spec: InputSpec) -> Preprocess:
    """Fill what was left open from the network's input.

    Raises:
        DataError: the input has no rank 4, or the layout cannot be told.
    """
    if spec.shape is None or len(spec.shape) != 4:
        raise DataError(
            f"input {spec} does not take images: it is not of rank 4", hint="give .npy or .npz files instead of images"
        )
    layout = preprocess.layout or _layout(spec)
    channels, size = (spec.shape[1], spec.shape[2:]) if layout == "nchw" else (spec.shape[3], spec.shape[1:3])
    return dataclasses.replace(
        preprocess,
        layout=layout,
        channels=preprocess.channels or ("gray" if channels == 1 else "rgb"),
        resize=preprocess.resize or ((size[0], size[1]) if size[0] and size[1] else None),
        scale=preprocess.scale if preprocess.scale is not None else (1.0 if spec.dtype.kind in "iu" else 1 / 255),
        dtype=preprocess.dtype or spec.dtype.name,
    )


def _layout(spec: InputSpec) -> str:
    """Tell NCHW from NHWC by where the 1 or 3 channels are."""
    shape = spec.shape or ()
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if last and not first:
        return "nhwc"
    if first or shape[1] is None:
        return "nchw"
    raise DataError(
        f"input {spec} has neither 1 nor 3 channels, so its layout cannot be told", hint="give layout=nchw or nhwc"
    )


def load_image(path: Path, preprocess: Preprocess) -> Array:
    """Read one image and apply a completed specification. Rotation by EXIF is applied, an alpha channel is dropped.

    Returns:
        ``(1, C, H, W)`` or ``(1, H, W, C)`` of ``preprocess.dtype``.

    Raises:
        DataError: it is not an image, is damaged, is absurdly large or has 16-bit pixels.
        MissingExtraError: Pillow is not installed.
    """
    pixels = np.asarray(_resized(path, preprocess)).astype(np.float32)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if preprocess.channels == "bgr":
        pixels = pixels[:, :, ::-1]
    mean, std = np.array(preprocess.mean, np.float32), np.array(preprocess.std, np.float32)
    if not {mean.size, std.size} <= {1, pixels.shape[2]}:
        raise DataError(
            f"--preprocess: mean and std need 1 or {pixels.shape[2]} numbers, not {mean.size} and {std.size}"
        )
    values = (pixels * np.float32(preprocess.scale) - mean) / std
    if preprocess.dtype and np.dtype(preprocess.dtype).kind in "iu":
        values = np.rint(values)
        limits = np.iinfo(preprocess.dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise DataError(f"{path}: pixel values do not fit {preprocess.dtype}", hint="mend scale, mean or dtype")
    values = values[None] if preprocess.layout == "nhwc" else values.transpose(2, 0, 1)[None]
    return np.ascontiguousarray(values.astype(preprocess.dtype))


def _resized(path: Path, preprocess: Preprocess) -> Any:
    """Decode and resize; every way in which Pillow says that a file is no good becomes a DataError."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingExtraError("PIL", extra="images", purpose="reading images") from error
    damage = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes below our limit, and of EXIF it cannot read
            with Image.open(path) as opened:
                _check_opened(path, opened, Image.MAX_IMAGE_PIXELS or 1 << 27)
                image = ImageOps.exif_transpose(opened).convert("L" if preprocess.channels == "gray" else "RGB")
    except damage as error:
        raise DataError(f"{path} is not a readable image: {error}", hint="remove it or make it again") from error
    how = Image.Resampling({"bilinear": 2, "nearest": 0, "bicubic": 3, "area": 4}[preprocess.filter])
    if preprocess.resize is None:
        return image
    size = preprocess.resize[::-1]
    if preprocess.fit == "letterbox":
        color = preprocess.pad if image.mode == "L" else (preprocess.pad,) * 3
        return ImageOps.pad(image, size, how, color=color)
    return ImageOps.fit(image, size, how) if preprocess.fit == "crop" else image.resize(size, how)


def _check_opened(path: Path, opened: Any, most_pixels: int) -> None:
    """Refuse by the header alone what would take too much memory, or has more than 8 bits a channel."""
    if opened.width * opened.height > most_pixels:
        raise DataError(f"{path} has {opened.width} x {opened.height} pixels; the limit is {most_pixels}")
    if opened.mode.startswith(("I", "F")):
        raise DataError(f"{path} has pixels of mode {opened.mode}, not 8 bits", hint="convert it to 8 bits a channel")
