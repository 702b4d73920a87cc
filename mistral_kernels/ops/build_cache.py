"""Keep compiled libraries in folders that only this user may write to, with checksums.

A library is native code that runs as this user: nobody else may be able to put one there. Before it
is loaded its checksum is compared, since loading a damaged one kills the process. One process of a
machine builds at a time; the lock is the kernel's, so that none outlives its holder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch._appdirs

from mistral_kernels.ops.compiler import UNFINISHED, BuildError, checksum_file
from mistral_kernels.utils.files import read_bytes

ROOT_VARIABLE = "TORCH_EXTENSIONS_DIR"
_REMEDY = f"set {ROOT_VARIABLE} to a folder that is yours alone"
_LARGEST_LIBRARY = 1 << 30
_ABANDONED = 3600.0  # seconds after which nobody builds any more in a folder of another digest


def folder_of(digest: str) -> Path:
    """Return the folder of the library with this digest, whether it is there or not.

    It is in `$TORCH_EXTENSIONS_DIR/mistral_kernels`, by default that of PyTorch's extensions. All
    symbolic links on the way are followed now, and none later.

    Raises BuildError if the path is relative: the current folder may be another user's.
    """
    root = os.environ.get(ROOT_VARIABLE)
    root = root or torch._appdirs.user_cache_dir("torch_extensions")
    if not os.path.isabs(root):
        raise BuildError(
            f"the path of the cache of compiled libraries, {root!r}, is relative; set "
            f"{ROOT_VARIABLE} to an absolute path"
        )
    return Path(os.path.realpath(os.path.join(root, "mistral_kernels", digest)))


def check_whole(library: Path) -> str:
    """Return the checksum of a library that is as it was built.

    Raises:
        BuildError: it is not, its checksum is not there, or either is no regular file.
        OSError: either cannot be read.
    """
    try:
        contents = read_bytes(library, _LARGEST_LIBRARY)
        expected = read_bytes(checksum_file(library), 1000).decode("ascii", "replace")
    except (ValueError, FileNotFoundError) as error:
        raise BuildError(f"{library} does not load: {error}") from None
    digest = hashlib.sha256(contents).hexdigest()
    if digest != expected:
        raise BuildError(f"{library} does not load: its checksum is not {expected[:64]!r}")
    return digest


def check_private(folder: Path) -> None:
    """Raise BuildError if another user than root could put a library into `folder`.

    Another user could if that user owns, or may write to, the folder or one above it that has no
    sticky bit.
    """
    for place in (folder, *folder.parents):
        status = place.lstat()  # a symbolic link here was made after `folder_of`
        if not stat.S_ISDIR(status.st_mode):
            raise BuildError(f"{place} must be a folder; {_REMEDY}")
        is_root = place == place.parent  # in a container its owner may be anybody
        if not is_root and status.st_uid not in (0, os.geteuid()):
            raise BuildError(f"{place} belongs to another user (uid {status.st_uid}); {_REMEDY}")
        if place != folder and status.st_mode & stat.S_ISVTX:
            continue
        if status.st_mode & stat.S_IWOTH:
            raise BuildError(f"{place} may be written to by all users; {_REMEDY}")
        if status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid):
            raise BuildError(f"{place} may be written to by its group; {_REMEDY}")


def _is_own_group(gid: int) -> bool:
    """Return whether it is the group that a distribution makes for this user alone."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    is_named_alike = group.gr_name == user.pw_name and gid == user.pw_gid
    return is_named_alike and not set(group.gr_mem) - {user.pw_name}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the build lock of `folder`, which is created private if it is absent.

    Waits for one that does, and says so on stderr. What killed builds have left is removed.

    Raises:
        BuildError: others may write to the folder, or its file system has no locks.
        OSError: the folder cannot be made or written to.
    """
    _make_private(folder)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    descriptor = os.open(folder / ".lock", flags, 0o600)
    try:
        _lock(descriptor, folder)
        _remove_abandoned(folder)
        yield
    finally:
        os.close(descriptor)


def _make_private(folder: Path) -> None:
    for place in (*reversed(folder.parents), folder):
        if not place.exists():
            check_private(place.parent)
            with suppress(FileExistsError):  # another process is as far
                place.mkdir(0o700)
    check_private(folder)


def _lock(descriptor: int, folder: Path) -> None:
    import fcntl

    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"mistral_kernels: waiting for a process that compiles {folder}", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise BuildError(f"{folder} cannot be locked ({error.strerror}); {_REMEDY}") from None


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed builds left in `folder`, which is locked, and long ago beside it."""
    for unfinished in folder.parent.glob(f"*/{UNFINISHED}*"):
        with suppress(OSError):
            if unfinished.parent == folder or (
                time.time() - unfinished.lstat().st_mtime > _ABANDONED
            ):
                shutil.rmtree(unfinished)
