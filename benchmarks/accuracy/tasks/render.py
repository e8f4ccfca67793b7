"""Text on noisy paper, drawn with the fonts that are installed."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from pydoc_data import topics

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONTS = Path("/usr/share/fonts/truetype/dejavu")
Image8 = npt.NDArray[np.uint8]


@functools.cache
def words(part: int, parts: int = 2) -> tuple[str, ...]:
    """Every ``parts``-th of the words of Python's own help texts, in their order: no word position is in two parts."""
    text = " ".join(topics.topics.values())
    found = re.findall(r"[A-Za-z0-9][A-Za-z0-9.,;:()'-]*", text)
    return tuple(found[part::parts])


@functools.cache
def fonts() -> tuple[Path, ...]:
    """Sorted, without the mathematical one."""
    found = tuple(file for file in sorted(FONTS.glob("*.ttf")) if "Math" not in file.name)
    if not found:
        raise FileNotFoundError(f"there is no font in {FONTS}: apt-get install fonts-dejavu")
    return found


def some_text(rng: np.random.Generator, part: int, most: int) -> str:
    """A few consecutive words, at most ``most`` characters, at least one word."""
    source = words(part)
    start = int(rng.integers(len(source) - 8))
    text = source[start][:most]
    for word in source[start + 1 : start + 1 + int(rng.integers(6))]:
        if len(text) + 1 + len(word) <= most:
            text += f" {word}"
    return text


def a_font(rng: np.random.Generator, size: int) -> ImageFont.FreeTypeFont:
    """One of the machine's, in a size."""
    found = fonts()
    return ImageFont.truetype(str(found[int(rng.integers(len(found)))]), size)


def inks(rng: np.random.Generator, contrast: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Colours of paper and ink that differ by about ``contrast`` (of 255); either may be the darker."""
    paper = rng.uniform(60, 255 - 60, 3)
    sign = 1 if rng.random() < 0.5 else -1
    ink = paper + sign * contrast * rng.uniform(0.8, 1.2, 3)
    shift = np.clip(ink, 0, 255).mean() - ink.mean()  # what the clip took goes to the paper
    return tuple(np.clip(paper + shift, 0, 255).astype(int).tolist()), tuple(np.clip(ink, 0, 255).astype(int).tolist())


def text_line(rng: np.random.Generator, text: str, *, noise: float, blur: float, contrast: float) -> Image8:
    """A line of text, uint8 (height, width, 3): turned by a degree or so, blurred, uneven, noisy."""
    size = int(rng.integers(18, 40))
    font = a_font(rng, size)
    left, top, right, bottom = font.getbbox(text)
    margin = int(rng.integers(2, 8))
    paper, ink = inks(rng, contrast)
    image = Image.new("RGB", (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin), paper)
    ImageDraw.Draw(image).text((margin - left, margin - top), text, font=font, fill=ink)
    image = image.rotate(float(rng.uniform(-1.5, 1.5)), Image.Resampling.BICUBIC, fillcolor=paper)
    return spoiled(rng, image, noise=noise, blur=blur)


def page(rng: np.random.Generator, part: int, size: tuple[int, int], *, contrast: float) -> Image.Image:
    """A page of paragraphs, with a heading and maybe a picture's frame."""
    paper, ink = inks(rng, contrast)
    image = Image.new("RGB", size, paper)
    draw = ImageDraw.Draw(image)
    margin, step = int(rng.integers(10, 40)), int(rng.integers(10, 26))
    font = a_font(rng, step)
    y = margin
    while y < size[1] - margin - step:
        if rng.random() < 0.12:  # the end of a paragraph
            y += step
        text = ""
        while draw.textlength(text, font=font) < size[0] - 2 * margin - 4 * step:
            text += some_text(rng, part, 20) + " "
        if rng.random() < 0.15:
            text = text[: len(text) // 2]
        draw.text((margin, y), text, font=font, fill=ink)
        y += int(step * rng.uniform(1.25, 1.6))
    if rng.random() < 0.3:
        x, top = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
        box = (int(x), int(top), int(x) + size[0] // 3, int(top) + size[1] // 4)
        draw.rectangle(box, fill=tuple(rng.integers(256, size=3).tolist()))
    return image


def spoiled(rng: np.random.Generator, image: Image.Image, *, noise: float, blur: float) -> Image8:
    """Blur, a slope of light across the picture, Gaussian noise."""
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, blur))))
    values = np.asarray(image, np.float32)
    height, width = values.shape[:2]
    across, down = rng.uniform(-30, 30, 2)
    light = across * np.linspace(-0.5, 0.5, width) + down * np.linspace(-0.5, 0.5, height)[:, None]
    values = values + light[..., None] + rng.normal(0, rng.uniform(0, noise), values.shape)
    return values.clip(0, 255).astype(np.uint8)
