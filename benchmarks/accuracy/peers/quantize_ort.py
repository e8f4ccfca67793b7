"""ONNX Runtime's quantize_static."""

from __future__ import annotations

import onnx.version_converter  # noqa: F401  # lifted() uses it
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from samples import Reader, lifted, parse


class OrtReader(Reader, CalibrationDataReader):  # type: ignore[misc]
    """ONNX Runtime checks the type."""


def main() -> None:
    """Defaults, or settings as someone sets them who knows: 8-bit unsigned activations, weights per channel."""
    request = parse()
    method = request.settings.get("method")
    if method is None:
        quantize_static(request.model, request.output, OrtReader(request.calibration))
        return
    newer = lifted(request.model, request.output.with_suffix(".lifted.onnx"))
    ready = request.output.with_suffix(".ready.onnx")
    quant_pre_process(newer, ready, skip_symbolic_shape=True)
    quantize_static(
        ready, request.output, OrtReader(request.calibration),
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
        op_types_to_quantize=request.settings.get("op_types"), calibrate_method=CalibrationMethod[method],
        extra_options=request.settings.get("extra"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
