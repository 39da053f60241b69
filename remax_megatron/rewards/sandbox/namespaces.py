"""Layer: namespaces. A mount namespace whose root is read-only, and its own network, pid, ipc and uts namespaces."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

from remax_megatron.rewards.sandbox.kernel import call, syscall

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _AT_RECURSIVE, _AT_FDCWD, _MNT_DETACH = 1, 2, 0x8000, -100, 2
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime")


def readable_paths() -> list[str]:
    """What a program may read: the system's libraries and the interpreter with its packages; none within another."""
    own = os.path.realpath(sys.executable)
    wanted = [*_SYSTEM, sys.prefix, sys.base_prefix, str(Path(own).parents[1])]
    paths: list[str] = []
    for path in sorted({os.path.abspath(p) for p in wanted if os.path.exists(p)} - {"/"}, key=lambda p: (len(p), p)):
        if not any(path == p or path.startswith(p + "/") for p in paths):
            paths.append(path)
    return paths


def new_root(folder: str, folder_bytes: int, root: bool, uid: int, gid: int, proc: int) -> None:
    """Enter new namespaces with a root of read-only mounts at `folder`; children are in a new pid namespace.

    `folder_bytes` is the size of what may be written, `root` whether this process is root's; if not, `uid` and `gid`
    are mapped through `proc`, a descriptor of /proc.
    """
    kinds = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    if root:
        call("unshare", kinds)
    else:
        call("unshare", kinds | _CLONE_NEWUSER)
        _map_ids(uid, gid, proc)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    for path in (*readable_paths(), *DEVICES):
        target = folder + path
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        if os.path.islink(path) and path in _SYSTEM:
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.mkdir(target, 0o755)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        _mount(path, target, None, _MS_BIND | _MS_REC)
        if path not in DEVICES:
            _mount_attributes(target, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID)
    os.mkdir(f"{folder}/box")
    options = f"size={folder_bytes},nr_inodes=4096,mode=0700,uid={uid},gid={gid}"
    _mount("tmpfs", f"{folder}/box", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.chdir(folder)
    syscall("pivot_root", b".", b".")  # the old root then lies over the new one: pivot_root(2), "." and "."
    call("umount2", b".", _MNT_DETACH)
    os.chdir("/")
    _mount_attributes("/", 0, _MOUNT_ATTR_RDONLY)


def own_count(uid: int, gid: int, proc: int) -> None:
    """A user namespace of its own, so that RLIMIT_NPROC counts this program alone; without it, all of `uid`'s."""
    try:
        call("unshare", _CLONE_NEWUSER)
    except OSError:  # not permitted here: the limit is then shared by the programs that run at the same time
        return
    _map_ids(uid, gid, proc)


def _map_ids(uid: int, gid: int, proc: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    try:
        call("mount", _encoded(source), _encoded(target), _encoded(kind), flags, options.encode())
    except OSError as error:
        raise OSError(error.errno, f"{source or kind} at {target}: {error.strerror}") from error


def _mount_attributes(path: str, flags: int, attributes: int) -> None:
    syscall("mount_setattr", _AT_FDCWD, path.encode(), flags, struct.pack("=QQQQ", attributes, 0, 0, 0), 32)


def _encoded(path: str | None) -> bytes | None:
    return None if path is None else os.fsencode(path)
