import numpy as np
import onnx
import pytest

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source


@pytest.fixture(scope="session")
def measure():
    """Ranges of a model over seeded random samples of its first input."""

    def run(model: onnx.ModelProto, *, samples: int = 8, seed: int = 0):
        (spec,) = model_inputs(model)
        shape = tuple(size if isinstance(size, int) else 1 for size in spec.shape)[1:]
        data = np.random.default_rng(seed).normal(size=(samples, *shape)).astype(np.float32)
        return calibrate(model, open_source(data, (spec,)))

    return run
