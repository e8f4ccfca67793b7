"""Study (e): Table 1 of "ReLU for inference acceleration" on a small detector, SiLU against ReLU.

    python examples/studies/detection.py

The detector is of YOLOX's kind (``detector_network.py``), its images are canvases made of Fashion-MNIST
(``detection_data.py``; ``apt-get install dataset-fashion-mnist``). The paper's rows:

- ``B``: SiLU, from random weights, with the detector's own loss;
- ``KD``: ReLU, from random weights, with the detector's loss and channel-wise distillation (equation 4) from B;
- ``B+KD``: the same from B's weights;
- ``B+KD-SAT``: the same with equation 6's slow change from SiLU to ReLU.

"B, trained on" is the original after as many further epochs as the students have, with its own loss: what a student
gains over B by having been trained for longer, it has too. The students of a seed have the B of that seed as their
teacher, and all have the same canvases and the same number of epochs, half of B's: a KD student, which starts from
nothing, has seen less than B has.

Hyperparameters were chosen with one run each on held-out canvases, which are made of training images that no training
canvas shows: for B a rate of 5e-3 against 3e-3 with batches of 16 (no difference, so the cheaper one), for B+KD 3e-3
against 1e-3 and a weight of the distillation of 20 against 1 (little difference). KD has B's rate, the others have
B+KD's. The distilled layer is the end of the neck, after Guo et al. 2021, whom the paper cites; no other was compared.
Test canvases are made of test images; nothing was chosen on them. Accuracy, in FP32 and in INT8, is that of the engines
that are deployed, not of the torch networks.

It takes about ten minutes on two processors that do nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.files import make_folder
from deploy import Speed, deploy, engine_outputs, measure, warned
from detection_data import Canvases, Split, as_input, canvases, load_canvases, save_canvases
from detector_loss import detection_loss
from detector_network import Detector, decode
from harness import (
    Job,
    Options,
    Values,
    claim,
    over_seeds,
    paired,
    parse_options,
    publish,
    run_jobs,
    share,
    spread,
    table,
)
from relu_deploy.distill.config import DistillConfig, RecipeName
from relu_deploy.distill.distiller import Distiller
from relu_deploy.distill.tasks import DetectionTask
from relu_deploy.export import ExampleInput
from relu_deploy.export.weights import load_weights

TITLE = "Detection (table 1 of the paper): a small YOLOX on canvases of Fashion-MNIST"
COUNTS: dict[Split, int] = {"train": 5000, "held-out": 500, "test": 1000}
SMOKE_COUNTS: dict[Split, int] = {"train": 96, "held-out": 32, "test": 32}
BATCH = 32
DISTILL_WEIGHT = 20.0
LAYERS = ("neck",)  # whose outputs equation 4 compares
CALIBRATION = 256  # canvases of the training set
PAPER = 97.4  # the least that a B+KD student kept in the paper's table 1 (DamoYolo)
HEADINGS = (
    "method", "activation", "FPS INT8", "ratio to SiLU INT8 [95 %]", "AP", "AP50", "AP75", "AP INT8", "AP against B",
    "% of B kept", "INT8 against FP32", "INT8 layers",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """What is trained in a row of the table.

    Attributes:
        recipe: Of the distiller.
        activation: At the end.
        epochs: Over the training canvases.
        rate: Peak of the learning rate.
        student: It has the B of its seed as its original; else it starts from nothing.
    """

    recipe: RecipeName
    activation: str
    epochs: int
    rate: float
    student: bool = True


ROWS = {
    "B": Row("B", "SiLU", 4, 5e-3, student=False),
    "B, trained on": Row("B", "SiLU", 2, 3e-3),
    "KD": Row("KD", "ReLU", 2, 5e-3),
    "B+KD": Row("B+KD", "ReLU", 2, 3e-3),
    "B+KD-SAT": Row("B+KD-SAT", "ReLU", 2, 3e-3),
}


def main() -> None:
    options = parse_options(TITLE)
    if options.smoke:  # a minute is enough for one seed
        options = dataclasses.replace(options, seeds=1)
    make_folder(options.folder)
    for split, count in (SMOKE_COUNTS if options.smoke else COUNTS).items():
        file = canvas_file(options.folder, split, options.smoke)
        if not file.is_file():
            save_canvases(canvases(split, count), file)
    jobs = [make_job(title, seed, options) for title in ROWS for seed in range(options.seeds)]
    results = run_jobs([job for job in jobs if not job.settings["student"]], options)  # the others' teachers
    results |= run_jobs([job for job in jobs if job.settings["student"]], options)
    forms = {"SiLU": job_name("B", 0), "ReLU": job_name("B+KD", 0)}
    speeds, warnings = measure(forms, options, base="SiLU")
    publish(options, "detection", TITLE, [*page(results, speeds, options), *warned(warnings)])


def job_name(title: str, seed: int) -> str:
    """A folder's name."""
    return f"{title.replace(', ', '-').replace(' ', '-')}-{seed}"


def canvas_file(folder: Path, split: Split, smoke: bool) -> Path:
    """Canvases are made once for all jobs."""
    return folder / f"canvases-{split}{'-smoke' if smoke else ''}.npz"


def make_job(title: str, seed: int, options: Options) -> Job:
    """One training of a row."""
    settings = {**dataclasses.asdict(ROWS[title]), "seed": seed, "distill_weight": DISTILL_WEIGHT, "layers": [*LAYERS]}
    if options.smoke:
        settings["epochs"] = 1
    return Job(job_name(title, seed), train, settings, options.smoke)


