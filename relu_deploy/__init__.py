"""Take networks from smooth activations to plain ReLU and into INT8 engines, with every step measured."""

__version__ = "0.1.0"
