import os
import subprocess
import sys

import pytest

from bertray import cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "bertray"


def test_the_hash_of_a_large_file_is_read_off_until_the_file_changes(home, tmp_path):
    small, large = tmp_path / "small", tmp_path / "folder" / "large"
    large.parent.mkdir()
    small.write_bytes(b"text")
    large.write_bytes(os.urandom(5 << 20))
    before = cache.sha256(large)
    assert before == subprocess.run(["sha256sum", large], capture_output=True, text=True).stdout.split()[0]
    assert cache.sha256(small) == "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"
    (note,) = (home / "hashes").iterdir()
    note.write_text("0" * 64)  # a lie: whoever tells it has not read the file
    assert cache.sha256(large) == "0" * 64
    large.parent.rename(tmp_path / "elsewhere")  # as a copy that is whole gets its name
    assert cache.sha256(tmp_path / "elsewhere" / "large") == "0" * 64
    note.write_text("")
    assert cache.sha256(tmp_path / "elsewhere" / "large") == before


@pytest.mark.parametrize("change", ["size", "content, its time set back", "another file in its place"])
def test_a_large_file_that_has_changed_is_hashed_again(home, tmp_path, change):
    file, content = tmp_path / "file", os.urandom(5 << 20)
    file.write_bytes(content)
    before, times = cache.sha256(file), file.stat()
    if change == "size":
        with file.open("ab") as stream:
            stream.write(b"x")
    elif change == "another file in its place":
        (tmp_path / "other").write_bytes(content[::-1])
        (tmp_path / "other").replace(file)
    else:
        with file.open("r+b") as stream:
            stream.write(b"other")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cache.sha256(file) != before


def test_without_a_cache_to_write_files_are_hashed_all_the_same(home, tmp_path, monkeypatch):
    (home / "hashes").parent.mkdir(parents=True)
    (home / "hashes").write_text("in the way")
    file = tmp_path / "file"
    file.write_bytes(bytes(5 << 20))
    assert cache.sha256(file) == "c036cbb7553a909f8b8877d4461924307f27ecb66cff928eeeafd569c3887e29"


def test_a_folder_is_filled_once_by_processes_that_want_it_at_once(home, tmp_path):
    code = (
        "import os, sys, time; from bertray import cache\n"
        "def fill(folder):\n"
        "    open(sys.argv[1], 'a').write(f'{os.getpid()} ')\n"
        "    (folder / 'part').write_text('one')\n"
        "    time.sleep(0.5)\n"
        "    (folder / 'other').write_text('two')\n"
        "print(sorted(file.name for file in cache.filled('a', fill).iterdir()))"
    )
    log = tmp_path / "log"
    command = [sys.executable, "-c", code, str(log)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert {process.communicate(timeout=60)[0] for process in processes} == {"['SHA256SUMS', 'other', 'part']\n"}
    assert len(log.read_text().split()) == 1
    folder = home / "models" / "a"
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder).returncode == 0


def test_what_fails_to_fill_a_folder_leaves_nothing(home):
    def fill(folder):
        (folder / "part").write_text("one")
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        cache.filled("a", fill)
    assert cache.kept("a") is None
    assert [file.name for file in (home / "models").iterdir()] == [".a.lock"]


def test_without_a_home_temporary_files_are_the_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / f"bertray-{os.getuid()}"
    assert cache.home() == own
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)  # others could put files there
    assert cache.home() not in (own, tmp_path)
    assert cache.home() == cache.home()
