from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from calib.errors import FileError
from calib.files import check_writable, require_file, write_text


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


def test_a_pipe_or_device_is_never_replaced(tmp_path: Path) -> None:
    """Run as root, ``-o /dev/null`` put a regular file in the place of the device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        for refuse in (check_writable, lambda target: write_text(target, "text")):
            with pytest.raises(FileError, match="it is a device or a pipe"):
                refuse(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(FileError, match="it is a device or a pipe"):
        check_writable(Path("/dev/null"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    (tmp_path / "link").symlink_to("folder/old")
    (tmp_path / "dangling").symlink_to("folder/new")
    (tmp_path / "astray").symlink_to("nowhere/new")
    for name, file in (("link", "old"), ("dangling", "new")):
        write_text(tmp_path / name, name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "folder" / file).read_text() == name
    with pytest.raises(FileError, match="is not a folder"):
        write_text(tmp_path / "astray", "text")
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == ["new", "old"]
