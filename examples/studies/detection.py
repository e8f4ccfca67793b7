"""Table 1 of "ReLU for inference acceleration" on a small detector: SiLU against ReLU, in accuracy and in speed.

    python examples/studies/detection.py -o study-run

The detector is of YOLOX's kind (``detector_network.py``), its images are canvases made of Fashion-MNIST
(``detection_data.py``; ``apt-get install dataset-fashion-mnist``). The rows are the paper's:

- ``B``: SiLU, from random weights, with the detector's own loss.
- ``KD``: ReLU, from B's *random first* weights, with the detector's loss and channel-wise distillation (eq. 4) from B.
- ``B+KD``: the same from B's trained weights.
- ``B+KD-SAT``: the same with eq. 6's slow change from SiLU to ReLU.

Every row is trained with three seeds; the students of a seed have the B of that seed as their teacher. All rows see
the same canvases the same number of times. The learning rates and the weight of the distillation (``RATES``,
``DISTILL_WEIGHT``) were chosen with seed 0 on held-out canvases, which are made of training images that no training
canvas has; test canvases are made of test images and were looked at only by finished networks. Accuracy in FP32 and in
INT8 is that of the engines that are deployed, not of the torch networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.files import make_folder
from deploy import Speed, deploy, engine_outputs, measure
from detection_data import Canvases, Split, as_input, canvases, load_canvases, save_canvases
from detector_loss import detection_loss
from detector_network import Detector, decode
from harness import Job, Options, Values, over_seeds, paired, parse_options, publish, run_jobs, spread, table
from relu_deploy.distill.config import DistillConfig, RecipeName
from relu_deploy.distill.distiller import Distiller
from relu_deploy.distill.tasks import DetectionTask
from relu_deploy.export import ExampleInput
from relu_deploy.export.weights import load_weights

ROWS: dict[RecipeName, str] = {"B": "SiLU", "KD": "ReLU", "B+KD": "ReLU", "B+KD-SAT": "ReLU"}
COUNTS: dict[Split, int] = {"train": 6000, "held-out": 500, "test": 1000}
SMOKE_COUNTS: dict[Split, int] = {"train": 96, "held-out": 32, "test": 32}
EPOCHS, BATCH = 3, 32
RATES: dict[RecipeName, float] = {"B": 3e-3, "KD": 3e-3, "B+KD": 1e-3, "B+KD-SAT": 1e-3}
DISTILL_WEIGHT = 1.0
LAYERS = ("neck",)  # whose outputs eq. 4 compares
CALIBRATION = 256  # canvases of the training set


def main() -> None:
    options = parse_options(__doc__.splitlines()[0])
    make_folder(options.folder)
    for split, count in (SMOKE_COUNTS if options.smoke else COUNTS).items():
        file = canvas_file(options.folder, split, options.smoke)
        if not file.is_file():
            save_canvases(canvases(split, count), file)
    jobs = [make_job(row, seed, options) for row in ROWS for seed in range(options.seeds)]
    results = run_jobs([job for job in jobs if job.settings["recipe"] == "B"], options)  # the others' teachers
    results |= run_jobs([job for job in jobs if job.settings["recipe"] != "B"], options)
    speeds, warnings = measure({"SiLU": "B-0", "ReLU": "B+KD-0"}, options, base="SiLU")
    publish(options, "detection", "Detection: SiLU against ReLU", [*page(results, speeds, options.seeds), *warnings])


def canvas_file(folder: Path, split: Split, smoke: bool) -> Path:
    """Canvases are made once for all jobs."""
    return folder / f"canvases-{split}{'-smoke' if smoke else ''}.npz"


def make_job(recipe: RecipeName, seed: int, options: Options) -> Job:
    """One training of a row."""
    settings = {
        "recipe": recipe,
        "seed": seed,
        "epochs": 1 if options.smoke else EPOCHS,
        "rate": RATES[recipe],
        "distill_weight": DISTILL_WEIGHT,
    }
    return Job(f"{recipe}-{seed}", train, settings, options.smoke)


def train(job: Job, folder: Path) -> Values:
    """Train, deploy and score one network."""
    recipe, seed = job.settings["recipe"], job.settings["seed"]
    data: dict[Split, Canvases] = {s: load_canvases(canvas_file(folder.parents[1], s, job.smoke)) for s in COUNTS}
    torch.manual_seed(seed)
    original = Detector()
    if recipe != "B":
        load_weights(original, folder.parent / f"B-{seed}" / "training" / "student.safetensors")
    config = DistillConfig(
        recipe=recipe, task="detection", epochs=job.settings["epochs"], batch_size=BATCH, seed=seed,
        learning_rate=job.settings["rate"], distill_weight=job.settings["distill_weight"], clip_norm=10.0,
        channels_last=True, evaluate_epochs=job.settings["epochs"],
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


def page(results: Mapping[str, Values], speeds: Mapping[str, Speed], seeds: int) -> list[str]:
    """The table, the paper's claims, and what the numbers are."""
    names = {row: [f"{row}-{seed}" for seed in range(seeds)] for row in ROWS}
    first = results[names["B"][0]]
    setting = (
        f"The detector has {first['layers']:.0f} linear layers and sees canvases of 64x64; AP is COCO's, in percent, "
        f"on {COUNTS['test']} test canvases, from engines for ONNX Runtime. FPS is that of the INT8 engines at batch "
        "1, with the ratio to B's and its 95 % interval. Differences are paired by seed."
    )
    sizes = (
        "AP of small, medium and large objects, which the paper's table has too, is left out: COCO's limits are 32 and "
        "96 pixels a side, and nearly every item here is small."
    )
    rows = [row_of(row, names, results, speeds) for row in ROWS]
    listed = "\n".join(f"- {line}" for line in claims(names, results))
    return [setting, table(HEADINGS, rows), sizes, f"The paper's claims:\n\n{listed}"]


