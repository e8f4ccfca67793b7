from __future__ import annotations

from types import SimpleNamespace

import pytest

from relu_deploy.cli.common import _Rate


@pytest.mark.parametrize(
    ("speed", "shown"), [(None, ""), (12.345, "12.3/s"), (0.00456, "0.00456/s"), (99.96, "100/s"), (2345.6, "2346/s")]
)
def test_the_rate_is_shown_once_it_is_known(speed, shown):
    assert _Rate().render(SimpleNamespace(speed=speed)).plain == shown
