import builtins
import dataclasses
import os
import struct
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from guided_diffusion import image_datasets, masks
from guided_diffusion.errors import UserError
from guided_diffusion.io import images as pictures
from guided_diffusion.run import picture_checks

GOLDEN = Path(__file__).parent / "golden"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def picture(width=40, height=30, seed=0):
    """A smooth coloured picture whose four corners differ, so that turning it shows."""
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(seed)
    planes = [255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)]
    return np.stack(planes, -1).astype(np.uint8) ^ rng.integers(0, 4, 3, dtype=np.uint8)


def save(path, array=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = (
        array
        if isinstance(array, Image.Image)
        else Image.fromarray(picture() if array is None else array)
    )
    image.save(path, **options)
    return str(path)


def pixels(path):
    return np.asarray(pictures.read_rgb(str(path)))


def folder_of(path, names):
    for name in names:
        save(path / name)
    return str(path)


def reads(monkeypatch):
    """Count what is read from disk from here on."""
    paths, real = [], pictures.read_upright

    def read(path, **options):
        paths.append(path)
        return real(path, **options)

    for module in (pictures, image_datasets):
        monkeypatch.setattr(module, "read_upright", read)
    return paths


# ---- golden ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(6))
def test_crops_equal_the_published_programs(number):
    expected = np.load(GOLDEN / "crop" / "expect.npz")[str(number)]
    crop = pictures.center_crop(pictures.read_rgb(str(GOLDEN / "crop" / f"{number}.png")), 64)
    assert crop.dtype == np.uint8
    assert np.array_equal(crop, expected)


@pytest.mark.parametrize("run", ["plain", "guided"])
def test_pairs_equal_the_published_programs(run):
    expected = np.load(GOLDEN / run / "expect.npz")
    pairs = image_datasets.pair_images(str(GOLDEN / run / "gt"), str(GOLDEN / run / "mask"))
    assert len(pairs) == len(expected["gt_u8"])
    for pair, gt_u8, mask_u8 in zip(pairs, expected["gt_u8"], expected["mask_u8"], strict=True):
        gt, mask = image_datasets.load_pair(pair, gt_u8.shape[0])
        assert np.array_equal(gt, gt_u8)
        assert np.array_equal(mask, mask_u8)


# ---- listing -----------------------------------------------------------------------------------


def test_lists_recursively_any_case_sorted_by_the_whole_path(tmp_path):
    names = ["b/x.PNG", "b-1.jpeg", "a.JPG", "b/c/d.gif", "名 前.png", "b.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "png").touch()
    expected = sorted(f"{tmp_path}/{name}" for name in names)
    assert expected[1] == f"{tmp_path}/b-1.jpeg"  # "-" < "." < "/": not folder by folder
    assert image_datasets.list_images(str(tmp_path)) == expected


def test_one_file_is_listed_whatever_its_suffix(tmp_path):
    path = save(tmp_path / "photo.webp", format="PNG")
    assert image_datasets.list_images(path) == [path]


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "real" / "x.png")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path)
    found = [os.path.relpath(path, tmp_path) for path in image_datasets.list_images(str(tmp_path))]
    assert found == ["linked/x.png", "real/x.png"]


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
        image_datasets.list_images(path, key="gt_path")
    assert "gt_path" in str(caught.value)
    assert "\n" not in str(caught.value)


HIDDEN = [
    "._a.png", ".hidden.jpg", ".ipynb_checkpoints/a-checkpoint.png", "x/.cache/b.png",
    "__MACOSX/a.png", "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/c.png", "Thumbs.db",
]  # fmt: skip


def test_what_systems_and_programs_put_there_is_passed_over(tmp_path, monkeypatch):
    path = folder_of(tmp_path / ".home" / "p", ["a.png", "x/b.png"])
    (tmp_path / ".home" / "p" / ".png").touch()
    for name in HIDDEN:
        (tmp_path / ".home" / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".home" / "p" / name).write_bytes(b"no picture")
    expected = [f"{path}/.png", f"{path}/a.png", f"{path}/x/b.png"]
    assert image_datasets.list_images(path) == expected
    blobs = FakeBlobs({f"gs://b/{name}": path for name in [*HIDDEN, "a.png", "x/b.png"]})
    monkeypatch.setitem(sys.modules, "blobfile", blobs)
    assert image_datasets.list_images("gs://b/") == ["gs://b/a.png", "gs://b/x/b.png"]


def test_other_formats_in_a_folder_are_told_and_taken_by_a_key(tmp_path):
    names = ["a.jpg", "b.webp", "c.png", "d.TIF", "e.bmp", "f.jfif", "c.dng", "notes.txt"]
    for name in names:
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="left out") as caught:
        found = image_datasets.list_images(str(tmp_path))
    # What the published program pairs stays as it is.
    assert [Path(path).name for path in found] == ["a.jpg", "c.png"]
    [told] = [str(one.message) for one in caught]
    assert "4 of 6 pictures are left out (.bmp .jfif .tif .webp)" in told
    assert "all_formats: true" in told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = image_datasets.list_images(str(tmp_path), all_formats=True)
    assert [Path(path).name for path in found] == names[:6]


