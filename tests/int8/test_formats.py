import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from relu_deploy.errors import QuantizationError
from relu_deploy.int8 import formats

VALUES = st.floats(-1e6, 1e6, width=32)


def test_unknown_granularity_is_refused():
    with pytest.raises(QuantizationError, match="unknown weight granularity 'row'"):
        formats.number_format("ort", weight_granularity="row")


@given(VALUES, VALUES, st.sampled_from(formats.TARGETS))
def test_zero_is_exact_and_the_range_is_covered(a, b, target):
    low, high = min(a, b), max(a, b)
    qparams = formats.activation_qparams(low, high, formats.number_format(target))
    assert qparams.scale > 0
    assert np.float32(qparams.scale) == qparams.scale
    # Half a step for the rounded zero point, and one unit in the last place for the rounded scale.
    slack = qparams.scale * (0.5 + 255 * 2**-23)
    assert qparams.lowest - slack <= low
    assert qparams.highest + slack >= high
    assert (0 - qparams.zero_point) * qparams.scale <= 0 <= qparams.highest


def test_relu_output_has_zero_point_zero_on_both_kinds_of_target():
    assert formats.activation_qparams(0.0, 5.1, formats.number_format("ort")) == formats.QParams(
        float(np.float32(5.1 / 255)), 0, "uint8"
    )
    trt = formats.activation_qparams(0.0, 12.7, formats.number_format("tensorrt"))
    assert (trt.zero_point, trt.dtype, trt.scale) == (0, "int8", float(np.float32(12.7 / 127)))


@pytest.mark.parametrize("target", formats.TARGETS)
def test_dead_tensor_gets_a_usable_scale(target):
    assert formats.activation_qparams(0.0, 0.0, formats.number_format(target)).scale == formats.DEAD_ACTIVATION_SCALE


def test_subnormal_range_gets_a_normal_scale():
    assert formats.activation_qparams(0.0, 1e-44, formats.number_format("ort")).scale == formats.SMALLEST_SCALE


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_impossible_range_is_refused(low, high):
    with pytest.raises(QuantizationError, match="is not a range"):
        formats.activation_qparams(low, high, formats.number_format("ort"))


def test_unknown_target_and_width_are_refused():
    with pytest.raises(QuantizationError, match="unknown target 'onnx'"):
        formats.number_format("onnx")
    with pytest.raises(QuantizationError, match="weights of 4 bits"):
        formats.number_format("ort", weight_bits=4)


def test_tensorrt_keeps_eight_bits_whatever_this_cpu_is():
    assert formats.number_format("tensorrt-rtx", weight_bits=7).weight_max == 127


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=VALUES), st.sampled_from([63, 127])
)
def test_weight_error_is_at_most_half_a_step(weight, limit):
    scales = formats.weight_scales(weight, 0, limit)
    codes = formats.quantize_symmetric(weight, scales, 0, limit)
    assert np.abs(codes).max() <= limit
    error = np.abs(codes * scales.astype(np.float64)[:, None] - weight)
    # The scale itself is rounded to float32: up to `limit` steps of one unit in its last place.
    assert (error <= scales[:, None] * (0.5 + limit * 2**-23)).all()


@given(
    hnp.arrays(np.float32, 4, elements=st.floats(0, 1e3, width=32)),
    hnp.arrays(np.float32, 4, elements=st.floats(-1e6, 1e6, width=32)),
    st.floats(1e-6, 1e3),
)
def test_bias_never_overflows_and_keeps_its_value(weights, bias, input_scale):
    assume(all(w == 0 or w > 1e-6 for w in weights))
    scales = formats.weight_scales(weights[:, None], 0, 127)
    widened = formats.widen_for_bias(scales, input_scale, bias, weights != 0)
    step = widened.astype(np.float64) * input_scale
    codes = np.rint(bias / step)
    assert (np.abs(codes) <= 2**30 * (1 + 1e-6)).all()  # the scale is rounded to float32
    assert (widened[weights != 0] >= scales[weights != 0]).all()
    dead = (weights == 0) & (bias != 0) & (np.abs(bias) > input_scale * formats.SMALLEST_SCALE * 2**20)
    # 20 bits, so half a step is 2**-21 of the bias.
    assert (np.abs(codes * step - bias)[dead] <= np.abs(bias[dead]) * 2**-20).all()


def test_vnni_decides_the_width():
    assert formats.weight_bits_for_cpu(["avx512f"]) == 7
    assert formats.weight_bits_for_cpu(["avx2", "avx_vnni"]) == 8
    assert formats.weight_bits_for_cpu([]) == 8
