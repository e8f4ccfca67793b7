"""Reading a plan's text: on a program written here, and on garbage."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relu_deploy.engines.kernels import Operand
from relu_deploy.engines.log import Log
from relu_deploy.engines.plan import read_plan
from relu_deploy.engines.trt_audit import audit_engine

FLAGS = "relu=true gelu=false tanh=false sigmoid=false gelu_erf=false swish=false leaky_relu=false bias=true"
INPUT = 'input={"x.1" "w{0}" "literal" }'
LAYERS = "[ONNX Layer: f\u00fc]\x1e[ONNX Layer: act]"
ARGUMENTS = 'input_args={ "left^deref" "left^deref" } output_args={ "right^deref" }'
PLAN = (
    b"\x00\x01binary"
    + f"""header {{
  region = {{ name=lit size=0 place=host unified=false }}
  accelerators={{sm89 }}
}}
descriptors {{
  tensor={{ const_payload_size=8 dims={{ 8 }} name="w{{0}}" offset=1 region=consts type=int8 }}
  tensor={{ dims={{ 1 }} name="literal" offset=1 region=lit type=float }}
  tensor={{ dims={{ "batch" 8 }} name="x.1" offset=0 region="" type=int8 }}
  tensor={{ dims={{ 4 8 }} name="both" offset=0 region="devmem" type=half }}
  tensor={{ dims={{ 9 }} is_scratchspace=1 name="scratch" offset=0 region="devmem" type=int8 }}
  sub_tensor={{ base="both" const_offset=0 dims={{ 2 8 }} name="left^deref" type=half }}
  sub_tensor={{ base="both" const_offset=16 dims={{ 2 8 }} name="right^deref" type=half }}
}}
main {{
 label bb1:
  wait={{ name="w" stream=0 event=1 layers="" }}
  fully_connected={{ name="f\u00fc" output={{"left^deref" }} {INPUT} {FLAGS} layers="{LAYERS}" }}
  function={{ name=__myl_AddSigm {ARGUMENTS} layers="[ONNX Layer: s]" }}
  this line is none of ours
}}
""".encode()
    + b"\x00rest"
)


def test_reads_kernels_types_slices_and_fused_flags() -> None:
    (program,) = read_plan(PLAN)
    assert program.accelerators == ("sm89",)
    assert program.unread == 1
    first, second = program.kernels
    assert (first.name, first.layers) == ("f\u00fc", ("f\u00fc", "act"))
    assert first.linear[0].precision == "int8"
    assert first.linear[0].output == "fp16"
    assert first.linear[0].fused == {"relu", "bias"}
    assert [operand.name for operand in first.reads] == ["x.1", "w{0}"]
    assert second.writes == (Operand("right^deref", "fp16", (2, 8), ("both", "16")),)
    assert second.ops == {"function", "add", "sigm"}


def test_bytes_count_a_slice_once_a_kernel_and_need_every_extent() -> None:
    programs = read_plan(PLAN)
    unknown = audit_engine(programs, Log({}, ()), None)
    assert unknown.bytes_moved is None
    assert any("x.1" in note for note in unknown.notes)
    assert any("1 lines of the plan" in note for note in unknown.notes)
    audit = audit_engine(programs, Log({}, ()), None, optimum={"x": (2, 8)})
    left = right = 2 * 8 * 2
    assert audit.bytes_moved == (2 * 8 + 8 + left) + (left + right)
    assert [(a.kind, a.name) for a in audit.left] == [("sigmoid", "__myl_AddSigm")]


def test_a_plan_without_programs_is_said_to_tell_nothing() -> None:
    assert read_plan(b"") == ()
    audit = audit_engine(read_plan(b"vtrt" + bytes(100)), Log({"conv": "Conv"}, ()), None)
    assert (audit.source, audit.kernels, audit.linear) == ("none", None, ())


@given(st.integers(0, len(PLAN)), st.binary(max_size=40), st.integers(0, 60))
def test_damage_never_raises(at: int, inserted: bytes, removed: int) -> None:
    damaged = PLAN[:at] + inserted + PLAN[at + removed :]
    audit = audit_engine(read_plan(damaged), Log({}, ()), None, optimum={"x": (2, 8)})
    assert audit.source in ("plan", "none")


def test_cut_short_at_any_byte_never_raises() -> None:
    kernels = {sum(len(program.kernels) for program in read_plan(PLAN[:at])) for at in range(len(PLAN))}
    assert kernels == {0, 2}


def test_an_absurd_extent_is_not_a_number() -> None:
    damaged = PLAN.replace(b"dims={ 4 8 }", b"dims={ " + b"9" * 5000 + b" 8 }")
    assert isinstance(read_plan(damaged)[0].tensors["both"].dims[0], str)