def test_a_folder_of_other_formats_alone_needs_no_key(tmp_path):
    for name in ("a.webp", "b.AVIF"):
        (tmp_path / name).touch()
    assert len(image_datasets.list_images(str(tmp_path))) == 2
    (tmp_path / "c.heic").touch()
    with pytest.warns(UserWarning, match=r"1 of 3 .*\(\.heic\); convert \.heic to JPEG or PNG"):
        assert len(image_datasets.list_images(str(tmp_path))) == 2
    for name in ("a.webp", "b.AVIF"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"no pictures.*convert \.heic to JPEG or PNG"):
        image_datasets.list_images(str(tmp_path))


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
    assert image_datasets.list_images("gs://b/p/") == ["gs://b/p/1.JPG", "gs://b/p/2.png"]
    with pytest.warns(UserWarning, match="gs://b/p/2.png: this mask is also one of the pictures"):
        pairs = image_datasets.pair_images("gs://b/p", "gs://b/p/2.png")
    assert [(pair.name, pair.mask_path) for pair in pairs] == [
        ("1.png", "gs://b/p/2.png"),
        ("2.png", "gs://b/p/2.png"),
    ]
    assert np.array_equal(pixels("gs://b/p/2.png"), picture())
    with pytest.raises(UserError, match="no such file"):
        image_datasets.list_images("gs://b/other")


def test_without_blobfile_remote_paths_say_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *rest):
        if name == "blobfile":
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.delitem(sys.modules, "blobfile", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="pip install blobfile"):
        image_datasets.list_images("gs://b/p")


# ---- pairing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("d/two.dots.name.png", "two.dots.name.png"),
        ("d/a.JPG", "a.png"),
        ("gs://b/c.d/e.gif", "e.png"),
        ("d/.png", ".png"),
        ("d.x/plain", "plain.png"),
    ],
)
def test_a_result_has_its_inputs_name(path, name):
    assert image_datasets.output_name(path) == name


