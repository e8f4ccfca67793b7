"""Archives of torch.export: read when they hold a network, refused when they hold code."""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402

from relu_deploy.errors import ExportError  # noqa: E402
from relu_deploy.export.pt2 import load_pt2  # noqa: E402

pytestmark = pytest.mark.torch


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("shift", torch.tensor([0.5]))

    def forward(self, x, y):
        z = torch.nn.functional.silu(self.norm(self.conv(x))) + self.shift + torch.tensor([1.0, 2.0])[0]
        return {"z": z.flatten(1), "both": (torch.cat([y, y]), torch.einsum("nchw,nc->nhw", z, y))}


INPUTS = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4))


@pytest.fixture(scope="module")
def archive():
    batch = torch.export.Dim.DYNAMIC(min=1, max=8)
    program = torch.export.export(Net().eval(), INPUTS, dynamic_shapes=({0: batch}, {0: batch}))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with torch.no_grad():
        return buffer.getvalue(), program.module()(*INPUTS)


def rewritten(data, path, *, replace=None, add=None, compress=zipfile.ZIP_STORED):
    """Copy the archive with some entries changed by a function or added."""
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(path, "w", compress) as target:
        root = source.namelist()[0].split("/")[0]
        for name in source.namelist():
            content = source.read(name)
            for end, change in (replace or {}).items():
                content = change(content) if name.endswith(end) else content
            target.writestr(name, content)
        for name, content in (add or {}).items():
            target.writestr(f"{root}/{name}", content)
    return path


def test_reads_a_network(tmp_path, archive):
    data, expected = archive
    (tmp_path / "m.pt2").write_bytes(data)
    with torch.no_grad():
        result = load_pt2(tmp_path / "m.pt2")(*INPUTS)
    assert torch.equal(result["z"], expected["z"])
    assert torch.equal(result["both"][1], expected["both"][1])


def test_fixed_sizes_tell_the_inputs(tmp_path):
    torch.export.save(torch.export.export(nn.Linear(3, 2).eval(), (torch.ones(1, 3),)), tmp_path / "m.pt2")
    program = load_pt2(tmp_path / "m.pt2")
    assert [(spec.name, spec.shape, spec.dtype) for spec in program.specs] == [("input", (1, 3), "float32")]


def test_training_mode_is_refused(tmp_path):
    program = torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (torch.randn(2, 3, 8, 8),))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(ExportError, match="exported in training mode"):
        load_pt2(tmp_path / "m.pt2")


class Runs:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_examples_are_not_even_looked_at(tmp_path, archive):
    mark = tmp_path / "ran"
    evil = pickle.dumps(Runs(mark))
    path = rewritten(archive[0], tmp_path / "m.pt2", replace={"sample_inputs/model.pt": lambda _: evil})
    load_pt2(path)
    assert not mark.exists()


def edit(change):
    def apply(content):
        program = json.loads(content)
        change(program)
        return json.dumps(program).encode()

    return apply


def node(program, operator):
    return next(n for n in program["graph_module"]["graph"]["nodes"] if operator in n["target"])


def code(mark):
    return f"__import__('pathlib').Path({str(mark)!r}).write_text('x')"


def in_guards(program, mark):
    program["guards_code"] = [code(mark)]


def in_a_remark(program, mark):
    node(program, "silu")["metadata"]["stack_trace"] = f"File\n    {code(mark)}"


def in_a_size(program, mark):
    values = program["graph_module"]["graph"]["tensor_values"]
    sizes = next(v["sizes"] for k, v in values.items() if k == "x")
    sizes[0] = {"as_expr": {"expr_str": code(mark), "hint": {"as_int": 2}}}


def in_a_name(program, mark):
    target = node(program, "silu")
    target["name"] = f"a = {code(mark)}; b"


def in_a_target(program, mark):
    target = node(program, "silu")
    target["target"] = "torch.load"
    target["inputs"] = [{"name": "", "arg": {"as_string": "evil.pt"}, "kind": 1}]


