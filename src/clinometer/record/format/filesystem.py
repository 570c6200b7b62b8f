"""Whether a folder lies on a file system that several machines share; SQLite's WAL needs shared memory."""

from __future__ import annotations

import re
from pathlib import Path

_SHARED = frozenset(
    (
        *("9p", "acfs", "afs", "autofs", "beegfs", "ceph", "cifs", "coda", "cvfs", "davfs", "drvfs", "fhgfs"),
        *("fuse", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs"),
        *("prl_fs", "pvfs2", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs", "wekafs"),
    )
)


def is_network(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """True for NFS, SMB, FUSE and their like; where the system tells no mounts, only for UNC paths."""
    path = folder.absolute()
    try:
        path = path.resolve()
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except (OSError, RuntimeError):
        return str(path).startswith("\\\\")
    best, kind = -1, ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        at = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[1]))
        if path.is_relative_to(at) and len(at.parts) >= best:  # the later of two on one point is on top
            best, kind = len(at.parts), fields[2]
    return kind in _SHARED or kind.startswith("fuse.")