HEADINGS = (
    "method", "activation", "FPS", "ratio", "AP", "AP50", "AP75", "AP - B's", "% of B's AP", "AP in INT8",
    "INT8 - FP32", "int8 layers",
)  # fmt: skip


def row_of(
    row: str, names: Mapping[str, Sequence[str]], results: Mapping[str, Values], speeds: Mapping[str, Speed]
) -> list[str]:
    """A line of the table."""
    form = ROWS[row]  # type: ignore[index]
    mine = {key: over_seeds(results, names[row], key) for key in ("ap", "ap50", "ap75", "ap_int8")}
    base = over_seeds(results, names["B"], "ap")
    first = results[names[row][0]]
    return [
        row, form, f"{speeds[form].throughput:.0f}", speeds[form].ratio,
        *(spread(mine[key], digits=1) for key in ("ap", "ap50", "ap75")),
        "" if row == "B" else paired(mine["ap"], base, digits=1),
        f"{share(mine['ap'], base):.1f}",
        spread(mine["ap_int8"], digits=1), paired(mine["ap_int8"], mine["ap"], digits=1),
        f"{first['int8_layers']:.0f} of {first['layers']:.0f}",
    ]  # fmt: skip


def share(values: Sequence[float], base: Sequence[float]) -> float:
    """How much of the base's mean is kept, in percent; 0 if there is nothing to keep."""
    return 100 * sum(values) / sum(base) if sum(base) else 0.0


def claims(names: Mapping[str, Sequence[str]], results: Mapping[str, Values]) -> list[str]:
    """What the paper says of its detectors, and whether it is so here, by the means over the seeds."""
    ap = {row: over_seeds(results, names[row], "ap") for row in ROWS}
    kept = {row: share(ap[row], ap["B"]) for row in ROWS}
    sat = paired(ap["B+KD-SAT"], ap["B+KD"], digits=1)
    first = verdict(97.4 <= kept["B+KD"] <= 100)
    second, third = verdict(kept["KD"] < kept["B+KD"]), verdict(kept["B+KD-SAT"] <= kept["B+KD"])
    return [
        f"B+KD keeps 97.4 to 98.4 % of B's AP: {first}, it keeps {kept['B+KD']:.1f} %.",
        f"KD loses more than B+KD, 7.6 to 11.4 %: {second}, it loses {100 - kept['KD']:.1f} %.",
        f"B+KD-SAT is no better than B+KD: {third}, the difference in AP is {sat}.",
    ]


def verdict(holds: bool) -> str:
    """In words."""
    return "so here" if holds else "not so here"


if __name__ == "__main__":
    main()
