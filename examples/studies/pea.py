"""Study (b): progressive ensemble activations against plain ReLU training ("Progressive ensemble activations").

As in the paper's tables 2 to 4: from random weights with labels alone, the weighted and the stochastic form, the
transition ending at 115 and at 90 of 120 parts of the training, plain ReLU as the baseline and the network with the
smooth activation as the upper limit. All have the same number of steps.

    python examples/studies/pea.py
"""

from __future__ import annotations

from deploy import measure, warned
from harness import claim, over_seeds, paired, parse_options, publish, spread, table
from vision import from_scratch, job_names, train_rows

TITLE = "PEA against plain ReLU training: the convolutional network on Fashion-MNIST"
RELU, UPPER = "ReLU", "SiLU (upper limit)"
ROWS = {
    RELU: ("cnn-scratch-relu", from_scratch(units="relu")),
    UPPER: ("cnn-scratch-silu", from_scratch()),
    **{
        f"PEA-{form}, until {end} of 120": (
            f"cnn-pea-{form}-{end}",
            from_scratch(f"PEA-{form}", transition={"initial": 5 / 120, "pure": (120 - end) / 120}),
        )
        for form in ("W", "S")
        for end in (115, 90)
    },
}


def main() -> None:
    """Train, deploy, print."""
    options = parse_options(TITLE)
    results = train_rows(dict(ROWS.values()), options)
    names = {title: job_names(name, options) for title, (name, _) in ROWS.items()}
    speeds, warnings = measure({"SiLU": names[UPPER][0], "ReLU": names[RELU][0]}, options, base="SiLU")
    fp32 = {title: over_seeds(results, jobs, "fp32") for title, jobs in names.items()}
    lines = []
    for title, jobs in names.items():
        speed, one = speeds["SiLU" if title == UPPER else "ReLU"], results[jobs[0]]
        lines.append([
            title, f"{speed.throughput:.0f}", speed.ratio, spread(fp32[title]),
            spread(over_seeds(results, jobs, "int8")), "-" if title == RELU else paired(fp32[title], fp32[RELU]),
            f"{one['int8_layers']:.0f} of {one['layers']:.0f}",
        ])  # fmt: skip
    headings = [
        "training", "FPS INT8", "ratio to SiLU INT8 [95 %]", "accuracy % FP32", "accuracy % INT8", "FP32 against ReLU",
        "INT8 layers",
    ]  # fmt: skip
    pea = [title for title in names if title.startswith("PEA")]
    publish(options, "pea", TITLE, [
        table(headings, lines),
        "The paper's claims, in points of accuracy (FP32), seed by seed:",
        "\n".join([
            *(claim(f"{title} over ReLU", fp32[title], fp32[RELU]) for title in pea),
            claim("the upper limit over ReLU", fp32[UPPER], fp32[RELU]),
            *(claim(f"PEA-{form} until 90 over until 115", fp32[f"PEA-{form}, until 90 of 120"],
                    fp32[f"PEA-{form}, until 115 of 120"]) for form in ("W", "S")),
        ]),
        *warned(warnings),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
