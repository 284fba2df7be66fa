"""Finding pictures: which files of a folder or a store count."""

import inspect
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from picture_cases import folder_of, picture, save

from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import pair_images
from guided_diffusion.io.images import read_rgb
from guided_diffusion.io.listing import list_images, output_name


def test_lists_recursively_any_case_sorted_by_the_whole_path(tmp_path):
    names = ["b/x.PNG", "b-1.jpeg", "a.JPG", "b/c/d.gif", "名 前.png", "b.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "png").touch()
    expected = sorted(f"{tmp_path}/{name}" for name in names)
    assert expected[1] == f"{tmp_path}/b-1.jpeg"  # "-" < "." < "/": not folder by folder
    assert list_images(str(tmp_path)) == expected


def test_links_are_followed_but_a_folder_is_listed_once_however_deep(tmp_path):
    save(tmp_path / "real" / "x.png")
    for name, target in (("linked", "real"), ("also", "real"), ("real/back", "../real")):
        (tmp_path / name).symlink_to(target)
    deep = tmp_path / "/".join("z" * 150)
    deep.mkdir(parents=True)
    (deep / "y.png").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 60)
    try:
        found = list_images(str(tmp_path))
    finally:
        sys.setrecursionlimit(limit)
    assert found == [f"{tmp_path}/also/x.png", str(deep / "y.png")]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("absent", "no such file or folder"),
        ("", "path is empty"),
        ("a\0b", "null"),
        (".", "no pic"),
    ],
)
def test_nothing_to_list_is_told_in_one_line(tmp_path, monkeypatch, path, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=problem) as caught:
        list_images(path, key="gt_path")
    assert "gt_path" in str(caught.value)
    assert "\n" not in str(caught.value)


HIDDEN = [
    "._a.png", ".hidden.jpg", ".ipynb_checkpoints/a-checkpoint.png", "x/.cache/b.png",
    "__MACOSX/a.png", "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/c.png", "Thumbs.db",
]  # fmt: skip


def test_what_systems_and_programs_put_there_is_passed_over(tmp_path, monkeypatch):
    path = folder_of(tmp_path / ".home" / "p", ["a.png", "x/b.png"])
    for name in HIDDEN:
        (tmp_path / ".home" / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".home" / "p" / name).write_bytes(b"no picture")
    assert list_images(path) == [f"{path}/a.png", f"{path}/x/b.png"]
    blobs = FakeBlobs({f"gs://b/{name}": path for name in [*HIDDEN, "a.png", "x/b.png"]})
    monkeypatch.setitem(sys.modules, "blobfile", blobs)
    assert list_images("gs://b/") == ["gs://b/a.png", "gs://b/x/b.png"]


def test_other_formats_in_a_folder_are_told_and_taken_by_a_key(tmp_path):
    names = ["a.jpg", "b.webp", "c.png", "d.TIF", "e.bmp", "f.jfif", "c.dng", "notes.txt"]
    for name in names:
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="left out") as caught:
        found = list_images(str(tmp_path))
    # What the published program pairs stays as it is.
    assert [Path(path).name for path in found] == ["a.jpg", "c.png"]
    [told] = [str(one.message) for one in caught]
    assert "4 of 6 pictures are left out (.bmp .jfif .tif .webp)" in told
    assert "all_formats: true" in told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list_images(str(tmp_path), all_formats=True)
    assert [Path(path).name for path in found] == names[:6]


def test_a_folder_of_other_formats_alone_needs_no_key(tmp_path):
    for name in ("a.webp", "b.AVIF"):
        (tmp_path / name).touch()
    assert len(list_images(str(tmp_path))) == 2
    (tmp_path / "c.heic").touch()
    with pytest.warns(UserWarning, match=r"1 of 3 .*\(\.heic\); convert \.heic to JPEG or PNG"):
        assert len(list_images(str(tmp_path))) == 2
    for name in ("a.webp", "b.AVIF"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"no pictures.*convert \.heic to JPEG or PNG"):
        list_images(str(tmp_path))


class FakeBlobs(types.ModuleType):
    """A storage service with one folder, in the shape of blobfile's functions."""

    def __init__(self, files):
        super().__init__("blobfile")
        self.files = files

    def configure(self, retry_limit, log_callback):
        assert retry_limit < 10  # or a store out of reach is waited for without end

    def isdir(self, path):
        return any(name.startswith(path.rstrip("/") + "/") for name in self.files)

    def exists(self, path):
        return path in self.files

    def walk(self, top):
        top = top.rstrip("/") + "/"
        yield top, [], [name[len(top) :] for name in self.files if name.startswith(top)]

    def BlobFile(self, path, mode):
        assert mode == "rb"
        return open(self.files[path], mode)  # noqa: PTH123


def test_remote_paths_go_through_blobfile(tmp_path, monkeypatch):
    one = save(tmp_path / "one.png")
    blobs = FakeBlobs({"gs://b/p/2.png": one, "gs://b/p/1.JPG": one, "gs://b/p/x.txt": one})
    monkeypatch.setitem(sys.modules, "blobfile", blobs)
    assert list_images("gs://b/p/") == ["gs://b/p/1.JPG", "gs://b/p/2.png"]
    with pytest.warns(UserWarning, match="gs://b/p/2.png: this mask is also one of the pictures"):
        pairs = pair_images("gs://b/p", "gs://b/p/2.png")
    assert [(pair.name, pair.mask_path) for pair in pairs] == [
        ("1.png", "gs://b/p/2.png"),
        ("2.png", "gs://b/p/2.png"),
    ]
    assert np.array_equal(np.asarray(read_rgb("gs://b/p/2.png")), picture())
    with pytest.raises(UserError, match="no such file"):
        list_images("gs://b/other")
    monkeypatch.setitem(sys.modules, "blobfile", None)
    with pytest.raises(UserError, match="blobfile"):
        list_images("gs://b/p")


def test_a_result_has_its_inputs_name():
    for path, name in (
        ("d/two.dots.name.png", "two.dots.name.png"),
        ("d/a.JPG", "a.png"),
        ("gs://b/c.d/e.gif", "e.png"),
        ("d/.png", ".png"),
        ("d.x/plain", "plain.png"),
    ):
        assert output_name(path) == name
