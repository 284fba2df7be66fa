import json
import struct
import warnings
import zipfile

import pytest

from guided_diffusion.tools.archives import (
    Refused,
    check_json,
    check_safetensors,
    check_unpacked,
    check_zip,
    unpack,
)

FINE = "data/datasets/gts/face/0.png"


def entry(name, kind=0, system=3):
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = name
    info.create_system, info.external_attr = system, kind << 16
    return info


def write(path, *entries, compression=zipfile.ZIP_STORED):
    """Write entries as given, the unsafe ones too."""
    with zipfile.ZipFile(path, "w") as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of a name that comes twice
        for name, content in entries:
            info = name if isinstance(name, zipfile.ZipInfo) else entry(name)
            made.writestr(info, content, compression)
    return path


@pytest.fixture
def data(tmp_path):
    """A folder data/ with one shipped model and one shipped picture."""
    data = tmp_path / "re paint/data"
    for name in ("pretrained/demo64.pt", "datasets/gts/demo/0.png"):
        (data / name).parent.mkdir(parents=True)
        (data / name).write_bytes(b"shipped")
    return data


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


UNSAFE = {
    "absolute": ["/tmp/evil.png"],
    "absolute behind data": ["data//{outside}/victim.txt"],
    "absolute behind datasets": ["data/datasets//{outside}/victim.txt"],
    "up": ["data/datasets/../../../victim.txt"],
    "up at the end": ["data/datasets/gts/.."],
    "here": ["data/./datasets/x.png"],
    "dots that Windows drops": ["data/datasets/.. /x.png"],
    "backslash": ["data\\..\\..\\evil.png"],
    "drive": ["C:/evil.png"],
    "drive without a slash": ["C:evil.png"],
    "drive behind data": ["data/C:/evil.png"],
    "stream": ["data/datasets/x.png:hidden"],
    "control character": ["data/datasets/x\n.png"],
    "folder that goes up": ["data/datasets/../"],
    "twice": [FINE],
    "twice with and without data": [FINE.removeprefix("data/")],
    "letter case": ["data/datasets/gts/face/0.PNG"],
    "letter case of a folder": ["data/datasets/gts/Face/1.png"],
    "form of an accent": ["data/datasets/\u00e9.png", "data/datasets/e\u0301.png"],
    "file and folder": ["data/datasets/gts/face/0.png/x"],
    "link": [entry("data/datasets/gts/link", 0o120777)],
    "link to a folder": [entry("data/datasets/gts/link/", 0o120777)],
    "link from another system": [entry("data/datasets/gts/link", 0o120777, system=0)],
    "device": [entry("data/datasets/gts/null", 0o020666)],
    "disk": [entry("data/datasets/gts/disk", 0o060666)],
    "pipe": [entry("data/datasets/gts/pipe", 0o010666)],
    "socket": [entry("data/datasets/gts/socket", 0o140666)],
    "folder under a file's name": [entry("data/datasets/gts/folder", 0o040777)],
    "outside datasets": ["data/pretrained/../../evil.png"],
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_one_unsafe_entry_and_nothing_is_written(tmp_path, data, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim.txt").write_bytes(b"mine")
    before = contents(tmp_path)
    names = [
        name if isinstance(name, zipfile.ZipInfo) else name.format(outside=outside)
        for name in UNSAFE[kind]
    ]
    archive = write(tmp_path / "data.zip", (FINE, b"fine"), *((name, b"evil") for name in names))
    with pytest.raises(Refused, match=r"holds an unsafe entry, .*: nothing is unpacked"):
        unpack(archive, data, data / "datasets/data.zip.contents")
    archive.unlink()
    assert contents(tmp_path) == before


def test_absolute_name_before_one_that_stops_the_renaming(tmp_path, data):
    """The first entry was written to its absolute path before the second ended the program."""
    victim = tmp_path / "victim.txt"
    victim.write_bytes(b"mine")
    archive = write(tmp_path / "x.zip", (f"data/{victim}", b"evil"), ("data/datasets/gts", b""))
    with pytest.raises(Refused):
        unpack(archive, data, data / "datasets/data.zip.contents")
    assert victim.read_bytes() == b"mine"


def test_name_with_a_nul_is_refused(tmp_path, data):
    # zipfile cuts the name there: two programs would see two names.
    archive = write(tmp_path / "x.zip", ("data/datasets/gts/a.pngZ/../../../evil", b""))
    archive.write_bytes(archive.read_bytes().replace(b".pngZ", b".png\0"))
    with pytest.raises(Refused, match="unsafe entry"):
        unpack(archive, data, data / "datasets/data.zip.contents")


def test_only_what_lies_below_datasets_is_taken(tmp_path, data):
    archive = write(
        tmp_path / "x.zip",
        ("data/", b""),
        ("data/datasets/", b""),
        (FINE, b"fine"),
        ("data/pretrained/demo64.pt", b"evil"),
        ("confs/demo.yml", b"evil"),
        ("test.py", b"evil"),
        ("data/datasets/data.zip.contents", b"evil"),
        ("__MACOSX/data/._0.png", b"rubbish"),
    )
    record = data / "datasets/data.zip.contents"
    assert unpack(archive, data, record).startswith("1 files unpacked into data/")
    assert contents(data.parent) == {
        "data/pretrained/demo64.pt": b"shipped",
        "data/datasets/gts/demo/0.png": b"shipped",
        "data/datasets/gts/face/0.png": b"fine",
        "data/datasets/data.zip.contents": record.read_bytes(),
    }
    assert json.loads(record.read_text()) == {"datasets/gts/face/0.png": 4}


def test_archive_without_pictures_is_refused(tmp_path, data):
    archive = write(tmp_path / "x.zip", ("data/pretrained/demo64.pt", b"evil"))
    with pytest.raises(Refused, match="archive without files"):
        unpack(archive, data, data / "datasets/data.zip.contents")
    assert (data / "pretrained/demo64.pt").read_bytes() == b"shipped"


def test_what_others_put_there_stays(tmp_path, data):
    mine = data / "datasets/gts/face/1.png"
    mine.parent.mkdir()
    mine.write_bytes(b"my own picture")
    names = ("data/datasets/gts/demo/0.png", "data/datasets/gts/face/1.png", FINE)
    archive = write(tmp_path / "x.zip", *((name, b"theirs") for name in names))
    record = data / "datasets/data.zip.contents"
    assert "2 kept as they are here, such as data/datasets/gts/demo/0.png" in (
        unpack(archive, data, record)
    )
    assert mine.read_bytes() == b"my own picture"
    assert (data / "datasets/gts/demo/0.png").read_bytes() == b"shipped"
    assert check_unpacked(data, record) == []  # what was kept is not missed


def test_a_picture_that_was_changed_since_stays_and_stays_known(tmp_path, data):
    lost, edited, same_size = (data / f"datasets/gts/face/{number}.png" for number in range(3))
    names = [f"data/datasets/gts/face/{number}.png" for number in range(3)]
    archive = write(tmp_path / "x.zip", *((name, b"fine") for name in names))
    record = data / "datasets/data.zip.contents"
    unpack(archive, data, record)
    edited.write_bytes(b"my own")
    assert check_unpacked(data, record) == ["datasets/gts/face/1.png"]
    same_size.write_bytes(b"mine")
    lost.unlink()
    told = unpack(archive, data, record)
    assert told.startswith("1 files unpacked into data/; 2 kept as they are here, such as data/")
    found = [path.read_bytes() for path in (lost, edited, same_size)]
    assert found == [b"fine", b"my own", b"mine"]
    edited.unlink()
    with pytest.raises(Refused, match=r"data/datasets/gts/face/1\.png is gone"):
        check_unpacked(data, record)


def test_link_in_a_folder_is_not_followed(tmp_path, data):
    victim = tmp_path / "victim.txt"
    victim.write_bytes(b"mine")
    picture = data / "datasets/gts/face/0.png"
    picture.parent.mkdir()
    picture.symlink_to(victim)
    record = data / "datasets/data.zip.contents"
    record.write_text(json.dumps({"datasets/gts/face/0.png": 4}))
    unpack(write(tmp_path / "x.zip", (FINE, b"fine")), data, record)
    assert (victim.read_bytes(), picture.readlink()) == (b"mine", victim)
    victim.write_bytes(b"fine")
    unpack(tmp_path / "x.zip", data, record)
    victim.write_bytes(b"mine")
    assert picture.read_bytes() == b"fine"


def test_folder_that_leads_out_is_told(tmp_path, data):
    (tmp_path / "elsewhere").mkdir()
    (data / "datasets/gts/face").symlink_to(tmp_path / "elsewhere")
    archive = write(tmp_path / "x.zip", (FINE, b"fine"))
    with pytest.raises(OSError, match="a link that leads out of data/datasets"):
        unpack(archive, data, data / "datasets/data.zip.contents")
    assert contents(tmp_path / "elsewhere") == {}


def test_datasets_may_lie_on_another_disk(tmp_path, data):
    (data / "datasets").rename(tmp_path / "disk")
    (data / "datasets").symlink_to(tmp_path / "disk")
    record = data / "datasets/data.zip.contents"
    unpack(write(tmp_path / "x.zip", (FINE, b"fine")), data, record)
    check_unpacked(data, record)


def test_leftovers_of_a_killed_run_go(tmp_path, data):
    (data / "datasets/.unpack-1/data").mkdir(parents=True)
    unpack(write(tmp_path / "x.zip", (FINE, b"")), data, data / "datasets/data.zip.contents")
    assert not list((data / "datasets").glob(".unpack-*"))


def test_record_that_cannot_be_read_counts_as_nothing(data):
    record = data / "datasets/data.zip.contents"
    record.write_bytes(b"{")
    with pytest.raises(Refused, match="cannot be read"):
        check_unpacked(data, record)


def encrypted(path):
    write(path, ("data/datasets/0.png", b"fine"))
    with zipfile.ZipFile(path) as archive:
        (info,) = archive.infolist()
        table = archive.start_dir
    content = bytearray(path.read_bytes())
    content[info.header_offset + 6] |= 1
    content[table + 8] |= 1
    path.write_bytes(content)


def deflated_nonsense(path):
    write(path, ("data/datasets/0.png", bytes(1000)), compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())

    start = 30 + len("data/datasets/0.png")
    content[start : start + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [encrypted, deflated_nonsense])
def test_archive_that_cannot_be_read_is_refused(tmp_path, damage):
    damage(tmp_path / "x.zip")
    with pytest.raises(Refused, match="is cut off or damaged"):
        check_zip(tmp_path / "x.zip", every_byte=True)


def test_old_checkpoint_passes_only_where_one_belongs(tmp_path):
    (tmp_path / "x").write_bytes(b"\x80\x02rest")
    check_zip(tmp_path / "x", every_byte=True, old_torch=True)
    with pytest.raises(Refused):
        check_zip(tmp_path / "x", every_byte=True)


def safetensors(table, size):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


TABLE = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        (safetensors(TABLE, 7), "is cut off or damaged"),
        (safetensors(TABLE, 9), "is cut off or damaged"),
        (safetensors(TABLE, 8)[:40], "its table does not fit"),
        (struct.pack("<Q", 1 << 60) + b"{}", "its table does not fit"),
        (safetensors(b"[[[[", 8), "its table cannot be read"),
        (safetensors(b"[" * 100_000, 8), "its table cannot be read"),
        (safetensors({"a": {}}, 8), "its table cannot be read"),
        (safetensors({}, 8), "its table cannot be read"),
        (safetensors({"a": {"data_offsets": [0, "8"]}}, 8), "its table cannot be read"),
    ],
    ids=range(12),
)
def test_safetensors_that_is_not_whole_is_refused(tmp_path, content, problem):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(Refused, match=problem):
        check_safetensors(path)


