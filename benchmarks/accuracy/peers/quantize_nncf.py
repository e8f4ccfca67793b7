"""NNCF's post-training quantisation of an ONNX file."""

from __future__ import annotations

import nncf
import onnx
import onnx.version_converter
from onnxruntime.quantization.shape_inference import quant_pre_process
from samples import feeds, lifted, parse


def main() -> None:
    """Defaults, or opset 17 and ONNX Runtime's pre-processing first, with a preset."""
    request = parse()
    settings = dict(request.settings)
    data = nncf.Dataset(list(feeds(request.calibration)))
    model, options = request.model, {}
    if settings.pop("prepare", False):
        newer = lifted(model, request.output.with_suffix(".lifted.onnx"))
        model = request.output.with_suffix(".ready.onnx")
        quant_pre_process(newer, model, skip_symbolic_shape=True)
        options = {
            "preset": nncf.QuantizationPreset(settings["preset"]), "fast_bias_correction": settings["fast"],
        }  # fmt: skip
        if settings.get("transformer"):
            options["model_type"] = nncf.ModelType.TRANSFORMER
    onnx.save(nncf.quantize(onnx.load(model), data, **options), request.output)


if __name__ == "__main__":
    main()
