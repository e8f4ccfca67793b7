"""Calibration of ONNX networks: data sources, streaming observers, ranges files. Usable alone."""
