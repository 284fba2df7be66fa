"""A library is built once a machine, and one that others could have changed is not loaded."""

import ctypes
import functools
import os
from pathlib import Path

import pytest

from guided_diffusion.accel import build as building
from guided_diffusion.accel import cpu_kernels

try:
    COMPILER = building.compilers()[0][0]
except building.KernelError as error:
    pytest.skip(str(error), allow_module_level=True)


load = building.load_library
OTHER_PROCESSOR = "flags : fpu\nmodel name : another\n"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Build a library of one function in an empty folder: the kernels take seconds."""
    (tmp_path / building._SOURCE).write_text('extern "C" int answer() { return 42; }\n')
    (tmp_path / building._HEADER).write_text("")
    monkeypatch.setattr(building, "_FOLDER", tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def works(library):
    return library.answer() == 42


def test_it_is_built_once_whatever_the_umask(folder, monkeypatch):
    before = os.umask(0o002)
    try:
        assert works(load())
    finally:
        os.umask(before)
    (library,) = folder.iterdir()
    monkeypatch.setattr(building, "_build", None)
    assert works(load())
    assert [library] == list(folder.iterdir())


@pytest.mark.parametrize("what", ["source", "compiler", "processor", "flags"])
def test_what_it_depends_on_changes_its_name(folder, monkeypatch, what):
    load()
    run, read = building._run, Path.read_text
    if what == "source":
        (building._FOLDER / building._HEADER).write_text("// another\n")
    elif what == "compiler":
        monkeypatch.setattr(building, "_run", lambda c: run(c) + "2" * (c[-1] == "--version"))
    elif what == "processor":
        monkeypatch.setattr(
            Path,
            "read_text",
            lambda p, **o: OTHER_PROCESSOR if str(p) == "/proc/cpuinfo" else read(p, **o),
        )
    else:
        monkeypatch.setattr(building, "_FLAGS", [*building._FLAGS, "-g"])
    load()
    assert len(list(folder.iterdir())) == 2


def compiler_script(path, text):
    path.write_text(text)
    path.chmod(0o700)
    return str(path)


def test_without_a_compiler(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(building.KernelError, match="no C\\+\\+ compiler found"):
        load()


@pytest.mark.parametrize(
    ("cxx", "message"),
    [
        ("#!/bin/sh\necho no such option >&2; exit 1", "fails: no such option"),
        ("#!/bin/sh\nexit 3", "fails: no message"),
        ("#!/bin/sh\nprintf 'error: \\377\\376' >&2; exit 1", "fails: error"),  # is not UTF-8
        ('#!/bin/sh\nfor l; do :; done; [ "$l" = --version ] || echo rubbish > "$l"', "kernels.so"),
        ("#!/nowhere/sh", "cannot be run"),
        ("g++ 'open", "CXX=.*: No closing quotation"),
        ("absent", "no C.* found .absent"),
    ],
)
def test_a_cxx_that_fails(folder, monkeypatch, tmp_path, cxx, message):
    if cxx.startswith("#!"):
        cxx = compiler_script(tmp_path / "cxx", cxx)
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(building.KernelError, match=message):
        load()
    assert list(folder.glob("*")) == []


@pytest.mark.parametrize("cxx", [f"{COMPILER} -O1", " "])
def test_a_cxx_with_options_or_empty(folder, monkeypatch, cxx):
    monkeypatch.setenv("CXX", cxx)
    assert works(load())


def test_a_second_compiler_serves_where_the_first_fails(folder, monkeypatch, tmp_path):
    bad = compiler_script(tmp_path / "bad", "#!/bin/sh\nexit 1")
    monkeypatch.setattr(building, "_COMPILERS", (bad, COMPILER))
    monkeypatch.delenv("CXX", raising=False)
    assert works(load())


def test_a_failure_is_not_remembered(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "load", functools.cache(cpu_kernels.load.__wrapped__))
    monkeypatch.setenv("CXX", "absent")
    with pytest.raises(building.KernelError, match="absent"):
        cpu_kernels.load()
    monkeypatch.delenv("CXX")
    cpu_kernels.load()


@pytest.mark.parametrize("share", [0, 0.98])
def test_a_truncated_library_is_built_anew(folder, share):
    """Loading it would crash the process, or worse, would not."""
    load()
    (library,) = folder.iterdir()
    whole = library.read_bytes()
    library.unlink()  # this process has the file mapped
    library.write_bytes(whole[: int(share * len(whole))])
    assert works(load())
    # Built again under the name of its content, so that the next start finds it.
    assert any(building._is_intact(path) for path in folder.iterdir())


def test_a_folder_that_cannot_serve_is_left_alone(folder, monkeypatch):
    folder.mkdir()
    open_library = ctypes.CDLL

    def refuse(path):
        if str(folder) in path:
            raise OSError("failed to map segment from shared object")
        return open_library(path)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert works(load())
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["open to a group", "a link", "somebody else's"])
def test_a_library_that_others_may_change_is_not_loaded(folder, monkeypatch, tmp_path, kind):
    load()
    (library,) = folder.iterdir()
    if kind == "open to a group":
        library.chmod(0o770)
    elif kind == "a link":
        library.rename(tmp_path / library.name)
        library.symlink_to(tmp_path / library.name)
    elif os.geteuid() != 0:
        pytest.skip("needs root, to give a file away")
    else:
        os.chown(library, 12345, 12345)
    assert not building._is_intact(library)
    assert works(load())
    assert building._is_intact(library)  # built anew in its place


def test_no_folder_at_all(folder, monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/nowhere")
    monkeypatch.setattr(building.tempfile, "TemporaryDirectory", fail)
    with pytest.raises(building.KernelError, match="No usable temporary"):
        load()
