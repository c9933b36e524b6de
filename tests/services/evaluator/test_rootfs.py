from __future__ import annotations

import subprocess
import sys

import pytest

from asap_evaluator.rootfs import RootFolder, build_root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build_root(tmp_path_factory.mktemp("root"))


def started(root, source):
    done = subprocess.run(
        [*root.loader, "-I", "-c", source], capture_output=True, text=True, check=True, env={}
    )
    return done.stdout.strip()


def test_its_python_is_this_python_and_uses_only_its_own_files(root):
    source = "import sys; print(sys.version_info[:3], *sys.path, sep='\\n')"
    version, *paths = started(root, source).splitlines()
    assert version == str(sys.version_info[:3])
    assert paths
    assert all(path.startswith(str(root.path)) for path in paths)


def test_packages_of_the_benchmarks_work(root):
    assert started(root, "import numpy, sortedcontainers; print(numpy.arange(3).sum())") == "3"


def test_extension_modules_find_their_libraries(root):
    assert started(root, "import bz2, ctypes, decimal, lzma, sqlite3, zlib; print(1)") == "1"


def test_there_is_no_program_but_two(root):
    assert {path.name for path in (root.path / "usr/bin").iterdir()} == {"python3", "prlimit"}
    assert not (root.path / "bin").exists()


def test_its_passwd_is_its_own(root):
    assert "root" not in (root.path / "etc/passwd").read_text()


def test_everybody_may_read_and_nobody_else_may_write(root):
    modes = {path.stat().st_mode & 0o777 for path in root.path.rglob("*") if not path.is_symlink()}
    assert modes <= {0o755, 0o644}


def test_a_folder_without_a_loader_is_refused(tmp_path):
    from asap.errors import CapacityError

    with pytest.raises(CapacityError, match="no dynamic loader"):
        _ = RootFolder(tmp_path).loader
