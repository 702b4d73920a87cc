"""Store compiled libraries, with checksums, in folders that only this user may write to.

A library is native code that runs with this user's rights, so no other user may be able to write to
its folder. Its checksum is verified before it is loaded, because loading a damaged library kills
the process. Only one process per machine builds a library at a time. The lock is an flock, which
the kernel releases when the process ends.
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
_REMEDY = f"set {ROOT_VARIABLE} to a folder that only you can write to"
_LARGEST_LIBRARY = 1 << 30  # bytes
_ABANDONED = 3600.0  # seconds after which the objects of another library are removed


def folder_of(digest: str) -> Path:
    """Return the path of the folder for the library with this digest. It need not exist.

    The folder is in `$TORCH_EXTENSIONS_DIR/mistral_kernels`. If the variable is not set, the folder
    is in the cache of PyTorch's extensions. Symbolic links in the path are resolved. If
    `check_private` finds a link in the path, the link is newer than this call, and another user may
    have created it.

    Raises:
        BuildError: the path is relative. It would depend on the current folder, which may belong to
            another user.
    """
    root = os.environ.get(ROOT_VARIABLE)
    root = root or torch._appdirs.user_cache_dir("torch_extensions")
    if not os.path.isabs(root):
        raise BuildError(
            f"the path of the cache of compiled libraries, {root!r}, is relative; set "
            f"{ROOT_VARIABLE} to an absolute path"
        )
    return Path(os.path.realpath(os.path.join(root, "mistral_kernels", digest)))


def verify_checksum(library: Path) -> str:
    """Return the SHA-256 of a library after comparing it with the checksum file.

    Raises:
        BuildError: the checksum differs, or the library or its checksum file is missing or is not a
            regular file.
        OSError: the library or its checksum file cannot be read.
    """
    try:
        contents = read_bytes(library, _LARGEST_LIBRARY)
        expected = read_bytes(checksum_file(library), 1000).decode("ascii", "replace")
    except (ValueError, FileNotFoundError) as error:
        raise BuildError(f"{library} cannot be loaded: {error}") from None
    digest = hashlib.sha256(contents).hexdigest()
    if digest != expected:
        raise BuildError(
            f"{library} cannot be loaded: its SHA-256 must be {expected[:64]!r}, got {digest!r}"
        )
    return digest


def check_private(folder: Path) -> None:
    """Raise BuildError if a user other than root and this user could put a library into `folder`.

    A user can do that if the user owns `folder` or one of its parents, or has write access to
    `folder` or to a parent without the sticky bit.
    """
    for path in (folder, *folder.parents):
        status = path.lstat()  # `folder_of` has resolved all links: a link here is new
        if not stat.S_ISDIR(status.st_mode):
            raise BuildError(f"{path} must be a folder; {_REMEDY}")
        is_root = path == path.parent  # in a container, any user may own the root folder
        if not is_root and status.st_uid not in (0, os.geteuid()):
            raise BuildError(f"{path} belongs to another user (uid {status.st_uid}); {_REMEDY}")
        if path != folder and status.st_mode & stat.S_ISVTX:
            continue
        if status.st_mode & stat.S_IWOTH:
            raise BuildError(f"{path} may be written to by all users; {_REMEDY}")
        if status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid):
            raise BuildError(f"{path} may be written to by its group; {_REMEDY}")


def _is_own_group(gid: int) -> bool:
    """Return whether the group is this user's private group, which Linux distributions create."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    is_private_group = group.gr_name == user.pw_name and gid == user.pw_gid
    return is_private_group and not set(group.gr_mem) - {user.pw_name}


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the build lock of `folder`. Create the folder, with mode 700, if it is absent.

    If another process holds the lock, print a line on stderr and wait. Old objects of interrupted
    builds of other libraries are removed.

    Yields:
        The file descriptor of the lock. A child process that inherits it keeps the lock.

    Raises:
        BuildError: other users may write to the folder, or its file system has no locks.
        OSError: the folder cannot be created or written to.
    """
    _make_private(folder)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    descriptor = os.open(folder / ".lock", flags, 0o600)
    try:
        _lock(descriptor, folder)
        _remove_abandoned(folder)
        yield descriptor
    finally:
        os.close(descriptor)


def _make_private(folder: Path) -> None:
    for path in (*reversed(folder.parents), folder):
        if not path.exists():
            check_private(path.parent)
            with suppress(FileExistsError):  # another process has just created it
                path.mkdir(0o700)
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
        raise BuildError(
            f"{folder} cannot be locked ({error.strerror}); {_REMEDY}, on another file system"
        ) from None


def _remove_abandoned(folder: Path) -> None:
    """Remove the objects of interrupted builds in the folders of other libraries.

    Those folders are not locked. Remove only objects that are older than one hour.
    """
    for unfinished in folder.parent.glob(f"*/{UNFINISHED}*"):
        with suppress(OSError):
            age = time.time() - unfinished.lstat().st_mtime
            if unfinished.parent != folder and age > _ABANDONED:
                shutil.rmtree(unfinished)
