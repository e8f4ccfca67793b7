from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'relu-deploy[demo]'")
from relu_deploy.demo.data import Digits, enlarge, load_digits  # noqa: E402
from relu_deploy.demo.network import ACTIVATIONS, build_network, build_relu_network  # noqa: E402
from relu_deploy.demo.train import distil_student, save_weights, train_teacher  # noqa: E402
from relu_deploy.distill.config import DistillConfig  # noqa: E402
from relu_deploy.errors import MissingExtraError, TrainingError  # noqa: E402
from relu_deploy.export.weights import load_weights  # noqa: E402

pytestmark = pytest.mark.torch


def keys(images):
    return {image.tobytes() for image in images}


def test_the_test_part_is_never_seen_in_training_or_calibration():
    digits = load_digits()
    assert digits.train_images.shape == (1198, 1, 32, 32)
    assert digits.test_images.shape == (599, 1, 32, 32)
    # Every image of the data set differs from every other, so equal bytes would be one image in two parts.
    assert len(keys(digits.train_images)) == 1198
    assert not keys(digits.train_images) & keys(digits.test_images)
    assert keys(digits.calibration(64)) < keys(digits.train_images)
    assert np.bincount(digits.test_labels).min() >= 55


def test_the_split_is_seeded():
    first, again, other = load_digits(seed=1), load_digits(seed=1), load_digits(seed=2)
    assert np.array_equal(first.test_images, again.test_images)
    assert keys(first.test_images) != keys(other.test_images)


def test_images_are_normalised_by_the_training_part():
    digits = load_digits()
    assert digits.train_images.dtype == np.float32
    # float32 sums over 1.2 million pixels
    assert abs(float(digits.train_images.mean())) < 1e-4
    assert abs(float(digits.train_images.std()) - 1) < 1e-4


def test_enlarging_agrees_with_torch():
    images = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(images)[:, None], size=32, mode="bilinear")[:, 0]
    np.testing.assert_allclose(enlarge(images), expected.numpy(), atol=1e-6)  # float32 rounding of values below 1


def test_a_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"relu-deploy\[demo\]"):
        load_digits()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_networks(activation):
    model = build_network(activation, width=4).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    assert any(isinstance(module, ACTIVATIONS[activation]) for module in model.modules())


def test_an_unknown_activation_is_refused():
    with pytest.raises(TrainingError, match="no activation 'tanh'"):
        build_network("tanh")


def test_a_short_run_learns_and_the_student_keeps_the_shape(tmp_path):
    """A dozen steps: far from the demo's accuracy, but the loss falls, and the student starts where the teacher was."""
    whole = load_digits()
    digits = Digits(whole.train_images[:192], whole.train_labels[:192], whole.test_images[:64], whole.test_labels[:64])
    config = DistillConfig(recipe="B", epochs=2, batch_size=32, learning_rate=3e-3)
    teacher = train_teacher(digits, config=config, keep=tmp_path)
    losses = [epoch["losses"]["task"] for epoch in teacher.training.epochs]
    assert losses[1] < losses[0]
    weights = [tensor.clone() for tensor in teacher.model.state_dict().values()]
    student = distil_student(teacher.model, digits, config=DistillConfig(epochs=1, batch_size=32))
    assert student.training.epochs[0]["losses"]["distill"] < losses[0]
    assert 0 <= student.accuracy <= 1
    assert all(torch.equal(a, b) for a, b in zip(weights, teacher.model.state_dict().values(), strict=True))
    assert student.training.swap is not None
    assert {r.old for r in student.training.swap.replaced} == {"SiLU"}
    assert {path.name for path in tmp_path.iterdir()} == {"original.metrics.jsonl", "original.training.png"}
    save_weights(student.model, tmp_path / "student.safetensors")
    copy = build_relu_network().eval()
    load_weights(copy, tmp_path / "student.safetensors")
    images = torch.from_numpy(digits.test_images[:8])
    assert all(torch.equal(copy.state_dict()[name], value) for name, value in student.model.state_dict().items())
    with torch.no_grad():  # equal weights that lie elsewhere in memory may meet another kernel, which sums otherwise
        torch.testing.assert_close(copy(images), student.model(images), rtol=1e-5, atol=1e-5)