def train(job: Job, folder: Path) -> Values:
    """Train, deploy and score one network."""
    seed, epochs = job.settings["seed"], job.settings["epochs"]
    data: dict[Split, Canvases] = {s: load_canvases(canvas_file(folder.parents[1], s, job.smoke)) for s in COUNTS}
    torch.manual_seed(seed)
    original = Detector()
    if job.settings["student"]:
        load_weights(original, folder.parent / job_name("B", seed) / "training" / "student.safetensors")
    config = DistillConfig(
        recipe=job.settings["recipe"], task="detection", epochs=epochs, batch_size=BATCH, seed=seed,
        learning_rate=job.settings["rate"], distill_weight=DISTILL_WEIGHT, clip_norm=10.0, channels_last=True,
        evaluate_epochs=epochs,
    )  # fmt: skip
    distiller = Distiller(
        original, train=data["train"], evaluate=data["held-out"], config=config, out=folder / "training",
        task=make_task(), fresh=Detector,
    )  # fmt: skip
    report = distiller.run(resume=True)
    assert distiller.student is not None
    return {
        "held_out": 100 * report.metrics["map"],
        **deploy_and_score(distiller.student, folder, data["train"], data["test"]),
    }


def make_task() -> DetectionTask:
    """The detector's loss, and how its outputs become boxes."""
    return DetectionTask(
        LAYERS,
        loss=detection_loss,
        predict=lambda maps: decode({name: values.numpy() for name, values in maps.items()}),
    )


def deploy_and_score(model: nn.Module, folder: Path, calibration: Canvases, test: Canvases) -> Values:
    """Both engines, and their average precisions in percent."""
    scores: dict[str, Values] = {}

    def score(engine: Path) -> float:
        found = decode(engine_outputs(engine, {"image": as_input(test.images)}))
        scores[engine.name] = average_precision(found, test.targets)
        return scores[engine.name]["ap"]

    values = deploy(
        model,
        folder,
        inputs=[ExampleInput("image", (2, 1, 64, 64))],
        calibration={"image": as_input(calibration.images[:CALIBRATION])},
        score=score,
    )
    precise, coarse = scores.values()
    return {**values, **precise, **{f"{name}_int8": value for name, value in coarse.items()}}


def average_precision(found: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]) -> Values:
    """COCO's ``ap`` (over overlaps of 0.50 to 0.95), ``ap50`` and ``ap75``, in percent."""
    measures = make_task().measures()
    measures.update(list(found), list(targets))
    values = measures.compute()
    return {name: 100 * float(values[key]) for name, key in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75"))}


def page(results: Mapping[str, Values], speeds: Mapping[str, Speed], options: Options) -> list[str]:
    """The table, the paper's claims, and what the numbers are."""
    names = {title: [job_name(title, seed) for seed in range(options.seeds)] for title in ROWS}
    ap = {title: over_seeds(results, jobs, "ap") for title, jobs in names.items()}
    setting = (
        f"AP is COCO's, in percent, on {(SMOKE_COUNTS if options.smoke else COUNTS)['test']} test canvases of 64x64, "
        "from engines for ONNX Runtime. FPS is that of the INT8 engines at batch 1, with the ratio to B's and its 95 % "
        "interval. Differences are paired by seed. All other rows are trained half as long as B: from B's weights that "
        "makes more training than B has, from random weights less."
    )
    sizes = (
        "AP of small, medium and large objects, which the paper's table has too, is left out: COCO's limits are 32 and "
        "96 pixels a side, and nearly every item here is small."
    )
    kept = share(ap["B+KD"], ap["B"])
    answers = [
        claim("B over B+KD", ap["B"], ap["B+KD"]),
        claim("B, trained on, over B+KD", ap["B, trained on"], ap["B+KD"]),
        claim("B+KD over B+KD-SAT", ap["B+KD"], ap["B+KD-SAT"]),
        claim("B+KD-SAT over KD", ap["B+KD-SAT"], ap["KD"]),
        f"- B+KD keeps at least {PAPER} % of B: {kept:.1f} %: {'yes' if kept >= PAPER else 'no'}",
    ]
    return [
        setting,
        table(HEADINGS, [line(title, names, results, speeds) for title in ROWS]),
        sizes,
        "The paper's claims, in points of AP (FP32), seed by seed, and the same against the original trained on:",
        "\n".join(answers),
    ]


def line(
    title: str, names: Mapping[str, Sequence[str]], results: Mapping[str, Values], speeds: Mapping[str, Speed]
) -> list[str]:
    """A line of the table."""
    mine = {key: over_seeds(results, names[title], key) for key in ("ap", "ap50", "ap75", "ap_int8")}
    base = over_seeds(results, names["B"], "ap")
    speed, first = speeds[ROWS[title].activation], results[names[title][0]]
    return [
        title, ROWS[title].activation, f"{speed.throughput:.0f}", speed.ratio,
        *(spread(mine[key], digits=1) for key in ("ap", "ap50", "ap75", "ap_int8")),
        "-" if title == "B" else paired(mine["ap"], base, digits=1),
        f"{share(mine['ap'], base):.1f}", paired(mine["ap_int8"], mine["ap"], digits=1),
        f"{first['int8_layers']:.0f} of {first['layers']:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
