"""nvidia-modelopt's ONNX quantiser, calibrating on the CPU, its float part left at 32 bits."""

from __future__ import annotations

from modelopt.onnx.quantization import quantize
from samples import Reader, parse


def main() -> None:
    """Quantise; the settings are the calibration method and whether to simplify first."""
    request = parse()
    quantize(
        str(request.model), quantize_mode="int8", calibration_method=request.settings["method"],
        calibration_data_reader=Reader(request.calibration), calibration_eps=["cpu"],
        output_path=str(request.output), high_precision_dtype="fp32", simplify=request.settings["simplify"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