def test_whole_safetensors_passes(tmp_path):
    (tmp_path / "x").write_bytes(safetensors(TABLE, 8))
    check_safetensors(tmp_path / "x")


def test_safetensors_of_the_library_passes(tmp_path):
    torch = pytest.importorskip("safetensors.torch")
    from torch import ones

    torch.save_file({"a": ones(3, 2), "b": ones(5)}, tmp_path / "x", metadata={"format": "pt"})
    check_safetensors(tmp_path / "x")


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1'], ids=range(5)
)
def test_json_that_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(Refused, match="is not a JSON object"):
        check_json(tmp_path / "config.json")


def test_bomb_is_measured_before_it_is_unpacked(tmp_path, data, monkeypatch):
    archive = write(tmp_path / "x.zip", (FINE, bytes(10**6)), compression=zipfile.ZIP_DEFLATED)
    assert archive.stat().st_size < 5000
    from guided_diffusion.tools import archives

    usage = archives.shutil._ntuple_diskusage(1, 1, 999_999)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="the disk has less"):
        unpack(archive, data, data / "datasets/data.zip.contents")


def test_names_with_spaces_and_in_other_scripts(tmp_path, data):
    archive = write(tmp_path / "x.zip", ("data/datasets/gts/人脸/0 1.png", b"fine"))
    unpack(archive, data, data / "datasets/data.zip.contents")
    assert (data / "datasets/gts/人脸/0 1.png").read_bytes() == b"fine"
