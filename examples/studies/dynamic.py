"""Study (d): DY-ReLU A, B, C against ReLU and the activations its paper and PWLU's compare with.

As in tables 3, 6 and 11 of "Dynamic ReLU": the convolutional network from random weights with labels alone, each
activation in every place, all with the same number of steps.

    python examples/studies/dynamic.py
"""

from __future__ import annotations

from deploy import measure, warned
from harness import claim, over_seeds, paired, parse_options, publish, spread, table
from vision import from_scratch, job_names, train_rows

TITLE = "DY-ReLU against ReLU and other activations: the convolutional network on Fashion-MNIST"
UNITS = {
    "ReLU": "relu", "RReLU": "rrelu", "LeakyReLU": "leaky_relu", "PReLU (channel-wise)": "prelu",
    "PReLU (shared)": "prelu_shared", "SE+ReLU": "se_relu", "Maxout, K = 2": "maxout", "APL": "apl", "PAU": "pau",
    "F-ReLU": "frelu", "DY-ReLU-A": "dy_relu_a", "DY-ReLU-B": "dy_relu_b", "DY-ReLU-C": "dy_relu_c",
}  # fmt: skip
ROWS = {
    **{title: (f"cnn-scratch-{unit.replace('_', '-')}", from_scratch(units=unit)) for title, unit in UNITS.items()},
    "DY-ReLU-B, K = 3": ("cnn-scratch-dy-relu-b-3", from_scratch(units="dy_relu_b", options=(("pieces", 3),))),
}
NOTE = (
    "FPS is that of the INT8 engines at batch 1. Activations other than ReLU are computed in float between quantised "
    "layers, or as tables of codes where that is quicker; the layers inside SE+ReLU, Maxout, F-ReLU and DY-ReLU count "
    "among the linear layers. DY-ReLU is spelled for ONNX Runtime, and PReLU as a maximum."
)
DYNAMIC = [title for title in ROWS if title.startswith("DY")]


def main() -> None:
    """Train, deploy, print."""
    options = parse_options(TITLE)
    results = train_rows(dict(ROWS.values()), options)
    names = {title: job_names(name, options) for title, (name, _) in ROWS.items()}
    speeds, warnings = measure({title: jobs[0] for title, jobs in names.items()}, options, base="ReLU")
    fp32 = {title: over_seeds(results, jobs, "fp32") for title, jobs in names.items()}
    lines = [
        [
            title, f"{results[jobs[0]]['parameters']:.0f}", f"{speeds[title].throughput:.0f}", speeds[title].ratio,
            spread(fp32[title]),
            spread(over_seeds(results, jobs, "int8")), "-" if title == "ReLU" else paired(fp32[title], fp32["ReLU"]),
            f"{results[jobs[0]]['int8_layers']:.0f} of {results[jobs[0]]['layers']:.0f}",
        ]
        for title, jobs in names.items()
    ]  # fmt: skip
    headings = [
        "activation", "parameters", "FPS INT8", "ratio to ReLU INT8 [95 %]", "accuracy % FP32", "accuracy % INT8",
        "FP32 against ReLU", "INT8 layers",
    ]  # fmt: skip
    publish(options, "dynamic", TITLE, [
        table(headings, lines),
        "The paper's claims, in points of accuracy (FP32), seed by seed:",
        "\n".join([
            *(claim(f"{title} over ReLU", fp32[title], fp32["ReLU"]) for title in DYNAMIC),
            claim("B over A", fp32["DY-ReLU-B"], fp32["DY-ReLU-A"]),
            claim("B over Maxout, K = 2", fp32["DY-ReLU-B"], fp32["Maxout, K = 2"]),
            claim("B over SE+ReLU", fp32["DY-ReLU-B"], fp32["SE+ReLU"]),
        ]),
        NOTE,
        *warned(warnings),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