def in_a_file_operator(program, mark):
    node(program, "silu")["target"] = "torch.ops.aten.from_file.default"


def in_a_tree(program, mark):
    entry = program["graph_module"]["module_call_graph"][0]["signature"]
    entry["in_spec"] = json.dumps(
        [1, {"type": "collections.defaultdict", "children_spec": [],
             "context": json.dumps({"default_factory_module": "this", "default_factory_name": "d"})}]
    )  # fmt: skip


def in_a_tree_enum(program, mark):
    entry = program["graph_module"]["module_call_graph"][0]["signature"]
    enum = json.dumps([{"__enum__": True, "fqn": "this:d", "name": "x"}])
    entry["in_spec"] = json.dumps([1, {"type": "builtins.dict", "context": enum, "children_spec": []}])


@pytest.mark.parametrize("attack", [in_guards, in_a_remark])
def test_code_in_dropped_parts_is_not_run(tmp_path, archive, attack):
    mark = tmp_path / "ran"
    path = rewritten(archive[0], tmp_path / "m.pt2", replace={"model.json": edit(lambda p: attack(p, mark))})
    with torch.no_grad():
        load_pt2(path)(*INPUTS)
    assert not mark.exists()


@pytest.mark.parametrize("attack", [in_a_size, in_a_name, in_a_target, in_a_file_operator, in_a_tree, in_a_tree_enum])
def test_code_elsewhere_is_refused(tmp_path, archive, attack):
    mark = tmp_path / "ran"
    path = rewritten(archive[0], tmp_path / "m.pt2", replace={"models/model.json": edit(lambda p: attack(p, mark))})
    with pytest.raises(ExportError, match=r"is not what torch writes there|is not an operator of plain tensors"):
        load_pt2(path)
    assert not mark.exists()
    assert "this" not in sys.modules


def test_the_attacks_would_work_on_torchs_own_loader(tmp_path, archive):
    """Else the tests above show nothing: the same archive makes torch.export.load run what is stored in it."""
    mark = tmp_path / "ran"
    path = rewritten(archive[0], tmp_path / "m.pt2", replace={"models/model.json": edit(lambda p: in_a_size(p, mark))})
    with pytest.raises(Exception):  # noqa: B017, PT011  # what it makes of the file afterwards is of no matter
        torch.export.load(path)
    assert mark.exists()


@pytest.mark.parametrize("name", ["data/aotinductor/model/x.so", "data/constants/custom_obj_0", "models/other.json"])
def test_foreign_entries_are_refused(tmp_path, archive, name):
    path = rewritten(archive[0], tmp_path / "m.pt2", add={name: b"x"})
    with pytest.raises(ExportError, match="compiled code or a pickled object"):
        load_pt2(path)


def test_a_pickled_weight_is_refused(tmp_path, archive):
    def change(config):
        config["config"]["shift"]["use_pickle"] = True

    path = rewritten(archive[0], tmp_path / "m.pt2", replace={"model_weights_config.json": edit(change)})
    with pytest.raises(ExportError, match="'shift' is stored as a pickled object"):
        load_pt2(path)


def test_what_unpacks_to_more_is_refused(tmp_path, archive):
    path = rewritten(archive[0], tmp_path / "m.pt2", compress=zipfile.ZIP_DEFLATED)
    with pytest.raises(ExportError, match=r"not one that torch.export.save writes"):
        load_pt2(path)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_cut_files_are_told(tmp_path, archive, keep):
    data = archive[0]
    (tmp_path / "m.pt2").write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(ExportError, match="cut short"):
        load_pt2(tmp_path / "m.pt2")


def test_other_zips_are_told(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "m.pt2")
    with pytest.raises(ExportError, match=r"has no models/model.json"):
        load_pt2(tmp_path / "m.pt2")
