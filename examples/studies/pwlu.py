"""Study (c): PWLU with and without statistic-based realignment, and its number of intervals ("PWLU", tables 5 to 7).

From random weights with labels alone, all with the same number of steps; phase I of the realignment has a tenth of
them. PWLU is computed by its compiled kernel, so a C++ compiler is needed. IoU is the alignment of the boundaries with
the inputs at the end of the training, over 1,024 test images.

    python examples/studies/pwlu.py
"""

from __future__ import annotations

from deploy import measure, warned
from harness import claim, over_seeds, paired, parse_options, publish, spread, table
from vision import Row, from_scratch, job_names, train_rows

TITLE = "PWLU with and without realignment, and the number of its intervals: the convolutional network on Fashion-MNIST"
NOTE = (
    "FPS is that of the first seed's INT8 engine at batch 1. A PWLU is folded there to the cheapest form that stays "
    "within half a step of its output: ReLU, one hinge, or a table of 256 codes for each channel, so its speed depends "
    "on what was learned."
)
REALIGNED = "PWLU-stat-realign"
INTERVALS = (4, 8, 12, 16, 20)
FIXED = (3, 10)


def pwlu(intervals: int = 16, *, bound: float = 3.0, realign: bool = True) -> Row:
    """A network whose activations are PWLUs, one function a channel."""
    transition = {"intervals": intervals, "bound": bound, "realign": realign, "kernel": "compiled"}
    return from_scratch("PWLU", transition=transition)


ROWS = {
    "ReLU": ("cnn-scratch-relu", from_scratch(units="relu")),
    "SiLU": ("cnn-scratch-silu", from_scratch()),
    **{f"PWLU-fix-init-{b}": (f"cnn-pwlu-fixed-{b}", pwlu(bound=float(b), realign=False)) for b in FIXED},
    **{f"{REALIGNED}, N = {n}": (f"cnn-pwlu-{n}", pwlu(n)) for n in INTERVALS},
}


def main() -> None:
    """Train, deploy, print."""
    options = parse_options(TITLE)
    results = train_rows(dict(ROWS.values()), options)
    names = {title: job_names(name, options) for title, (name, _) in ROWS.items()}
    fp32 = {title: over_seeds(results, jobs, "fp32") for title, jobs in names.items()}
    speeds, warnings = measure({title: jobs[0] for title, jobs in names.items()}, options, base="SiLU")
    iou = {title: over_seeds(results, jobs, "iou") for title, jobs in names.items() if title.startswith("PWLU")}
    lines = [
        [
            title, f"{speeds[title].throughput:.0f}", speeds[title].ratio, spread(fp32[title]),
            spread(over_seeds(results, jobs, "int8")),
            "-" if title == "ReLU" else paired(fp32[title], fp32["ReLU"]),
            spread(iou[title]) if title in iou else "-", f"{results[jobs[0]]['parameters']:.0f}",
        ]
        for title, jobs in names.items()
    ]  # fmt: skip
    headings = [
        "activation", "FPS INT8", "ratio to SiLU INT8 [95 %]", "accuracy % FP32", "accuracy % INT8",
        "FP32 against ReLU", "IoU", "parameters",
    ]  # fmt: skip
    best = f"{REALIGNED}, N = 16"
    publish(options, "pwlu", TITLE, [
        table(headings, lines),
        "The paper's claims, in points of accuracy (FP32), seed by seed:",
        "\n".join([
            claim("PWLU (realigned, N = 16) over ReLU", fp32[best], fp32["ReLU"]),
            claim("PWLU (realigned, N = 16) over SiLU", fp32[best], fp32["SiLU"]),
            *(claim(f"realigned over fixed at ±{b}", fp32[best], fp32[f"PWLU-fix-init-{b}"]) for b in FIXED),
            *(claim(f"IoU of realigned over that of fixed at ±{b}", iou[best], iou[f"PWLU-fix-init-{b}"])
              for b in FIXED),
            *(claim(f"N = 16 over N = {n}", fp32[best], fp32[f"{REALIGNED}, N = {n}"]) for n in INTERVALS if n != 16),
        ]),
        NOTE,
        *warned(warnings),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
