import os
from pathlib import Path

import pytest

from secateur.errors import DataError
from secateur.files import read_json, replace_dir, write_atomic


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_write_atomic_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "one\n")
    write_atomic(path, "zwei ü\n")
    assert path.read_bytes() == "zwei ü\n".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == {"b.txt"}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_write_atomic_gives_ordinary_permissions(tmp_path):
    write_atomic(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_read_json_reads_what_write_atomic_wrote(tmp_path):
    write_atomic(tmp_path / "a.json", '{"a": [1, 2.5, "ü"]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, "ü"]}


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00", b"[" * 200_000])
def test_read_json_names_a_damaged_file(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(DataError, match=r"plan\.json is damaged"):
        read_json(tmp_path / "plan.json")


def test_read_json_names_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.json cannot be read: No such file"):
        read_json(tmp_path / "none.json")


def test_replace_dir_swaps_a_whole_folder_in(tmp_path):
    path = tmp_path / "deep" / "out"
    with replace_dir(path) as new:
        (new / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert names(path.parent) == {"out"}


def test_replace_dir_replaces_its_own_files_and_keeps_foreign_ones(tmp_path):
    path = tmp_path / "out"
    (path / "notes").mkdir(parents=True)
    (path / "notes" / "mine").write_text("keep")
    (path / "a").write_text("old")
    with replace_dir(path) as new:
        (new / "a").write_text("new")
    assert (path / "a").read_text() == "new"
    assert (path / "notes" / "mine").read_text() == "keep"
    assert names(tmp_path) == {"out"}


def test_a_failing_block_leaves_the_folder_as_it_was(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "a").write_text("old")

    def half_way():
        with replace_dir(path) as new:
            (new / "a").write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half_way()
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_a_failing_block_makes_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), replace_dir(tmp_path / "out"):
        raise KeyboardInterrupt
    assert names(tmp_path) == set()


def test_a_failing_swap_brings_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.mkdir()
    (path / "a").write_text("old")
    move = Path.replace

    def stubborn(self, target):
        if self.name == "new":
            raise PermissionError(13, "Permission denied")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", stubborn)
    with pytest.raises(PermissionError), replace_dir(path) as new:
        (new / "a").write_text("new")
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_replace_dir_refuses_a_file(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(DataError, match="is a file, expected a folder"), replace_dir(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "x"
