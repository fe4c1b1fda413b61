import pytest

from bertray.errors import BertrayError
from bertray.storage import Location


@pytest.fixture
def tree(tmp_path):
    for name in ("a.csv", "b.csv.gz", "deep/c.csv", "deep/deeper/d.csv", ".hidden.csv", "_meta/e.csv", "a b/f[1].csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a b/f[1].csv", "a.csv", "b.csv.gz", "deep/c.csv", "deep/deeper/d.csv"]),
        ("a.csv", ["a.csv"]),
        ("*.csv", ["a.csv"]),
        ("*", ["a.csv", "b.csv.gz"]),
        ("**/*.csv", ["a b/f[1].csv", "a.csv", "deep/c.csv", "deep/deeper/d.csv"]),
        ("deep/*.csv", ["c.csv"]),
        ("?.csv", ["a.csv"]),
        ("[a-b].*", ["a.csv", "b.csv.gz"]),
        ("[!a].*", ["b.csv.gz"]),
        ("a b/f[1].csv", ["f[1].csv"]),  # a file of that very name wins over the wildcard
        ("none*.csv", []),
        ("none", []),
        ("deep/../a.csv", ["a.csv"]),
    ],
)
def test_what_a_location_matches(tree, pattern, names):
    found = Location(f"{tree}/{pattern}").match()
    assert [file.name for file in found] == names
    for file in found:
        assert Location(file.url).read().decode().endswith(file.name)


def test_a_write_is_whole_or_not_at_all(tmp_path):
    target = Location(str(tmp_path)) / "new/folder/file"
    target.write(b"first")
    with pytest.raises(TypeError):
        target.write("not bytes")
    assert target.read() == b"first"
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["file"]
    target.delete()
    assert not target.exists()
    target.delete()


def test_the_stamp_follows_the_content(tmp_path):
    (tmp_path / "f").write_text("one")
    before = Location(str(tmp_path / "f")).match()[0].stamp
    (tmp_path / "f").write_text("three")
    assert Location(str(tmp_path / "f")).match()[0].stamp != before


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Location("x/../y").url == str(tmp_path / "y")


def test_an_unknown_kind_of_url_is_one_line():
    with pytest.raises(BertrayError, match="nosuch://x cannot be opened"):
        Location("nosuch://x").exists()


def test_file_systems_of_fsspec():
    import fsspec

    fsspec.filesystem("memory").pipe("/box/rows.txt", b"hello\n")
    location = Location("memory://box/rows.txt")
    assert location.read() == b"hello\n"
    assert [file.name for file in Location("memory://box/*.txt").match()] == ["rows.txt"]


def test_s3_reads_writes_lists_and_deletes(s3):
    from bertray.sources import Columns, Reader, units
    from bertray.spec import Source

    folder = Location(s3) / "in/rows"
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write(b'{"text": "hi", "label": "x"}\n' * 3)
    assert [file.name for file in folder.files()] == ["a.jsonl", "b.jsonl"]
    assert (folder / "a.jsonl").exists()
    columns = Columns("text", label="label")
    for path in (f"{s3}/in/rows/*.jsonl", f"{s3}/in/rows", f"{s3}/in/rows/"):
        cut = units(Source(path=path), columns, 2)
        reader = Reader(columns)
        assert [reader.read(unit).rows.num_rows for unit in cut] == [2, 1, 2, 1]
        assert cut[0].url == "s3://box/in/rows/a.jsonl"
    folder.delete()
    assert folder.files() == []


def test_an_outage_is_waited_for_and_counted(s3, monkeypatch):
    import os
    import threading
    from urllib.parse import urlsplit

    from flaky import Flaky

    from bertray import storage

    (Location(s3) / "outage/file").write(b"content")
    address = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    server = Flaky((address.hostname, address.port), share=1.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    before = storage.retries()
    threading.Timer(6, lambda: setattr(server, "share", 0.0)).start()
    assert (Location(s3) / "outage/file").read() == b"content"
    assert storage.retries() > before
    server.shutdown()


def test_what_will_not_pass_is_not_waited_for(tmp_path, s3):
    from bertray import storage

    before = storage.retries()
    for place in (Location(str(tmp_path)) / "none", Location(s3) / "none", Location("s3://no-such-bucket/none")):
        with pytest.raises(OSError):
            place.read()
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OSError):
        (Location(str(tmp_path)) / "file/below").write(b"x")
    assert storage.retries() == before
