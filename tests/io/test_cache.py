"""The cache folder is used only where no other user can write."""

import os

import pytest

from guided_diffusion.io.paths import cache_folder


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "parent" / "cache"))
    return tmp_path / "parent" / "cache"


def test_it_is_made_for_its_user_alone(folder):
    before = os.umask(0)
    try:
        assert cache_folder() == folder
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "kind", ["open to all", "open to a group", "open above", "another user's", "relative", "a file"]
)
def test_it_is_not_used(folder, monkeypatch, kind):
    folder.parent.mkdir()
    if kind == "a file":
        folder.write_text("")
        folder.chmod(0o600)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "below"))
    else:
        folder.mkdir(mode=0o700)
    if kind.startswith("open"):
        changed = folder.parent if kind == "open above" else folder
        changed.chmod(0o777 if kind == "open to all" else 0o770)
    elif kind == "another user's":
        if os.geteuid() != 0:
            pytest.skip("needs root, to give a folder away")
        os.chown(folder, 12345, 12345)
    elif kind == "relative":
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "cache")
        monkeypatch.chdir(folder.parent)
    assert cache_folder() is None


def test_a_sticky_folder_above_is_safe(folder):
    """As /tmp: others may write there, and not replace what is another's."""
    folder.parent.mkdir()
    folder.parent.chmod(0o1777)
    assert cache_folder() == folder
