"""Study (a): the recipes of "ReLU for inference acceleration", tables 1 and 3, on two classifiers of Fashion-MNIST.

The original is trained from random weights with labels alone, every student half as long with the loss of equation 3.
"B, trained on" is the original after as many further epochs as the students have, with labels alone: what a student
gains over B by having been trained for longer, it has too.

    python examples/studies/recipes.py
"""

from __future__ import annotations

from deploy import measure, warned
from harness import Options, Values, claim, over_seeds, paired, parse_options, publish, share, spread, table
from vision import Row, job_names, train_rows

TITLE = "Recipes (tables 1 and 3 of the paper): a convolutional network and a small DeiT on Fashion-MNIST"
STUDENTS = {"B, trained on": "B", "KD": "KD", "B+KD": "B+KD", "B+KD-SAT": "B+KD-SAT"}
PAPER = 97.4  # the least that a B+KD student kept in the paper's table 1 (DamoYolo)


def original(network: str) -> str:
    """Name of the jobs that train the original."""
    return f"{network}-B"


def first_rows(network: str) -> dict[str, Row]:
    """The original."""
    return {original(network): Row(network=network, recipe="B", epochs=4)}


def rows(network: str) -> dict[str, Row]:
    """The students, by the name of their jobs."""
    return {
        f"{network}-{title.replace(', ', '-').replace(' ', '-')}": Row(
            network=network, recipe=recipe, epochs=2, teacher=original(network)
        )
        for title, recipe in STUDENTS.items()
    }


def page(network: str, results: dict[str, Values], options: Options) -> list[str]:
    """The table of one network and what it says of the paper's claims."""
    smooth = {"cnn": "SiLU", "deit": "GELU"}[network]
    titles = dict(zip(["B", *STUDENTS], [original(network), *rows(network)], strict=True))
    names = {title: job_names(job, options) for title, job in titles.items()}
    speeds, warnings = measure({smooth: names["B"][0], "ReLU": names["B+KD"][0]}, options, base=smooth)
    fp32 = {title: over_seeds(results, jobs, "fp32") for title, jobs in names.items()}
    int8 = {title: over_seeds(results, jobs, "int8") for title, jobs in names.items()}
    lines = []
    for title, jobs in names.items():
        act = smooth if title.startswith("B") and "KD" not in title else "ReLU"
        one = results[jobs[0]]
        lines.append([
            title, act, f"{speeds[act].throughput:.0f}", speeds[act].ratio, spread(fp32[title]), spread(int8[title]),
            "-" if title == "B" else paired(fp32[title], fp32["B"]),
            f"{share(fp32[title], fp32['B']):.2f}", f"{one['int8_layers']:.0f} of {one['layers']:.0f}",
        ])  # fmt: skip
    headings = [
        "method", "activation", "FPS INT8", f"ratio to {smooth} INT8 [95 %]", "accuracy % FP32", "accuracy % INT8",
        "FP32 against B", "% of B kept", "INT8 layers",
    ]  # fmt: skip
    kept = share(fp32["B+KD"], fp32["B"])
    return [
        f"## {'Convolutional network, SiLU' if network == 'cnn' else 'Small DeiT, GELU'}",
        table(headings, lines),
        "The paper's claims, in points of accuracy (FP32), seed by seed, and the same against the original trained on:",
        "\n".join([
            claim("B over B+KD", fp32["B"], fp32["B+KD"]),
            claim("B, trained on, over B+KD", fp32["B, trained on"], fp32["B+KD"]),
            claim("B+KD over B+KD-SAT", fp32["B+KD"], fp32["B+KD-SAT"]),
            claim("B+KD-SAT over KD", fp32["B+KD-SAT"], fp32["KD"]),
            f"- B+KD keeps at least {PAPER} % of B: {kept:.2f} %: {'yes' if kept >= PAPER else 'no'}",
        ]),
        *warned(warnings),
    ]  # fmt: skip


def main() -> None:
    """Train, deploy, print."""
    options = parse_options(TITLE)
    networks = ("cnn", "deit")
    results = train_rows({name: row for network in networks for name, row in first_rows(network).items()}, options)
    results |= train_rows({name: row for network in networks for name, row in rows(network).items()}, options)
    parts = [part for network in networks for part in page(network, results, options)]
    publish(options, "recipes", TITLE, parts)


if __name__ == "__main__":
    main()