def test_pairs_by_position_with_offset_and_length(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png", "c.png", "d.png"])
    mask = folder_of(tmp_path / "mask", ["1.png", "2.png", "3.png", "4.png"])
    pairs = image_datasets.pair_images(gt, mask, offset=1, max_len=2)
    assert [(pair.index, pair.name, Path(pair.mask_path).name) for pair in pairs] == [
        (1, "b.png", "2.png"),
        (2, "c.png", "3.png"),
    ]
    assert len(image_datasets.pair_images(gt, mask, max_len=100)) == 4  # at most


def test_one_mask_file_serves_all(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png"])
    mask = save(tmp_path / "m.png")
    assert [pair.mask_path for pair in image_datasets.pair_images(gt, mask)] == [mask, mask]
    assert len(image_datasets.pair_images(f"{gt}/a.png", mask)) == 1
    with pytest.warns(UserWarning, match=r"gt/b.png: this mask is also one of the pictures"):
        image_datasets.pair_images(gt, f"{gt}/../gt/b.png")


@pytest.mark.parametrize(
    ("options", "key"),
    [({"offset": 2}, "offset"), ({"offset": -1}, "offset"), ({"max_len": 0}, "max_len")],
)
def test_nothing_left_names_the_key(tmp_path, options, key):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png"])
    with pytest.raises(UserError) as caught:
        image_datasets.pair_images(gt, "thin", **options)
    assert caught.value.key == key


def test_different_numbers_are_both_told(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png", "c.png"])
    mask = folder_of(tmp_path / "mask", ["a.png", "b.png"])
    with pytest.raises(UserError, match=r"expected 3 masks.*found 2") as caught:
        image_datasets.pair_images(gt, mask)
    assert caught.value.key == "mask_path"
    # A folder with a single mask is not taken for a mask of all: that would hide a lost file.
    one = folder_of(tmp_path / "one", ["a.png"])
    with pytest.raises(UserError, match="found 1"):
        image_datasets.pair_images(gt, one)


def test_missing_mask_path_tells_the_families(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png"])
    with pytest.raises(UserError, match=r"thikc.*mask_path.*thick") as caught:
        image_datasets.pair_images(gt, "thikc")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "samples", "clash"),
    [
        (["a.jpg", "a.png"], 1, "a.png"),
        (["one/a.png", "two/a.png"], 1, "a.png"),
        (["a.png", "a_1.png"], 2, "a_1.png"),
    ],
)
def test_colliding_results_name_both_inputs(tmp_path, names, samples, clash):
    gt = folder_of(tmp_path / "gt", names)
    mask = save(tmp_path / "m.png")
    with pytest.raises(UserError) as caught:
        image_datasets.pair_images(gt, mask, samples_per_image=samples)
    for part in (*names, clash):
        assert part in str(caught.value)


def test_names_that_only_look_alike_do_not_collide(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png", "a_1.png", "a.b.png"])
    assert len(image_datasets.pair_images(gt, save(tmp_path / "m.png"))) == 3


def test_too_long_a_sample_name_is_found_before_the_run(tmp_path):
    gt = folder_of(tmp_path / "gt", ["x" * 251 + ".png"])
    mask = save(tmp_path / "m.png")
    assert len(image_datasets.pair_images(gt, mask)) == 1
    with pytest.raises(UserError, match="too long"):
        image_datasets.pair_images(gt, mask, samples_per_image=2)


def test_sample_names():
    assert image_datasets.sample_names("a.b.png", 1) == ["a.b.png"]
    assert image_datasets.sample_names("a.b.png", 3) == ["a.b_1.png", "a.b_2.png", "a.b_3.png"]


def test_shifted_names_warn_once(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png", "c.png"])
    mask = folder_of(tmp_path / "mask", ["b.png", "c.png", "d.png"])
    with pytest.warns(UserWarning, match="by sorted position") as caught:
        image_datasets.pair_images(gt, mask)
    assert len(caught) == 1
    other = folder_of(tmp_path / "other", ["1.png", "2.png", "3.png"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_datasets.pair_images(gt, other)
        image_datasets.pair_images(gt, folder_of(tmp_path / "same", ["a.png", "b.png", "c.png"]))


NAMES = ["photo1", "photo10", "photo11", "photo2"]
BY_NAME = {
    "affix behind": (NAMES, "{}_mask"),
    "hyphen": (NAMES, "{}-mask"),
    "numbered": (NAMES, "{}_mask001"),
    "affix before": (["2", "10", "1a", "1"], "mask_{}_"),
    "affix on pictures": ([f"{name}_img" for name in NAMES], None),
    "suffix kept": (["a", "a.b", "a-1"], "{}.jpg"),
    "part of each other": (["IMG_1", "IMG_1_2", "IMG_1_2_3"], "{}-mask"),
}


@pytest.mark.parametrize("case", BY_NAME)
def test_names_that_leave_no_doubt_pair_whatever_their_order(tmp_path, case):
    names, form = BY_NAME[case]
    rename = form.format if form else lambda name: name.removesuffix("_img")
    gt = folder_of(tmp_path / "gt", [f"{name}.png" for name in names])
    mask = folder_of(tmp_path / "mask", [f"{rename(name)}.png" for name in names])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pairs = image_datasets.pair_images(gt, mask)
    for pair in pairs:
        assert Path(pair.mask_path).name == f"{rename(Path(pair.gt_path).stem)}.png"
    by_position = sorted(path.name for path in Path(mask).iterdir()) == [
        Path(pair.mask_path).name for pair in pairs
    ]
    told = [str(one.message) for one in caught]
    assert len(told) == (0 if by_position else 1)
    assert all("paired by name" in text and "\n" not in text for text in told)
    assert [pair.index for pair in pairs] == list(range(len(names)))


def test_an_accent_is_one_however_a_system_writes_it(tmp_path):
    gt = folder_of(tmp_path / "gt", ["e\u0301te.png", "fan.png"])
    mask = folder_of(tmp_path / "mask", ["\u00e9te_mask.png", "fan_mask.png"])
    with pytest.warns(UserWarning, match="paired by name"):
        pairs = image_datasets.pair_images(gt, mask)
    assert [Path(pair.mask_path).name for pair in pairs] == ["\u00e9te_mask.png", "fan_mask.png"]


@pytest.mark.parametrize(
    ("names", "mask_names"),
    [
        (["a", "b", "c"], ["b_mask", "c_mask", "d_mask"]),
        (["img_1", "img_10", "img_2"], ["mask_01", "mask_02", "mask_10"]),
        (["0", "1", "10", "2"], ["000000", "000001", "000002", "000010"]),
        (["a_image", "b_image"], ["b_mask", "c_mask"]),
    ],
)
def test_names_that_contradict_positions_warn_with_an_example(tmp_path, names, mask_names):
    gt = folder_of(tmp_path / "gt", [f"{name}.png" for name in names])
    mask = folder_of(tmp_path / "mask", [f"{name}.png" for name in mask_names])
    with pytest.warns(UserWarning, match="by sorted position, although") as caught:
        pairs = image_datasets.pair_images(gt, mask)
    assert len(caught) == 1
    assert [Path(pair.mask_path).stem for pair in pairs] == mask_names


@pytest.mark.parametrize(
    ("names", "mask_names"),
    [
        (["0", "1", "2"], ["000000", "000001", "000002"]),
        (["cat", "dog", "owl"], ["000000", "000001", "000002"]),
        (["img_1", "img_10", "img_2"], ["mask_1", "mask_10", "mask_2"]),
        (["00012", "00345"], ["000000", "000001"]),
    ],
)
def test_names_without_relation_or_in_order_pair_silently(tmp_path, names, mask_names):
    gt = folder_of(tmp_path / "gt", [f"{name}.png" for name in names])
    mask = folder_of(tmp_path / "mask", [f"{name}.png" for name in mask_names])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = image_datasets.pair_images(gt, mask)
    assert [Path(pair.mask_path).name for pair in pairs] == [f"{m}.png" for m in mask_names]


# ---- drawn masks -------------------------------------------------------------------------------


def test_a_family_draws_masks_from_seed_and_index_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png", "c.png"])
    pairs = image_datasets.pair_images(gt, "thin")
    later = image_datasets.pair_images(gt, "thin", offset=1)
    state = torch.get_rng_state()
    drawn = [
        image_datasets.load_mask(pair, 32, image_datasets.ReadOptions(seed=3)) for pair in pairs
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert drawn[0].shape == (32, 32, 3)
    assert set(np.unique(drawn[0])) == {0, 255}
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(
        drawn[0], image_datasets.load_mask(pairs[0], 32, image_datasets.ReadOptions(seed=4))
    )
    assert np.array_equal(
        drawn[1], image_datasets.load_mask(later[0], 32, image_datasets.ReadOptions(seed=3))
    )
    expected = masks.make_mask("thin", 32, np.random.default_rng([3, 1]))
    assert np.array_equal(drawn[1][:, :, 2], expected)


def test_a_folder_called_like_a_family_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gt = folder_of(tmp_path / "gt", ["a.png"])
    folder_of(tmp_path / "thick", ["m.png"])
    assert image_datasets.pair_images(gt, "thick")[0].mask_path == "thick/m.png"


# ---- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # What each value says about the stored picture, by EXIF 2.3: where row 0 and column 0 lie.
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo(picture()))
    assert np.array_equal(pixels(save(tmp_path / "p.png", stored, exif=exif)), picture())
    jpeg = pixels(save(tmp_path / "p.jpg", stored, exif=exif, quality=98)).astype(int)
    assert np.abs(jpeg - picture()).mean() < 3


def test_damaged_exif_does_not_spoil_a_picture(tmp_path, monkeypatch):
    def fail(image):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    assert np.array_equal(pixels(save(tmp_path / "p.png")), picture())


def test_cmyk_is_not_inverted(tmp_path):
    image = Image.fromarray(picture()).convert("CMYK")
    path = save(tmp_path / "p.jpg", image, quality=98)
    assert b"Adobe" in Path(path).read_bytes()  # stored inverted, as Photoshop does
    assert np.abs(pixels(path).astype(int) - picture()).mean() < 3


def test_transparent_parts_are_black(tmp_path):
    array = np.full((4, 4, 4), 200, np.uint8)
    array[:, :, 3] = [0, 51, 102, 255]
    expected = np.round(array[0, :, 3] / 255 * 200)
    seen = pixels(save(tmp_path / "rgba.png", array))
    assert np.abs(seen[0, :, 0] - expected).max() <= 1
    seen = pixels(save(tmp_path / "la.png", Image.fromarray(array).convert("LA")))
    assert np.abs(seen[0, :, 1] - expected).max() <= 1


@pytest.mark.parametrize("name", ["p.png", "p.gif"])
def test_palette_and_its_transparency(tmp_path, name):
    image = Image.new("P", (3, 2))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2, 2, 1, 0])
    plain = pixels(save(tmp_path / name, image))
    assert plain[0].tolist() == [list(RED), list(GREEN), list(BLUE)]
    assert plain[1].tolist() == [list(BLUE), list(GREEN), list(RED)]
    clear = pixels(save(tmp_path / f"t{name}", image, transparency=1))
    assert clear[0].tolist() == [list(RED), [0, 0, 0], list(BLUE)]


def test_colour_key_and_gray_key_are_transparent(tmp_path):
    array = np.full((2, 2, 3), 90, np.uint8)
    array[0, 0] = RED
    seen = pixels(save(tmp_path / "rgb.png", array, transparency=RED))
    assert seen[0, 0].tolist() == [0, 0, 0]
    assert seen[1, 1].tolist() == [90, 90, 90]
    seen = pixels(save(tmp_path / "l.png", array[:, :, 0], transparency=90))
    assert seen[:, :, 0].tolist() == [[255, 0], [0, 0]]


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (5, 5), colour) for colour in (RED, GREEN)]
    for name in ("p.gif", "p.png"):
        path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        assert pixels(path)[2, 2].tolist() == list(RED)


def test_gray_and_one_bit(tmp_path):
    gray = picture()[:, :, 0]
    seen = pixels(save(tmp_path / "l.png", gray))
    assert np.array_equal(seen, np.repeat(gray[:, :, None], 3, 2))
    bits = Image.fromarray(gray > 99)
    assert np.array_equal(pixels(save(tmp_path / "1.png", bits))[:, :, 0], (gray > 99) * 255)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = np.array([[0, 128, 257, 30000, 65535]], np.uint16)
    expected = [[0, 0, 1, 117, 255]]
    assert pixels(save(tmp_path / "p.png", deep))[:, :, 0].tolist() == expected
    dark = np.array([[0, 128, 200]], np.uint16)  # a dark picture stays dark
    assert pixels(save(tmp_path / "dark.png", dark))[:, :, 2].tolist() == [[0, 0, 1]]
    whole = save(tmp_path / "i.png", Image.fromarray(deep.astype(np.int32)), format="TIFF")
    assert pixels(whole)[:, :, 0].tolist() == expected
    whole = save(tmp_path / "d.png", Image.fromarray(dark.astype(np.int32)), format="TIFF")
    assert pixels(whole)[:, :, 0].tolist() == [[0, 0, 1]]
    wide = Image.fromarray(np.array([[0, 2**30, 2**31 - 1]], np.int32))
    assert pixels(save(tmp_path / "w.png", wide, format="TIFF"))[:, :, 0].tolist() == [
        [0, 128, 255]
    ]


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float_gray_is_scaled(tmp_path, white):
    floats = np.array([[0, 0.5, 1, np.nan]], np.float32) * white
    path = save(tmp_path / "f.png", Image.fromarray(floats), format="TIFF")
    assert pixels(path)[:, :, 0].tolist() == [[0, 128, 255, 0]]


def test_content_counts_not_the_suffix(tmp_path):
    path = save(tmp_path / "really.webp.jpg", format="WEBP", lossless=True)
    assert np.array_equal(pixels(path), picture())


def test_odd_names_are_read(tmp_path):
    for name in ("two.dots.name.png", "名前 with space.PNG", "quote'\"$(x).png", "new\nline.png"):
        assert np.array_equal(pixels(save(tmp_path / name, format="PNG")), picture())


def make_truncated(path, **options):
    save(path, picture(200, 200), **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "make", "problem"),
    [
        ("half.jpg", make_truncated, "truncated"),
        ("half.png", make_truncated, "cannot be read"),
        ("half.gif", make_truncated, "cannot be read"),
        ("empty.png", lambda path: path.touch(), "is empty"),
        ("text.png", lambda path: path.write_text("hello\n"), "not a picture"),
        ("post.png", lambda path: save(path, format="EPS"), "not a picture"),
        ("folder.png", lambda path: path.mkdir(), "is a folder"),
        ("pipe.png", os.mkfifo, "no regular file"),
        ("dangling.png", lambda path: path.symlink_to("nowhere"), "link to a file"),
        ("looped.png", lambda path: path.symlink_to(path.name), "cannot be read"),
        ("absent.png", lambda path: None, "no such file"),
    ],
)
def test_what_is_no_whole_picture_is_refused_by_name(tmp_path, name, make, problem):
    make(tmp_path / name)
    with pytest.raises(UserError, match=problem) as caught:
        pictures.read_rgb(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    if name != "absent.png":
        assert image_datasets.list_images(str(tmp_path)) == [
            str(tmp_path / name)
        ]  # listed, so that it is found


def test_no_permission_is_refused_by_name(tmp_path, monkeypatch):
    path = save(tmp_path / "secret.png")

    def refuse(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"secret\.png: cannot be read: Permission denied"):
        pictures.read_rgb(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_unlistable_folder_is_refused_by_name(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir(mode=0)
    with pytest.raises(UserError, match=r"inner.*Permission denied"):
        image_datasets.list_images(str(tmp_path))
    inner.chmod(0o700)


@pytest.mark.parametrize("factor", [1, 3])
def test_decompression_bombs_are_an_error_not_a_warning(tmp_path, monkeypatch, factor):
    path = save(tmp_path / "bomb.png", Image.new("1", (100, factor * 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # Pillow itself warns at 900, errs at 1800
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=r"bomb\.png.*too many"):
            pictures.read_rgb(path)
    assert Image.MAX_IMAGE_PIXELS == 900


def test_a_narrow_strip_is_refused_before_it_is_enlarged(tmp_path):
    path = save(tmp_path / "strip.png", Image.new("1", (100_000, 1)))
    with pytest.raises(UserError, match=r"strip\.png.*narrow"):
        pictures.load_crop(path, 256)


def test_damaged_bytes_never_escape_as_anything_but_a_user_error(tmp_path):
    rng = np.random.default_rng(0)
    refused = 0
    for name in ("p.png", "p.jpg", "p.gif", "p.webp"):
        whole = bytearray(Path(save(tmp_path / name)).read_bytes())
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(damaged), 4):
                damaged[place] = rng.integers(256)
            (tmp_path / "damaged.png").write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert pictures.load_crop(str(tmp_path / "damaged.png"), 16).shape == (
                        16,
                        16,
                        3,
                    )
                except UserError:
                    refused += 1
    assert refused > 20


# ---- cutting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(7, 5), (64, 64), (65, 64), (500, 70), (31, 999)])
def test_a_crop_has_its_size_and_the_middle(width, height):
    array = np.zeros((height, width, 3), np.uint8)
    array[height // 2 - 1 : height // 2 + 2, width // 2 - 1 : width // 2 + 2] = 255
    crop = pictures.center_crop(Image.fromarray(array), 64)
    assert crop.shape == (64, 64, 3)
    assert crop[29:35, 29:35].max() == crop.max() > 20


def test_sides_are_rounded_not_cut():
    image = Image.fromarray(picture(100, 67))  # 100 * 64 / 67 = 95.5
    expected = np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC))[:, 16:80]
    assert np.array_equal(pictures.center_crop(image, 64), expected)


def test_tensors_are_exact():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    image, mask = pictures.to_model_range(levels), pictures.mask_to_tensor(levels)
    assert image.dtype == mask.dtype == torch.float32
    assert image.shape == mask.shape == (3, 16, 16)
    expected = levels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(mask.permute(1, 2, 0).numpy(), levels.astype(np.float32) / 255)
    assert (mask.max(), image.min(), image.max()) == (1, -1, 1)


def test_flip_mirrors_both_and_inversion_only_the_mask(tmp_path):
    gt = save(tmp_path / "gt.png", picture(20, 20))
    mask = save(tmp_path / "mask.png", picture(20, 20, seed=1))
    (pair,) = image_datasets.pair_images(gt, mask)
    image, keep = image_datasets.load_pair(pair, 20)
    flipped, flipped_keep = image_datasets.load_pair(pair, 20, flip=True)
    assert np.array_equal(flipped, image[:, ::-1])
    assert np.array_equal(flipped_keep, keep[:, ::-1])
    pictures.to_model_range(flipped)  # torch takes no negative strides
    same, inverted = image_datasets.load_pair(
        pair, 20, image_datasets.ReadOptions(invert_mask=True)
    )
    assert np.array_equal(same, image)
    assert np.array_equal(inverted, 255 - keep)


# ---- checking ----------------------------------------------------------------------------------


def test_check_returns_the_share_of_generated_pixels(tmp_path, monkeypatch):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png"])
    for name, known in (("1.png", 8), ("2.png", 24)):
        mask = np.zeros((32, 32, 3), np.uint8)
        mask[:known] = 255
        save(tmp_path / "mask" / name, mask)
    pairs = image_datasets.pair_images(gt, str(tmp_path / "mask"))
    assert picture_checks.check_pairs(pairs, 32) == [0.75, 0.25]
    assert picture_checks.check_pairs(pairs, 32, image_datasets.ReadOptions(invert_mask=True)) == [
        0.25,
        0.75,
    ]
    one = image_datasets.pair_images(gt, str(tmp_path / "mask" / "1.png"))
    paths = reads(monkeypatch)
    assert picture_checks.check_pairs(one, 32) == [0.75, 0.75]
    assert len(paths) == 3  # the mask that serves both is decoded once
    drawn = picture_checks.check_pairs(image_datasets.pair_images(gt, "genhalf"), 32)
    assert drawn == [0.5, 0.5]


@pytest.mark.parametrize("folder", ["gt", "mask"])
def test_check_names_the_first_bad_file(tmp_path, folder):
    names = [f"{number}.png" for number in range(9)]
    gt, mask = folder_of(tmp_path / "gt", names), folder_of(tmp_path / "mask", names)
    for bad in ("3.png", "7.png"):
        (tmp_path / folder / bad).write_text("no")
    with pytest.raises(UserError, match=f"{folder}/3.png"):
        picture_checks.check_pairs(image_datasets.pair_images(gt, mask), 16)


def test_check_names_a_bad_mask_that_serves_all(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png"])
    (tmp_path / "m.png").write_text("no")
    with pytest.raises(UserError, match=r"m\.png"):
        picture_checks.check_pairs(image_datasets.pair_images(gt, str(tmp_path / "m.png")), 16)


@pytest.mark.parametrize(("level", "words"), [(255, "nothing to generate"), (0, "nothing known")])
def test_check_warns_once_of_masks_without_effect(tmp_path, level, words):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png", "c.png"])
    mask = save(tmp_path / "m.png", np.full((9, 9, 3), level, np.uint8))
    with pytest.warns(UserWarning, match=words) as caught:
        picture_checks.check_pairs(image_datasets.pair_images(gt, mask), 16)
    assert len(caught) == 1
    assert "3 of 3" in str(caught[0].message)


def mask_of(width, height, box, white=255, black=0):
    mask = np.full((height, width), white, np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = black
    return mask


def check(gt, mask, size=16, **options):
    """Return the shares of a check, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = image_datasets.ReadOptions(**options)
        shares = picture_checks.check_pairs(image_datasets.pair_images(gt, mask), size, options)
    return shares, [str(one.message) for one in caught]


@pytest.mark.parametrize("case", ["plain", "guided"])
def test_golden_cases_and_the_demo_are_silent(case):
    data = GOLDEN.parent.parent / "data" / "datasets"
    for gt, mask in (
        (GOLDEN / case / "gt", GOLDEN / case / "mask"),
        (data / "gts" / "demo", data / "gt_keep_masks" / "demo"),
    ):
        assert check(str(gt), str(mask), 64)[1] == []


@pytest.mark.parametrize(
    ("photo", "mask", "fits"),
    [
        ((60, 40), (60, 40), True),
        ((400, 300), (133, 100), True),  # sides are whole numbers
        ((60, 40), (40, 60), False),
        ((60, 40), (40, 40), False),
        ((40, 40), (60, 40), False),
        ((60, 40), (16, 16), True),  # the network's square, as the published program is fed
        ((60, 40), (64, 40), False),
    ],
)
def test_a_mask_has_its_pictures_shape(tmp_path, photo, mask, fits):
    gt = save(tmp_path / "p.png", picture(*photo))
    box = (4, 4, mask[0] - 4, mask[1] - 4)
    path = save(tmp_path / "m.png", mask_of(*mask, box))
    if fits:
        assert check(gt, path)[1] == []
        return
    with pytest.raises(UserError) as caught:
        check(gt, path)
    for part in ("p.png", "m.png", "{} x {}".format(*photo), "{} x {}".format(*mask)):
        assert part in str(caught.value)
    assert "EXIF" not in str(caught.value)
    even = save(tmp_path / "even.png", mask_of(*mask, (0, 0, 0, 0)))  # which has no shape
    assert "nothing to generate" in check(gt, even)[1][0]


def test_a_mask_of_the_stored_pixels_names_the_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    gt = save(tmp_path / "p.jpg", picture(48, 32), exif=exif)
    mask = save(tmp_path / "m.png", mask_of(48, 32, (4, 4, 20, 20)))
    with pytest.raises(UserError, match=r"stored 48 x 32 .*EXIF orientation 6.*32 x 48") as caught:
        check(gt, mask)
    assert "\n" not in str(caught.value)
    upright = save(tmp_path / "u.png", mask_of(32, 48, (4, 4, 24, 24)))
    assert check(gt, upright)[1] == []


def test_one_mask_for_all_has_to_fit_each(tmp_path):
    save(tmp_path / "gt" / "a.png", picture(60, 40))
    save(tmp_path / "gt" / "b.png", picture(40, 60))
    mask = save(tmp_path / "m.png", mask_of(60, 40, (4, 4, 20, 20)))
    with pytest.raises(UserError, match=r"b\.png"):
        check(str(tmp_path / "gt"), mask)


def test_thin_holes_and_soft_rims_are_told_and_mended(tmp_path):
    gt = save(tmp_path / "p.png", picture(160, 160))
    thin = save(tmp_path / "thin.png", mask_of(160, 160, (20, 80, 140, 83)))
    shares, told = check(gt, thin)
    assert len(told) == 1
    assert "thin.png: its hole is thinner than a pixel at 16 x 16" in told[0]
    assert "mask_hard: true" in told[0]
    assert "mask_grow: N" in told[0]
    hard, told = check(gt, thin, mask_hard=True)
    assert told == []
    assert hard[0] > 2 * shares[0]
    small = save(tmp_path / "small.png", mask_of(160, 160, (73, 73, 127, 127)))
    assert "half-known at 16 x 16" in check(gt, small)[1][0]
    gray = save(tmp_path / "gray.png", mask_of(160, 160, (40, 40, 120, 120), black=90))
    assert "its hole is gray" in check(gt, gray)[1][0]
    assert check(gt, gray, mask_hard=True)[1] == []
    large = save(tmp_path / "large.png", mask_of(160, 160, (23, 23, 147, 147)))
    assert check(gt, large, 40)[1] == []


def test_hard_masks_are_hole_wherever_the_hole_reaches(tmp_path):
    gt = save(tmp_path / "p.png", picture(160, 160))
    mask = save(tmp_path / "m.png", mask_of(160, 160, (33, 80, 140, 83)))
    (pair,) = image_datasets.pair_images(gt, mask)
    soft = image_datasets.load_pair(pair, 16)[1]
    options = image_datasets.ReadOptions(mask_hard=True)
    hard = image_datasets.load_pair(pair, 16, options)[1]
    assert np.array_equal(hard, np.where(soft < 255, 0, 255))
    inverted = image_datasets.load_pair(pair, 16, dataclasses.replace(options, invert_mask=True))[1]
    assert (inverted == 0).mean() > 0.95  # the known line touches few pixels alone


@pytest.mark.parametrize("side", [160, 40])
def test_grow_is_in_pixels_of_the_photo(tmp_path, side):
    gt = save(tmp_path / "p.png", picture(160, 160))
    unit = side // 40
    box = (10 * unit, 10 * unit, 20 * unit, 20 * unit)
    mask = save(tmp_path / "m.png", mask_of(side, side, box))
    (pair,) = image_datasets.pair_images(gt, mask)
    options = image_datasets.ReadOptions(mask_grow=16)
    grown = image_datasets.load_pair(pair, 20, options)[1]
    assert (grown[3:12, 5:10] == 0).all()  # 16 pixels of 160 are 2 of 20
    assert (grown[:3] == 255).all()
    assert (grown[:, 12:] == 255).all()
    inverted = image_datasets.load_pair(pair, 20, dataclasses.replace(options, invert_mask=True))[1]
    assert (inverted == 255).sum() == 3
    drawn = image_datasets.pair_images(gt, "genhalf")[0]
    assert (image_datasets.load_mask(drawn, 20) == 255).sum() == 3 * 10 * 20
    more = image_datasets.load_mask(drawn, 20, options, (160, 160))
    assert (more == 255).sum() == 3 * 8 * 20


def test_a_mask_of_the_square_grows_by_as_much(tmp_path):
    gt = save(tmp_path / "p.png", picture(300, 160))
    mask = save(tmp_path / "m.png", mask_of(16, 16, (6, 6, 10, 10)))
    (pair,) = image_datasets.pair_images(gt, mask)
    grown = image_datasets.load_pair(pair, 16, image_datasets.ReadOptions(mask_grow=20))[1]
    assert np.array_equal(grown[:, :, 0] == 0, mask_of(16, 16, (4, 4, 12, 12)) == 0)


def test_without_keys_a_mask_stays_as_it_was(tmp_path):
    gt = save(tmp_path / "p.png", picture(100, 80))
    mask = save(tmp_path / "m.png", picture(100, 80, seed=3))
    (pair,) = image_datasets.pair_images(gt, mask)
    expected = pictures.center_crop(pictures.read_rgb(mask), 32)
    assert np.array_equal(image_datasets.load_pair(pair, 32)[1], expected)


def test_the_pictures_own_transparency_is_the_hole(tmp_path, monkeypatch):
    array = np.dstack([picture(32, 32), mask_of(32, 32, (8, 8, 24, 24))])
    array[8:24, 8:24, :3] = (255, 0, 255)  # what was erased
    gt = save(tmp_path / "gt" / "a.png", array)
    monkeypatch.chdir(tmp_path)
    (pair,) = image_datasets.pair_images("gt", "alpha")
    assert pair.is_alpha
    assert pair.mask_file == "gt/a.png"
    image, mask = image_datasets.load_pair(pair, 32)
    assert np.array_equal(mask[:, :, 0], array[:, :, 3])
    known = mask[:, :, 0] == 255
    assert np.array_equal(image[known], array[:, :, :3][known])
    # Nothing of what was erased, nor black, gets into the rim when the picture is scaled.
    small, mask = image_datasets.load_pair(pair, 12)
    plain = pictures.center_crop(Image.fromarray(picture(32, 32)), 12).astype(int)
    rim = mask[:, :, 0] > 60
    assert np.abs(small.astype(int) - plain)[rim].max() < 4
    assert check("gt", "alpha", 32) == ([0.25], [])
    assert 0.54 < check("gt", "alpha", 32, mask_grow=4)[0][0] <= 24 * 24 / 32**2
    save(tmp_path / "gt" / "b.jpg")
    with pytest.raises(UserError, match=r"gt/b\.jpg.*no transparency"):
        check("gt", "alpha")
    (tmp_path / "alpha").mkdir()
    save(tmp_path / "alpha" / "m.png")
    assert not image_datasets.pair_images(gt, "alpha")[0].is_alpha


def test_odd_masks_are_told_once_a_kind(tmp_path):
    gt = folder_of(tmp_path / "gt", ["a.png", "b.png", "c.png"])
    for name, white in (("a", 1), ("b", 2), ("c", 255)):
        save(tmp_path / "mask" / f"{name}.png", mask_of(40, 30, (4, 4, 30, 20), white))
    _, told = check(gt, str(tmp_path / "mask"), 30)
    assert len(told) == 1
    assert "mask/a.png: has no level above 1 of 255" in told[0]
    assert "mask_hole: zero" in told[0]
    assert "and 1 more like it" in told[0]
    shares, told = check(gt, str(tmp_path / "mask"), 30, mask_hole="zero")
    assert told == []
    assert len(set(shares)) == 1


def test_dark_deep_pictures_are_told_and_scaled_by_a_key(tmp_path):
    x = np.mgrid[0:40, 0:40][1]
    deep = (x * 100).astype(np.uint16)
    gt = save(tmp_path / "gt" / "a.png", deep)
    save(tmp_path / "gt" / "b.png", deep // 2)
    _, told = check(str(tmp_path / "gt"), "genhalf")
    assert len(told) == 1
    assert "gt/a.png: uses 3900 of 65535" in told[0]
    assert "depth_max: 4095" in told[0]
    assert check(gt, "genhalf", depth=(0.0, 4095.0))[1] == []
    bright = save(tmp_path / "bright.png", deep * 16)
    assert check(bright, "genhalf")[1] == []
    negative = save(tmp_path / "n.tif", (x / 20.0 - 1).astype(np.float32))
    [told] = check(negative, "genhalf")[1]
    assert "values of -1 to 0.95" in told
    assert "depth_min" in told
