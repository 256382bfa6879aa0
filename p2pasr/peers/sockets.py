"""The folder of a libp2p daemon's sockets: short of path, private, and gone when its owner is.

Unix sockets want paths of about a hundred characters at most, so they lie under the system's temporary
folder. A link at a place that the owner knows remembers where, so that its next start removes what a
killed one left.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

PREFIX: Final = "p2pasr-"


def make(note: Path) -> Path:
    """A fresh folder for sockets, noted at `note`; the one noted before is removed.

    The caller holds the lock of whatever owns `note`, so nobody uses the old one any more.
    """
    remove(note)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    note.symlink_to(folder)
    return folder


def remove(note: Path) -> None:
    """Remove the folder noted at `note`, if there is one."""
    if not note.is_symlink():
        return
    folder = note.readlink()
    if folder.name.startswith(PREFIX) and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
    note.unlink()
