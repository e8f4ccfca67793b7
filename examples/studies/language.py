"""The paper's Table 2 in small: a BERT-like encoder that reads sentences, GELU to ReLU with the KL loss.

pip download --no-deps --no-binary :all: --dest study-run vaderSentiment==3.3.2
python examples/studies/language.py
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification

from calib.files import atomic_path, make_folder
from deploy import Speed, deploy, engine_outputs, measure, warned
from harness import (
    Job,
    Options,
    Values,
    claim,
    job_folder,
    over_seeds,
    paired,
    parse_options,
    publish,
    run_jobs,
    share,
    spread,
    table,
)  # fmt: skip
from language_data import (
    ARCHIVE,
    LENGTH,
    NEUTRAL,
    SPECIAL,
    SPLITS,
    VOCABULARY,
    Array,
    encode,
    load_sentences,
    train_tokenizer,
)  # fmt: skip
from relu_deploy.distill.config import DistillConfig
from relu_deploy.distill.distiller import Distiller
from relu_deploy.distill.tasks import LanguageTask
from relu_deploy.errors import DataError
from relu_deploy.export import ExampleInput

INPUTS = ("input_ids", "attention_mask")
WIDTH, LAYERS, HEADS, DROPOUT, DEVIATION = 64, 2, 4, 0.1, 0.05
EPOCHS, BATCH, LEARNING_RATE, CALIBRATION = 2, 64, 1e-3, 256
SMOKE = 512  # sentences of each part
PAPER = 99.0  # about what transformers keep, by the paper's summary

# Name in the table: recipe, activation at the end, where the weights come from, loss.
ROWS: dict[str, tuple[str, str, str, str]] = {
    "B": ("B", "GELU", "random", "task"),
    "KD": ("KD", "ReLU", "random", "distill"),
    "B+KD": ("B+KD", "ReLU", "original", "distill"),
    "B+KD-SAT": ("B+KD-SAT", "ReLU", "original", "distill"),
    "iterative": ("iterative", "ReLU", "original", "distill"),
    "KD, GELU kept": ("B", "GELU", "random", "distill"),
}
ENGINES = {"GELU": "B", "ReLU": "B+KD"}  # whose engine is timed for an activation


class Encoded(Dataset[Any]):
    """One part of the data, as the distiller takes it: a dict of inputs, and a label."""

    def __init__(self, arrays: Mapping[str, Array], count: int | None = None) -> None:
        self.inputs = {name: torch.from_numpy(arrays[name][:count]) for name in INPUTS}
        self.labels = torch.from_numpy(arrays["label"][:count])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {name: values[index] for name, values in self.inputs.items()}, self.labels[index]

    def arrays(self) -> dict[str, Array]:
        """The inputs as an engine takes them."""
        return {name: values.numpy() for name, values in self.inputs.items()}


def main() -> None:
    """Run the study."""
    options = parse_options("the paper's Table 2 in small: a BERT-like encoder, GELU to ReLU with the KL loss")
    if options.smoke:
        options = dataclasses.replace(options, seeds=1, seconds=min(options.seconds, 1.0))
    try:
        data, counts = prepare(options.folder)
    except DataError as error:
        sys.exit(f"{error.message}\n{error.hint}")
    results = run_jobs([job_of("B", seed, data, options) for seed in range(options.seeds)], options)
    students = [job_of(row, seed, data, options) for row in ROWS if row != "B" for seed in range(options.seeds)]
    results |= run_jobs(students, options)
    forms = {activation: job_name(row, 0) for activation, row in ENGINES.items()}
    speeds, warnings = measure(forms, options, base="GELU")
    title = "Language: a BERT-like encoder, GELU to ReLU with the KL loss (the paper's Table 2)"
    publish(options, "language", title, page(results, speeds, warnings, counts, options))


def prepare(folder: Path) -> tuple[Path, dict[str, int]]:
    """Read the sentences, make the vocabulary of the training part, and write all parts encoded.

    Returns:
        The file, and the number of sentences in each part.

    Raises:
        DataError: the sentences are missing or damaged.
    """
    sentences = load_sentences(folder / ARCHIVE)
    parts = {split: [sentence for sentence in sentences if sentence.split == split] for split in SPLITS}
    tokenizer = train_tokenizer([sentence.text for sentence in parts["train"]])
    arrays: dict[str, Array] = {}
    for split, part in parts.items():
        encoded = encode(tokenizer, [sentence.text for sentence in part])
        labels = np.asarray([sentence.label for sentence in part], np.int64)
        arrays |= {f"{split}.{name}": values for name, values in {**encoded, "label": labels}.items()}
    make_folder(folder)
    target = folder / "language-data.npz"
    with atomic_path(target) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)
    return target, {split: len(part) for split, part in parts.items()}


def job_of(row: str, seed: int, data: Path, options: Options) -> Job:
    """One training of a row."""
    recipe, _, weights, loss = ROWS[row]
    teacher = None if row == "B" else str(job_folder(job_name("B", seed), options))
    settings = {
        "recipe": recipe, "weights": weights, "loss": loss, "teacher": teacher, "seed": seed, "epochs": EPOCHS,
        "learning_rate": LEARNING_RATE, "network": json.dumps(_network()), "data": str(data), "digest": _digest(data),
    }  # fmt: skip
    return Job(job_name(row, seed), train, settings, options.smoke)


def job_name(row: str, seed: int) -> str:
    """Its folder."""
    return f"language-{row.lower().replace('+', '-').replace(', ', '-').replace(' ', '-')}-s{seed}"


def train(job: Job, folder: Path) -> Values:
    """Train, deploy and score one network; runs in a process of its own."""
    settings, count = job.settings, SMOKE if job.smoke else None
    with np.load(settings["data"]) as stored:
        parts = {
            split: Encoded({name: stored[f"{split}.{name}"] for name in (*INPUTS, "label")}, count) for split in SPLITS
        }
    original = make_network(settings["seed"])
    if settings["teacher"] is not None:
        original.load_state_dict(load_file(Path(settings["teacher"]) / "training" / "student.safetensors"))
    distiller = Distiller(
        original,
        train=parts["train"],
        evaluate=parts["validation"],
        config=DistillConfig(
            recipe=settings["recipe"], weights=settings["weights"], loss=settings["loss"], task="language",
            epochs=1 if job.smoke else settings["epochs"], batch_size=BATCH, learning_rate=settings["learning_rate"],
            seed=settings["seed"],
            evaluate_epochs=settings["epochs"],
        ),
        out=folder / "training",
        task=LanguageTask(2),
        fresh=lambda: make_network(settings["seed"]),
    )  # fmt: skip
    report = distiller.run(resume=True)
    assert distiller.student is not None
    scores: dict[str, Values] = {}

    def score(engine: Path) -> float:
        scores[engine.name] = accuracy_and_f1(engine, parts["test"])
        return scores[engine.name]["accuracy"]

    values = deploy(
        distiller.student,
        folder,
        inputs=[
            ExampleInput("input_ids", (2, LENGTH), "int64", len(SPECIAL), VOCABULARY - 1),
            ExampleInput("attention_mask", (2, LENGTH), "int64", 1, 1),
        ],
        calibration={name: values[:CALIBRATION] for name, values in parts["validation"].arrays().items()},
        score=score,
    )
    precise, coarse = scores.values()
    return {
        **values, "f1": precise["f1"], "f1_int8": coarse["f1"], "validation": 100 * report.metrics["accuracy"],
        "loss": next(iter(report.epochs[-1]["losses"].values())), "seconds": report.seconds,
    }  # fmt: skip


def make_network(seed: int) -> nn.Module:
    """BERT with random weights, its GELU in place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(BertConfig(**_network()))


