"""Untrusted files: irregular, too large, or malformed."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from mistral_kernels.utils.files import (
    CheckpointError,
    check_regular,
    create_anew,
    is_taken,
    read_json,
    read_text,
    write_atomically,
)


def test_regular_files_and_links_are_read(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"\xef\xbb\xbfa\r\nb")
    link = tmp_path / "link"
    link.symlink_to(file)
    assert check_regular(link) == 7
    assert read_text(link) == "a\r\nb"


def test_other_kinds_of_files_are_refused(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    device = tmp_path / "device"
    device.symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, kind in (
        *(("fifo", "a FIFO"), ("socket", "a socket"), ("device", "a device")),
        ("folder", "a folder"),
    ):
        with pytest.raises(CheckpointError) as caught:
            read_json(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name} must be a regular file, got {kind}"
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent")
    for name, target in (("dangling", "nowhere"), ("loop", "loop"), ("deep", "device/x")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(CheckpointError, match=r"got a broken symbolic link$"):
            read_json(tmp_path / name)
        assert is_taken(tmp_path / name)
        assert not is_taken(tmp_path / target / "x")


def test_created_files_replace_other_files(tmp_path):
    """`create_anew` does not block on a FIFO or write through a link, and it keeps folders."""
    mine, new = tmp_path / "mine", tmp_path / "new"
    mine.write_text("mine")
    ways = (lambda: None, new.touch, lambda: os.mkfifo(new), lambda: new.symlink_to(mine))
    for make in (*ways, lambda: os.link(mine, new), lambda: new.symlink_to("nowhere")):
        make()
        with create_anew(new) as file:
            file.write(b"new")
        assert new.read_text() == "new"
        assert not new.is_symlink()
        assert mine.read_text() == "mine"
        new.unlink()
    new.mkdir()
    with pytest.raises(IsADirectoryError):
        create_anew(new)


def test_large_files_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 11)
    with pytest.raises(CheckpointError, match=r"file must have at most 10 bytes, got 11$"):
        read_text(file, limit=10)
    assert read_text(file, limit=11) == "x" * 11


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"{", "must be JSON: Expecting property name"),
        (b"[" * 200_000, "must be JSON of moderate depth: nested too deeply"),
        (b'{"a": NaN}', "must be JSON: NaN is not a JSON number"),
        (b'{"a": -Infinity}', "must be JSON: -Infinity is not a JSON number"),
        (b'{"a": ' + b"1" * 5000 + b"}", "must be JSON: Exceeds the limit"),
        (b"\xff", "must be UTF-8: 'utf-8' codec can't decode byte 0xff"),
        (b"[]", "must be a JSON object, got list"),
        (b"null", "must be a JSON object, got NoneType"),
    ],
)
def test_contents_that_are_not_a_json_object(tmp_path, contents, message):
    file = tmp_path / "file.json"
    file.write_bytes(contents)
    with pytest.raises(CheckpointError) as caught:
        read_json(file)
    assert str(caught.value).startswith(f"{file} {message}")


SCHEMA = {
    "count": int,
    "size": float,
    "flag": (bool, None),
    "ids": (int, None, [int]),
    "rope": {"theta": float, "kinds": [str]},
    "template": (str, [{"name": str}]),
    "tokens": {"first": str, ...: (int, {"id": int})},
}


@pytest.mark.parametrize(
    "contents",
    [
        {},
        {"count": 2**63 - 1, "size": 3, "flag": None, "ids": [1, 2], "other": [[{}]]},
        {"size": -1e300, "flag": True, "ids": None, "rope": {"theta": 1e4, "x": 0, "kinds": []}},
        {"template": "x"},
        {"template": [{"name": "x", "y": 1}, {}]},
        {"tokens": {"first": "x", "...": 1, "other": {"id": 2, "y": "z"}}},
    ],
)
def test_contents_that_match_the_schema(tmp_path, contents):
    file = tmp_path / "file.json"
    file.write_text(json.dumps(contents))
    assert read_json(file, SCHEMA) == contents


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ('{"count": true}', "count must be an integer, got True"),
        ('{"count": 1.0}', "count must be an integer, got 1.0"),
        ('{"count": 9223372036854775808}', "count must be an integer, got 9223372036854775808"),
        ('{"size": false}', "size must be a number, got False"),
        ('{"size": 1e999}', "size must be a number, got inf"),
        ('{"size": "1"}', "size must be a number, got '1'"),
        ('{"flag": 0}', "flag must be true or false or null, got 0"),
        ('{"ids": ["x"]}', "ids[0] must be an integer, got 'x'"),
        ('{"ids": {}}', "ids must be an integer or null or a list, got {}"),
        ('{"rope": []}', "rope must be an object, got []"),
        ('{"rope": {"theta": null}}', "rope.theta must be a number, got None"),
        ('{"rope": {"kinds": ["a", 1]}}', "rope.kinds[1] must be a string, got 1"),
        ('{"template": [{"name": 1}]}', "template[0].name must be a string, got 1"),
        ('{"tokens": {"first": 1}}', "tokens.first must be a string, got 1"),
        ('{"tokens": {"other": "x"}}', "tokens.other must be an integer or an object, got 'x'"),
        ('{"tokens": {"other": {"id": "x"}}}', "tokens.other.id must be an integer, got 'x'"),
    ],
)
def test_contents_that_do_not_match_the_schema(tmp_path, contents, message):
    file = tmp_path / "file.json"
    file.write_text(contents)
    with pytest.raises(CheckpointError) as caught:
        read_json(file, SCHEMA)
    assert str(caught.value) == f"{file}: {message}"


@pytest.mark.parametrize("links", [True, False])
def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch, links):
    """An existing file is kept or replaced as a whole, also on file systems without hard links."""

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    file = tmp_path / "file"
    write_atomically(file, b"one")
    with pytest.raises(FileExistsError, match=rf"^\[Errno 17\] File exists: '{file}'$"):
        write_atomically(file, b"two")
    assert file.read_bytes() == b"one"
    write_atomically(file, b"three", mode=0o600, replace=True)
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"three", 0o600)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "link", b"four")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match=r": '\.'$"):
        write_atomically(Path("."), b"a path without a name")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(PermissionError, match=rf": '{file}'$"):
            write_atomically(file, b"five", replace=True)
    assert file.read_bytes() == b"three"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}
