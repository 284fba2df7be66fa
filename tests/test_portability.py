"""The programs run where calls of POSIX do not exist, as on Windows."""

import ast
import subprocess
import sys

import pytest
import yaml
from run_cases import ENVIRONMENT, ROOT, write_run
from train_cases import tiny_tree

from guided_diffusion import cli
from guided_diffusion.accel import build

PROGRAMS = [*ROOT.glob("*.py"), *(ROOT / "guided_diffusion").rglob("*.py")]
POSIX_MODULES = {"fcntl", "grp", "posix", "pwd", "pty", "resource", "select", "termios", "tty"}
ABSENT = {
    "os": "chown fork geteuid getgid getloadavg getpgid getuid killpg mkfifo nice register_at_fork "
    "sched_getaffinity setsid sysconf uname",
    "signal": "SIGALRM SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGUSR2 alarm pause pthread_kill sigwait",
}
# Deletes what Windows does not have, makes signal 0 what it is there, and runs a program.
WITHOUT = f"""
import os, runpy, signal, sys
import torch  # the libraries have their own ways
for module, names in {ABSENT!r}.items():
    for name in names.split():
        if hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)
os.kill = None
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without(program, *options, cwd):
    command = [sys.executable, "-c", WITHOUT, str(ROOT / program), *map(str, options)]
    environment = {**ENVIRONMENT, "LOGNAME": "me"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_inpainting_needs_no_call_of_posix(tmp_path):
    options = write_run(tmp_path, 2)
    done = run_without("test.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "log/run/inpainted").glob("*.png"))) == 2


def test_training_needs_no_call_of_posix(tmp_path):
    (tmp_path / "train.yml").write_text(yaml.safe_dump(tiny_tree(tmp_path, iterations=2)))
    done = run_without("train.py", "--conf_path", "train.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/test.yml").exists()


def test_no_module_of_posix_is_imported():
    found = []
    for path in PROGRAMS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}: {name}" for name in names if name in POSIX_MODULES]
    assert found == []


def test_second_signal_acts_where_a_process_cannot_signal_itself(monkeypatch):
    monkeypatch.delattr(cli.os, "kill")  # on Windows it ends a process without a word
    monkeypatch.setattr(cli, "_ECHO", -1.0)
    monkeypatch.setattr(cli, "place", lambda: cli.Place(world_size=2))
    with pytest.raises(KeyboardInterrupt), cli.Interrupts() as interrupts:
        cli.signal.raise_signal(cli.signal.SIGINT)
        assert interrupts.has_arrived
        cli.signal.raise_signal(cli.signal.SIGINT)
        pytest.fail("the second signal was only noted")


def test_kernels_are_not_built_on_windows(monkeypatch):
    monkeypatch.setattr(build.sys, "platform", "win32")
    with pytest.raises(build.KernelError, match="Windows"):
        build.load_library()