def accuracy_and_f1(engine: Path, data: Encoded) -> Values:
    """Of an engine's answers, in percent; F1 is the mean over both classes."""
    (logits,) = engine_outputs(engine, data.arrays()).values()
    measures = LanguageTask(2).measures()
    measures.update(torch.from_numpy(logits), data.labels)
    return {name: 100 * float(value) for name, value in measures.compute().items()}


def page(
    results: Mapping[str, Values],
    speeds: Mapping[str, Speed],
    warnings: Sequence[str],
    counts: Mapping[str, int],
    options: Options,
) -> list[str]:
    """What the numbers are, the table, and the paper's claims."""
    names = {row: [job_name(row, seed) for seed in range(options.seeds)] for row in ROWS}
    setting = (
        f"BERT with {LAYERS} layers of width {WIDTH} and {HEADS} heads, {LENGTH} tokens, {VOCABULARY} entries of "
        f"vocabulary, trained from random weights for {EPOCHS} epochs, without the pre-training that the paper's had; "
        "students are trained for as many epochs. Task: is a sentence "
        f"positive or negative? Tweets, film reviews, product reviews and editorials with ratings beyond ±{NEUTRAL}: "
        f"{counts['train']} to train, {counts['validation']} to choose settings and to calibrate, {counts['test']} to "
        "test; no sentence and no text lies in two parts."
    )
    columns = (
        "Accuracy and F1 in percent, of engines for ONNX Runtime; differences are paired by seed. QPS is that of the "
        "INT8 engines at batch 1, with the ratio to B's and its 95 % interval: engines of one activation have one "
        "graph, so one was timed. What stays in float are the products of two activations in the attention. "
        '"KD, GELU kept" is no row of the paper: it tells what the loss does from what ReLU does.'
    )
    listed = "\n".join(claims(names, results))
    parts = [setting, table(HEADINGS, [row_of(row, names, results, speeds) for row in ROWS]), columns]
    told = "The paper's claims, in points of accuracy (FP32), seed by seed:"
    return [*parts, told, listed, *warned(warnings)]


