"""Files: whole or absent, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import SafetensorError, safe_open

from armorm.errors import OutputError
from armorm.files import (
    files_together,
    plain,
    read_arrays,
    read_text,
    read_yaml,
    require_space,
    text_file,
    write_arrays,
    write_json,
    write_text,
    write_whole,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_appears_under_its_name_only_when_the_block_has_ended(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    with text_file(path) as file:
        file.write("one\n")
        file.flush()
        assert not path.exists()
    assert path.read_text() == "one\n"
    assert names(path.parent) == ["out.jsonl"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_text_and_no_other_file(tmp_path, error):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(error), text_file(path) as file:
        file.write("new")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["out.jsonl"]


def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, write)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["weights.bin"]


@pytest.mark.parametrize(
    "work",
    [
        "with text_file(path) as f:\n    f.write('new'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)",
        "write_whole(path, lambda t: (t.write_text('new'), os.kill(os.getpid(), signal.SIGKILL)))",
    ],
)
def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path, work):
    path = tmp_path / "out.txt"
    path.write_text("old")
    program = (
        "import os, signal\nfrom pathlib import Path\nfrom armorm.files import text_file, write_whole\n"
        f"path = Path({str(path)!r})\n{work}\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_files_take_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_arrays(tmp_path / "a.safetensors", {"x": np.zeros(2)})
        write_text(tmp_path / "a.txt", "x")
        with text_file(tmp_path / "b.txt") as file:
            file.write("x")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o640"}


def test_text_is_written_as_utf8_whatever_the_locale(tmp_path):
    write_text(tmp_path / "a.txt", "naïve 語")
    assert (tmp_path / "a.txt").read_bytes() == "naïve 語".encode()


def test_json_has_no_nan_and_keeps_text_readable(tmp_path):
    value = {"a": [1.5, math.nan, -math.inf], "b": np.array([[1.0, np.nan]], np.float32), "c": "語", 4: Path("x/y")}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [1.5, None, None],
        "b": [[1.0, None]],
        "c": "語",
        "4": "x/y",
    }
    assert "語" in text
    assert text.endswith("}\n")


def test_plain_gives_only_types_that_json_has():
    value = {"n": np.int64(3), "b": np.bool_(True), "f": np.float32(0.5), "t": (1, None, "x"), "nan": np.float64("nan")}
    found = plain(value)
    assert found == {"n": 3, "b": True, "f": 0.5, "t": [1, None, "x"], "nan": None}
    assert [type(entry) for entry in found.values()] == [int, bool, float, list, type(None)]


def test_arrays_round_trip_with_shape_type_and_metadata(tmp_path):
    from safetensors import safe_open

    arrays = {
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "strided": np.arange(10)[::3],
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.float64),
        "bytes": np.frombuffer(b"key", np.uint8),
    }
    path = tmp_path / "deep" / "a.safetensors"
    write_arrays(path, arrays, {"key": "abc"})
    found = read_arrays(path)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert np.array_equal(found[name], array)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"key": "abc"}


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("utf-32-be", "UTF-32"),
        ("latin-1", "Latin-1"),
    ],
)
def test_text_in_another_encoding_is_named(tmp_path, encoding, named):
    (tmp_path / "a").write_bytes("name: café\nseed: 1\n".encode(encoding))
    with pytest.raises(UnicodeError, match=named):
        read_text(tmp_path / "a")


def test_utf8_is_read_with_and_without_a_mark(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a").write_bytes("naïve 語".encode(encoding))
        assert read_text(tmp_path / "a") == "naïve 語"


ALIASES = "\n".join(
    [
        "a: &a [x, x, x, x, x, x, x, x, x]",
        *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    ]
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (ALIASES, "5,000 values"),
        ("[" * 5000 + "]" * 5000, "50 levels"),
        ("[" * 5000, "50 levels"),
        ("a: &a {b: *a}", "inside what it stands for"),
        ("x" * 300_000, "300,000 characters"),
        ("[" + "1," * 30_000 + "]", "5,000 values"),
        ("2020-99-99", "month"),
        ("9" * 5000, "digits"),
        ("a: 1\na: 2", "occurs twice"),
        ("{[1]: 2}", "unhashable"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: *nothing", "nothing"),
        ("a\x00b", "not allowed"),
    ],
)
def test_yaml_beyond_its_limits_is_rejected_at_once(text, part):
    start = time.monotonic()
    with pytest.raises(yaml.YAMLError, match=part):
        read_yaml(text)
    assert time.monotonic() - start < 2


def test_aliases_within_the_limits_are_read():
    assert read_yaml("a: &a [1, 2]\nb: *a\nc: {d: *a}\n") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}


def in_a_fifo(path: Path, write) -> bytes:
    """What arrives in a new FIFO at `path` while `write` runs."""
    os.mkfifo(path)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()
    write()
    reader.join(10)
    return found[0]


WRITERS = [
    lambda path: write_text(path, "new\n"),
    lambda path: write_whole(path, lambda temporary: temporary.write_text("new\n")),
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_fifo_is_written_to_and_stays(tmp_path, write):
    path = tmp_path / "fifo"
    assert in_a_fifo(path, lambda: write(path)) == b"new\n"
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("write", WRITERS)
def test_a_device_is_written_to_and_stays(write):
    write(Path("/dev/null"))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.parametrize("write", WRITERS)
def test_a_link_is_followed_to_its_target(tmp_path, write):
    (tmp_path / "folder").mkdir()
    target, link, second = tmp_path / "folder" / "target", tmp_path / "link", tmp_path / "second"
    link.symlink_to("folder/target")  # does not exist yet
    second.symlink_to(link)
    write(second)
    assert second.is_symlink() and link.is_symlink()
    assert target.read_text() == "new\n" and names(tmp_path / "folder") == ["target"]


@pytest.mark.parametrize("write", WRITERS)
def test_permissions_of_an_existing_file_are_kept(tmp_path, write):
    path = tmp_path / "private"
    path.write_text("old")
    path.chmod(0o600)
    write(path)
    assert path.read_text() == "new\n" and stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("write", WRITERS)
def test_errors_of_writing_name_the_path(tmp_path, write):
    with pytest.raises(OutputError, match=r"^/dev/full: No space left on device$"):
        write(Path("/dev/full"))
    with pytest.raises(OutputError, match="is a folder"):
        write(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match="loop"):
        write(tmp_path / "loop")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=f"^{tmp_path}/file/x: "):
        write(tmp_path / "file" / "x")


def test_an_error_of_the_block_itself_is_not_one_of_the_output(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, text_file(tmp_path / "a"):
        (tmp_path / "missing").read_text()
    assert not isinstance(raised.value, OutputError)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # as tokenizers says it
    ],
)
def test_a_full_disk_while_a_model_is_written_leaves_the_old_one(tmp_path, error):
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(OutputError, match=f"^{tmp_path}: No space left on device$"), files_together(tmp_path) as new:
        (new / "config.json").write_text("new")
        raise error
    assert names(tmp_path) == ["config.json"] and (tmp_path / "config.json").read_text() == "old"


def test_files_written_together_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        with files_together(tmp_path / "model") as new:
            for name in ("config.json", "weights"):
                (new / name).write_text("new")
                (new / name).chmod(0o600)
    finally:
        os.umask(before)
    assert names(tmp_path / "model") == ["config.json", "weights"]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o644}


def test_space_that_is_lacking_is_foreseen(tmp_path):
    require_space(tmp_path / "deep" / "file", 1, "the features")
    with pytest.raises(OutputError, match=r"deep/file: the features need 10,000,.* bytes, found .* free"):
        require_space(tmp_path / "deep" / "file", 10**19, "the features")


def test_what_killed_processes_left_is_removed_by_the_next_that_writes_there(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = platform.node()[:20]
    left = tmp_path / f".a.txt.{host}.{ended.pid}.tmp"
    running, elsewhere = tmp_path / f".a.txt.{host}.{os.getppid()}.tmp", tmp_path / f".a.txt.elsewhere.{ended.pid}.tmp"
    for path in (left, running, elsewhere):
        path.write_text("half")
    folder = tmp_path / f".writing.{host}.{ended.pid}.tmp"
    folder.mkdir()
    write_text(tmp_path / "a.txt", "whole")
    with files_together(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", running.name, elsewhere.name}


def test_a_folder_is_searched_for_them_once(tmp_path, monkeypatch):
    searched, glob = [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: searched.append(self) or glob(self, pattern))
    for number in range(5):
        write_text(tmp_path / f"{number}.txt", "text")
    assert searched == [tmp_path]


def test_equal_arrays_and_metadata_give_equal_bytes(tmp_path):
    metadata = {f"näme {number}": f'"{number}\x01\n' for number in range(20)}
    found = set()
    for number in range(4):
        shuffled = dict(sorted(metadata.items(), reverse=bool(number % 2)))
        write_arrays(tmp_path / f"{number}", {"b": np.arange(3.0), "a": np.zeros((2, 2))}, shuffled)
        found.add((tmp_path / f"{number}").read_bytes())
    assert len(found) == 1
    with safe_open(tmp_path / "0", framework="np") as file:
        assert file.metadata() == metadata
        assert file.get_tensor("b").tolist() == [0, 1, 2]
