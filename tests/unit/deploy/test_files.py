from __future__ import annotations

import errno
import gzip
import os
import textwrap

import pytest
from processes import run_python

from lightning_prune.deploy.files import check_writable, compressed_size, remove_stale, staged, write_whole
from lightning_prune.errors import OutputError


def names(folder):
    return sorted(p.name for p in folder.rglob("*"))


def test_files_move_in_together_and_the_last_one_last(tmp_path, monkeypatch):
    order = []
    replace = type(tmp_path).replace

    def watched(self, target):
        order.append(self.name)
        return replace(self, target)

    with staged(tmp_path / "edge") as stage:
        (stage / "report.json").write_text("new")
        (stage / "z.onnx").write_text("new")
        (stage / "sub").mkdir()
        (stage / "sub" / "a.bin").write_text("new")
        assert names(tmp_path / "edge") == []
        monkeypatch.setattr(type(tmp_path), "replace", watched)
    assert order[-1] == "report.json"
    assert names(tmp_path) == ["a.bin", "edge", "report.json", "sub", "z.onnx"]


def test_an_error_leaves_the_last_files_and_nothing_else(tmp_path):
    target = tmp_path / "edge"
    with staged(target) as stage:
        (stage / "a.onnx").write_text("old")

    def fail():
        with staged(target) as stage:
            (stage / "a.onnx").write_text("new")
            raise RuntimeError("x")

    with pytest.raises(RuntimeError, match="x"):
        fail()
    assert (target / "a.onnx").read_text() == "old"
    assert names(tmp_path) == ["a.onnx", "edge"]


def test_a_missing_file_of_the_users_data_is_not_taken_for_an_unwritable_directory(tmp_path):
    def fail():
        with staged(tmp_path / "edge"):
            (tmp_path / "data.csv").read_text()

    with pytest.raises(FileNotFoundError, match=r"data\.csv") as caught:
        fail()
    assert not isinstance(caught.value, OutputError)
    assert names(tmp_path) == ["edge"]


def test_a_full_disk_is_an_output_error_that_says_what_to_do(tmp_path):
    def full():
        with staged(tmp_path / "edge"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputError, match=r"No space left on device; free some space") as caught:
        full()
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["edge"]


def test_a_file_that_grows_past_the_limit_of_the_system_leaves_the_old_one(tmp_path):
    """The kernel refuses the write half-way, as a full disk does."""
    (tmp_path / "m.onnx").write_bytes(b"old")
    code = f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        from lightning_prune.deploy.files import write_whole
        from lightning_prune.errors import OutputError
        try:
            write_whole({str(tmp_path / "m.onnx")!r}, b"x" * 100_000)
        except OutputError as error:
            print(error.errno)
    """
    done = run_python("-c", textwrap.dedent(code))
    assert done.stdout.strip() == str(errno.EFBIG), done.stderr
    assert (tmp_path / "m.onnx").read_bytes() == b"old"
    assert names(tmp_path) == ["m.onnx"]


def test_write_whole_replaces_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_a_directory_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"choose a dirpath that this user can write to"):
        check_writable(tmp_path / "file" / "edge")
    assert check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert names(tmp_path / "a") == ["b"]


def test_compressed_size_is_that_of_gzip(tmp_path):
    data = os.urandom(5000) + bytes(50_000)
    (tmp_path / "x").write_bytes(data)
    assert compressed_size(tmp_path / "x") == len(gzip.compress(data, 9, mtime=0))


def test_stale_files_go_and_missing_ones_do_not_matter(tmp_path):
    (tmp_path / "old").write_text("")
    (tmp_path / "mine").write_text("")
    remove_stale(tmp_path, ["old", "gone"])
    assert names(tmp_path) == ["mine"]
