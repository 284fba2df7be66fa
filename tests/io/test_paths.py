"""Where results may go."""

import pytest

from guided_diffusion.errors import UserError
from guided_diffusion.io import files, paths


@pytest.mark.parametrize("folder", ["gs://bucket/x", "http://host/x", "s3:/x", "file:///tmp/x"])
def test_remote_address_is_refused(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    for use in (paths.check_folder, files.locked, files.atomic_path):
        with pytest.raises(UserError, match="folders of this machine only"), use(folder):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["C:/results", "C:\\results", "x/a:b", "12:30/x"])
def test_names_with_a_colon_are_no_address(folder):
    paths.refuse_remote(folder)


def test_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    assert paths.check_folder(tmp_path / "new/out") == tmp_path
    with pytest.raises(UserError, match=r"file: .*not a folder"):
        paths.check_folder(tmp_path / "file/a")
    with pytest.raises(UserError, match="name is too long"):
        paths.check_folder(tmp_path / ("x" * 256))


def test_results_inside_inputs_are_refused_through_links(tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (tmp_path / "link").symlink_to(inputs)
    for folder in (inputs, inputs / "new", tmp_path / "link" / "new"):
        with pytest.raises(UserError, match=r"mask_path: results would go into .*inputs"):
            paths.refuse_inside(folder, inputs, key="mask_path")
    paths.refuse_inside(tmp_path / "inputs2", inputs, key="mask_path")


def test_overwriting_an_input_is_refused_under_any_name(tmp_path):
    photo = tmp_path / "photo.png"
    photo.touch()
    (tmp_path / "link.png").symlink_to(photo)
    (tmp_path / "other.png").hardlink_to(photo)
    for name in ("photo.png", "link.png", "other.png"):
        with pytest.raises(UserError, match="would overwrite the input"):
            paths.refuse_overwriting([tmp_path / name], [photo])
    paths.refuse_overwriting([tmp_path / "new.png"], [photo, "hf://a/b"])
