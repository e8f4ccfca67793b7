from __future__ import annotations

from pathlib import Path

import pytest

from calib.errors import FileError
from calib.files import require_file


def test_what_is_wanted_and_why_it_cannot_be_had(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(b"")
    require_file(file)
    (tmp_path / "link").symlink_to(file)
    require_file(tmp_path / "link")
    with pytest.raises(FileError, match=r"^cannot read the model .*absent: it does not exist$"):
        require_file(tmp_path / "absent", to="read the model")
    with pytest.raises(FileError, match=r"cannot measure .*: it is a folder"):
        require_file(tmp_path, to="measure")
    with pytest.raises(FileError, match="cannot read xxx"):
        require_file(Path("x" * 300))
