"""A minimal root folder for sandboxes: one Python with its libraries, and nothing else.

Copied, because an interpreter may lie where an ordinary user cannot look (a home folder), and
because the host's own folders hold compilers and container clients that no program should find.
A folder made elsewhere, say by debootstrap, serves as well if it has /usr/bin/python3,
/usr/bin/prlimit and empty /proc, /dev and /tmp.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from asap.errors import CapacityError

__all__ = ["PACKAGES", "RootFolder", "build_root"]

PACKAGES = ("numpy", "sortedcontainers")
"""What tests of known benchmarks import besides the standard library."""
LEFT_OUT = shutil.ignore_patterns(
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "config-*",
    "site-packages",
    "dist-packages",
    "_tkinter*",
    "*.a",
    "*.opt-1.pyc",
    "*.opt-2.pyc",
)
LIBRARIES = "usr/lib"


@dataclass(frozen=True)
class RootFolder:
    """A root folder that is ready. `loader` starts its interpreter from outside of it."""

    path: Path

    @property
    def python(self) -> Path:
        """The interpreter, as a path of the host."""
        return self.path / "usr/bin/python3"

    @property
    def loader(self) -> list[str]:
        """The command that starts the interpreter with the folder's own libraries."""
        loaders = sorted(self.path.glob("lib*/ld-linux-*.so.*"))
        if not loaders:
            raise CapacityError(
                f"no dynamic loader below {self.path}; build the folder anew",
                code="sandbox-unavailable",
            )
        folders = [self.path / LIBRARIES]
        for pattern in ("lib/*-linux-gnu", "usr/lib/*-linux-gnu"):
            folders += self.path.glob(pattern)
        return [str(loaders[0]), "--library-path", ":".join(map(str, folders)), str(self.python)]


def build_root(folder: Path, packages: Iterable[str] = PACKAGES) -> RootFolder:
    """Fill an empty folder (about 150 MB) with the running interpreter, the standard library and
    these packages, as far as they are installed.

    Raises CapacityError `sandbox-unavailable` when a needed program is not installed.
    """
    prlimit = shutil.which("prlimit")
    if prlimit is None:
        raise CapacityError("prlimit is missing: install util-linux", code="sandbox-unavailable")
    for name in ("proc", "dev", "tmp", "etc", "usr/bin", LIBRARIES):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # Debian's loader looks into usr/lib, others' into usr/lib64.
    (folder / "usr/lib64").symlink_to("lib")
    (folder / "etc/passwd").write_text("nobody:x:65534:65534::/tmp:/usr/sbin/nologin\n")
    (folder / "etc/group").write_text("nogroup:x:65534:\n")
    interpreter = Path(sys.executable).resolve()
    shutil.copy(interpreter, folder / "usr/bin/python3")
    shutil.copy(prlimit, folder / "usr/bin/prlimit")
    library = f"{sys.platlibdir}/python{sys.version_info.major}.{sys.version_info.minor}"
    home = folder / "usr" / library
    # Where the interpreter lies tells it where its library is, so the names below usr must stay.
    shutil.copytree(sysconfig.get_path("stdlib"), home, ignore=LEFT_OUT, symlinks=False)
    for name in packages:
        _copy_package(name, home / "site-packages")
    _copy_libraries(folder, [interpreter, Path(prlimit)])
    _readable(folder)
    return RootFolder(folder)


def _copy_package(name: str, target: Path) -> None:
    """Every top folder or file of an installed distribution, its bundled libraries included."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return
    tops = {Path(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
    for top in sorted(tops):
        source = Path(str(distribution.locate_file(top)))
        if source.is_dir():
            shutil.copytree(source, target / top, ignore=LEFT_OUT)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / top)


def _copy_libraries(folder: Path, programs: list[Path]) -> None:
    """The shared libraries of these programs and of all extension modules; the loader where
    programs name it, all others in one folder.
    """
    extensions = sorted((folder / "usr").rglob("*.so"))
    found = subprocess.run(
        ["ldd", *map(str, programs + extensions)], capture_output=True, text=True, check=False
    )
    for path in sorted(set(re.findall(r"^\s+(/\S+) \(0x", found.stdout, re.MULTILINE))):
        (folder / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path[1:])
    for path in sorted(set(re.findall(r"=> (/\S+)", found.stdout))):
        if not Path(path).is_relative_to(folder):
            shutil.copy(path, folder / LIBRARIES / Path(path).name)


def _readable(folder: Path) -> None:
    """An ordinary user may read and start everything, whatever umask or home it came from."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