HEADINGS = (
    "method", "activation", "QPS", "ratio", "accuracy", "F1", "accuracy - B's", "% of B's accuracy",
    "accuracy in INT8", "INT8 - FP32", "int8 layers",
)  # fmt: skip


def row_of(
    row: str, names: Mapping[str, Sequence[str]], results: Mapping[str, Values], speeds: Mapping[str, Speed]
) -> list[str]:
    """A line of the table."""
    activation = ROWS[row][1]
    mine = {key: over_seeds(results, names[row], key) for key in ("fp32", "int8", "f1")}
    base = over_seeds(results, names["B"], "fp32")
    first = results[names[row][0]]
    return [
        row, activation, f"{speeds[activation].throughput:.0f}", speeds[activation].ratio,
        spread(mine["fp32"], digits=1), spread(mine["f1"], digits=1),
        "" if row == "B" else paired(mine["fp32"], base, digits=1), f"{share(mine['fp32'], base):.1f}",
        spread(mine["int8"], digits=1), paired(mine["int8"], mine["fp32"], digits=1),
        f"{first['int8_layers']:.0f} of {first['layers']:.0f}",
    ]  # fmt: skip


def claims(names: Mapping[str, Sequence[str]], results: Mapping[str, Values]) -> list[str]:
    """What the paper says of BERT, and whether it is so here."""
    accuracy = {row: over_seeds(results, names[row], "fp32") for row in ROWS}
    kept = share(accuracy["B+KD"], accuracy["B"])
    return [
        claim("B+KD over B (the paper: 82.51 and 81.48 % exact match)", accuracy["B+KD"], accuracy["B"]),
        claim("KD over B (the paper: 82.47 and 81.48)", accuracy["KD"], accuracy["B"]),
        claim("B+KD over KD (the paper's are nearly equal)", accuracy["B+KD"], accuracy["KD"]),
        f"- B+KD keeps at least {PAPER} % of B: {kept:.1f} %: {'yes' if kept >= PAPER else 'no'}",
        claim("not the paper's: KD with ReLU over KD with GELU", accuracy["KD"], accuracy["KD, GELU kept"]),
    ]


def _network() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH, "max_position_embeddings": LENGTH, "type_vocab_size": 1, "num_labels": 2,
        "hidden_act": "gelu", "hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": 0.0,
        "initializer_range": DEVIATION, "pad_token_id": 0,
    }  # fmt: skip


def _digest(path: Path) -> str:
    """Of the encoded arrays; the file itself has times in it."""
    digest = hashlib.sha256()
    with np.load(path) as stored:
        for name in sorted(stored.files):
            digest.update(name.encode() + stored[name].tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
