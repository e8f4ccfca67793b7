from __future__ import annotations

import pickle
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="safetensors is not installed: pip install 'relu-deploy[torch]'"
)
from torch import nn  # noqa: E402

from relu_deploy.errors import ExportError, FileError, MissingExtraError  # noqa: E402
from relu_deploy.export.source import load_factory  # noqa: E402
from relu_deploy.export.weights import load_weights, read_state  # noqa: E402

pytestmark = pytest.mark.torch

FILE = """
from __future__ import annotations
import dataclasses
from torch import nn
import helper_beside_the_file

@dataclasses.dataclass
class Config:
    width: int = 3

def net(): return nn.Linear(Config().width, 2)
def number(): return 5
def broken(): raise KeyError("inside")
def needs(width): return nn.Linear(width, 2)
made = nn.Linear(3, 2)
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "net.py").write_text(FILE)
    (tmp_path / "helper_beside_the_file.py").write_text("")
    return tmp_path / "net.py"


def test_a_file_and_its_factories(file):
    before = list(sys.path)
    assert load_factory(f"{file}:net").weight.shape == (2, 3)
    assert load_factory(f"{file}:made").weight.shape == (2, 3)
    assert sys.path == before


def test_a_module(monkeypatch, file):
    monkeypatch.chdir(file.parent)
    assert load_factory("net:net").weight.shape == (2, 3)
    sys.modules.pop("net")
    assert isinstance(load_factory("relu_deploy.demo.network:build_network"), nn.Module)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("net", "cannot read the model 'net'"),
        ("a:b c", "cannot read the model"),
        ("relu_deploy.nowhere:net", "there is no module 'relu_deploy.nowhere'"),
        ("relu_deploy.errors:net", "relu_deploy.errors has no 'net'"),
        ("{}:net2", "has no 'net2'"),
        ("{}:number", "gave a int, not a torch.nn.Module"),
        ("{}:broken", "failed: KeyError: 'inside'"),
        ("{}:needs", "failed: TypeError.*width"),
    ],
)
def test_bad_specs(file, spec, match):
    with pytest.raises(ExportError, match=match):
        load_factory(spec.format(file))


def test_files_that_are_missing_or_fail(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        load_factory(f"{tmp_path}/none.py:net")
    with pytest.raises(FileError, match="does not exist"):
        load_factory(f"{tmp_path}/none.pt2")
    (tmp_path / "bad.py").write_text("def net(:")
    with pytest.raises(ExportError, match=r"running .*bad.py failed: SyntaxError"):
        load_factory(f"{tmp_path}/bad.py:net")
    (tmp_path / "needs.py").write_text("import not_a_package_of_anyone")
    with pytest.raises(ExportError, match="not_a_package_of_anyone"):
        load_factory(f"{tmp_path}/needs.py:net")


def test_a_missing_torch_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"relu-deploy\[torch\]"):
        load_factory("net:net")


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_state_dict"])
def test_weights_come_back_bit_for_bit(tmp_path, wrap):
    torch.manual_seed(3)
    source, target = network(), network()
    source(torch.randn(8, 3))
    state = source.state_dict()
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert all(torch.equal(a, b) for a, b in zip(state.values(), target.state_dict().values(), strict=True))


def test_safetensors_and_the_prefix_of_data_parallel(tmp_path):
    source, target = network(), network()
    state = {f"module.{key}": tensor for key, tensor in source.state_dict().items()}
    safetensors_torch.save_file(state, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(source[0].weight, target[0].weight)


def test_keys_and_shapes_that_do_not_fit_are_named_and_nothing_is_loaded(tmp_path):
    torch.save(nn.Sequential(nn.Linear(3, 5), nn.Linear(1, 1), nn.Linear(1, 1)).state_dict(), tmp_path / "w.pt")
    target = network()
    before = target[0].weight.clone()
    with pytest.raises(ExportError) as caught:
        load_weights(target, tmp_path / "w.pt")
    for part in (
        "missing from the file: 1.running_mean", "unknown to the model: 2.weight",
        "0.weight is (5, 3) in the file and (4, 3) in the model",
    ):  # fmt: skip
        assert part in caught.value.message
    assert torch.equal(target[0].weight, before)


class Mine:
    def __reduce__(self):
        return (sys.exit, (99,))


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": Mine()}, tmp_path / "w.pt")
    with pytest.raises(ExportError, match="without executing code that is stored in it"):
        read_state(tmp_path / "w.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Mine()))
    with pytest.raises(ExportError):
        read_state(tmp_path / "plain.pt")
    torch.save(network(), tmp_path / "whole.pt")
    with pytest.raises(ExportError, match=r"without executing|holds no state_dict"):
        read_state(tmp_path / "whole.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.95])
def test_damaged_weights_are_told(tmp_path, name, keep):
    path = tmp_path / name
    (torch.save if name == "w.pt" else safetensors_torch.save_file)(network().state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(ExportError, match=r"cut short|damaged"):
        read_state(path)


def test_other_weights_files(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        read_state(tmp_path / "none.pt")
    with pytest.raises(FileError, match="is a folder"):
        read_state(tmp_path)
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(ExportError, match="not a weights file"):
        read_state(tmp_path / "w.h5")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "w.pt")
    with pytest.raises(ExportError, match="no state_dict but the keys epoch, lr"):
        read_state(tmp_path / "w.pt")
    torch.save(torch.zeros(3), tmp_path / "t.pt")
    with pytest.raises(ExportError, match="no state_dict but Tensor"):
        read_state(tmp_path / "t.pt")
