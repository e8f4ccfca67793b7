"""The swap on transformers' own code, tiny and with random weights: nothing is downloaded."""

from __future__ import annotations

import copy
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: 'relu-deploy[dev]'")

from relu_deploy.nn.swap import relu, replace_activations  # noqa: E402

pytestmark = pytest.mark.torch

TEXT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
         "image_size": 32, "patch_size": 8}  # fmt: skip


def tokens():
    return {"input_ids": torch.arange(14).reshape(2, 7)}


def picture(size=32):
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


# name: model class, configuration, example, replaced, places left as squeeze-excite, key and its value in the copy
MODELS = {
    "bert": ("BertForSequenceClassification", transformers.BertConfig(**TEXT), tokens, 3, 0, ("hidden_act", "relu")),
    "bert_new": ("BertForSequenceClassification", transformers.BertConfig(**TEXT, hidden_act="gelu_new"), tokens, 3, 0,
                 ("hidden_act", "relu")),
    "deit": ("DeiTForImageClassification", transformers.DeiTConfig(**IMAGE), picture, 3, 0, ("hidden_act", "relu")),
    "vit": ("ViTForImageClassification", transformers.ViTConfig(**IMAGE), picture, 3, 0, ("hidden_act", "relu")),
    "swin": ("SwinForImageClassification",
             transformers.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2],
                                     window_size=4), picture, 3, 0, ("hidden_act", "relu")),
    "convnext": ("ConvNextForImageClassification",
                 transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2), picture, 3, 0,
                 ("hidden_act", "relu")),
    "mobilenet_v2": ("MobileNetV2ForImageClassification",
                     transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.35, hidden_act="silu"), picture,
                     35, 0, ("hidden_act", "relu")),
    "resnet": ("ResNetForImageClassification",
               transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic",
                                         hidden_act="gelu"), picture, 4, 0, ("hidden_act", "relu")),
    "efficientnet": ("EfficientNetForImageClassification",
                     transformers.EfficientNetConfig(image_size=32, width_coefficient=0.25, depth_coefficient=0.5,
                                                     hidden_dim=320), picture, None, None, ("hidden_act", "swish")),
}  # fmt: skip


@pytest.fixture(params=MODELS, name="case")
def case_fixture(request):
    name, config, example, *expected = MODELS[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, name)(copy.deepcopy(config)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # the library's 0.02 leaves nothing of a picture after thirty layers
            torch.nn.init.kaiming_normal_(parameter)
    return model, example(), *expected


def test_swaps_the_body_and_leaves_the_rest(case):
    teacher, example, count, squeezed, (key, value) = case
    student, report = replace_activations(teacher, relu, example=example)
    if count is None:  # EfficientNet: each block has one squeeze-excite
        squeezed = sum("SqueezeExcite" in type(m).__name__ for m in teacher.modules())
        blocks = [m for m in teacher.modules() if type(m).__name__ == "EfficientNetBlock"]
        count = 2 + sum(1 + hasattr(block, "expansion") for block in blocks)  # stem, top; depthwise, expansion
    assert len(report.replaced) == count
    assert sum("squeeze-excite" in skip.reason for skip in report.left) == squeezed
    running = {skip.name: skip.reason.split()[2] for skip in report.left if skip.reason.startswith("still runs")}
    assert all(name.endswith("pooler") or "squeeze" in name for name in running)
    assert set(running.values()) <= {"tanh"}  # BERT's pooler; what was left with a reason is not named twice
    assert report.verified
    assert getattr(student.config, key) == value
    assert getattr(teacher.config, key) != "relu"
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        assert torch.equal(student(**example).logits, copy.deepcopy(student)(**example).logits)
        assert not torch.equal(student(**example).logits, teacher(**example).logits)


def test_a_saved_student_is_reloaded_as_the_relu_network(tmp_path):
    torch.manual_seed(0)
    teacher = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)).eval()
    student, report = replace_activations(teacher, relu, example=tokens())
    assert report.config == ("hidden_act: 'gelu' -> 'relu'",)
    student.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**tokens()).logits, student(**tokens()).logits)


def test_the_gates_of_a_llama_are_left():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()
    student, report = replace_activations(model, relu, example=tokens())
    assert report.replaced == ()
    assert sum(skip.reason.startswith("a gate") for skip in report.left) == TEXT["num_hidden_layers"]
    assert student.config.hidden_act == "silu"
    _, report = replace_activations(model, relu, example=tokens(), include=["*.act_fn"])
    assert len(report.replaced) == TEXT["num_hidden_layers"]
