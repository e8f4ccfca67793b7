"""What a command line offers of this package. Imports nothing, so that ``--help`` can tell it at once."""

from __future__ import annotations

# Ways to choose a range; see calib.choose. All but the first need histograms.
METHODS = ("max", "percentile", "entropy", "mse")
PERCENTILE = 99.99

# What calib.images.parse_preprocess reads.
PREPROCESS_HELP = """\
resize=HxW (default: what the network takes); letterbox, or fit=stretch|letterbox|crop (default stretch); pad=0..255
(default 114); filter=bilinear|nearest|bicubic|area (default bilinear); channels=rgb|bgr|gray (default rgb, gray for a
network of one channel); scale=1/255 (default 1/255 for float inputs, 1 for integers); mean=R:G:B, std=R:G:B after scale
(default 0 and 1); layout=nchw|nhwc (default: from the network's shape); dtype=NAME (default: the network's).
"""
