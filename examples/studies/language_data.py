"""Sentences with the mean of twenty people's ratings, from the source package of vaderSentiment 3.3.2.

Tweets, and sentences of film reviews, product reviews and editorials (Hutto and Gilbert, ICWSM 2014). They belong to
their authors, so they are read out of the package that a user downloads, and nothing of them is kept in a repository.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import io
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from relu_deploy.errors import DataError

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
DOWNLOAD = "pip download --no-deps --no-binary :all: --dest {folder} vaderSentiment==3.3.2"
SPECIAL = PAD, CLS, SEP = "[PAD]", "[CLS]", "[SEP]"
LENGTH, VOCABULARY = 32, 8000
NEUTRAL = 0.5  # of ratings from -4 to 4: between -0.5 and 0.5 the raters saw no sentiment, or did not agree

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Array = npt.NDArray[Any]

_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_TABLE = re.compile(r"hutto_ICWSM_2014/(\w+)_GroundTruth\.txt")


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One rated sentence.

    Attributes:
        group: Where it comes from: the review or editorial, whose sentences all lie in one part; a tweet is its own.
        rating: Mean of the raters, -4 (most negative) to 4.
        text: As written.
    """

    group: str
    rating: float
    text: str

    @property
    def label(self) -> int:
        """1 is positive, 0 negative."""
        return int(self.rating > 0)

    @property
    def key(self) -> str:
        """What makes it a duplicate of another: letters and digits, in lower case."""
        return " ".join(re.findall(r"\w+", html.unescape(self.text).lower()))

    @property
    def split(self) -> Split:
        """Its part, by the hash of its group: one fifth is test, one tenth validation."""
        share = int.from_bytes(hashlib.sha256(self.group.encode()).digest()[:4], "big") / 2**32
        return "test" if share < 0.2 else "validation" if share < 0.3 else "train"


def load_sentences(archive: Path) -> list[Sentence]:
    """All sentences with a sentiment, no two alike, the sources mixed.

    Raises:
        DataError: the archive is missing or damaged.
    """
    again = DOWNLOAD.format(folder=archive.parent)
    try:
        with tarfile.open(archive) as outer, tarfile.open(fileobj=io.BytesIO(_read(outer, _INNER))) as inner:
            names = sorted(name for name in inner.getnames() if _TABLE.fullmatch(name))
            found = [sentence for name in names for sentence in _sentences(name, _read(inner, name))]
    except FileNotFoundError:
        raise DataError(f"the sentences are missing: there is no {archive}", hint=again) from None
    except (OSError, tarfile.TarError, EOFError, ValueError, KeyError) as error:
        raise DataError(f"{archive} is damaged: {error}", hint=f"remove it, then: {again}") from None
    return select(found)


def select(sentences: Iterable[Sentence]) -> list[Sentence]:
    """Drop those without a sentiment, and of those that read alike all but the first; mix what is left.

    The order is that of a hash, so that the first few are from all sources: calibration takes the first few.
    """
    first: dict[str, Sentence] = {}
    for sentence in sentences:
        first.setdefault(sentence.key, sentence)
    kept = {key: sentence for key, sentence in first.items() if key and abs(sentence.rating) > NEUTRAL}
    return [kept[key] for key in sorted(kept, key=lambda key: hashlib.sha256(key.encode()).digest())]


def train_tokenizer(texts: Sequence[str], *, size: int = VOCABULARY, length: int = LENGTH) -> Tokenizer:
    """Byte pair encoding with a vocabulary made of ``texts``; the same texts give the same one.

    Not WordPiece: its trainer breaks ties by the order of a hash table, which is another one in each process.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator([html.unescape(text) for text in texts], trainer)
    tokenizer.post_processor = processors.BertProcessing((SEP, SPECIAL.index(SEP)), (CLS, SPECIAL.index(CLS)))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=SPECIAL.index(PAD), pad_token=PAD)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Array]:
    """What the network takes: int64 ``input_ids`` and ``attention_mask``, each (N, length)."""
    encoded = tokenizer.encode_batch([html.unescape(text) for text in texts])
    return {
        "input_ids": np.asarray([item.ids for item in encoded], np.int64),
        "attention_mask": np.asarray([item.attention_mask for item in encoded], np.int64),
    }


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise ValueError(f"{name} is no file")
    return member.read()


def _sentences(name: str, content: bytes) -> list[Sentence]:
    """The lines of a file: number, rating and text; in ``12_3`` the number before ``_`` is that of the text."""
    rows = (line.split("\t") for line in content.decode("utf-8").splitlines())
    return [Sentence(f"{name}:{number.partition('_')[0]}", float(rating), text) for number, rating, text in rows]
