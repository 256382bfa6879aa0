"""An encoded delta on disk, read and written part by part, so that its size is no matter of memory."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from p2pasr.averaging.codec import Layout
from p2pasr.errors import LocalError, Reject
from p2pasr.peers.blobs import disk_errors


class PartFile:
    """A file with the layout of an encoded delta; parts may be written in any order.

    Its descriptor stays valid when the file is renamed or deleted.

    Args:
        path: the file; it is created where it does not exist.
        layout: how it is cut up.

    Raises:
        LocalError: it cannot be opened.
        Reject: it exists and has another length.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LocalError(f"{path} cannot be opened ({error.strerror})") from error
        size = os.fstat(self._descriptor).st_size
        if size == 0:
            os.truncate(self._descriptor, layout.total_bytes)
        elif size != layout.total_bytes:
            self.close()
            raise Reject(f"an encoded delta has {layout.total_bytes} bytes, not {size}")

    def read(self, index: int) -> bytes:
        """One part."""
        return os.pread(self._descriptor, self.layout.part_bytes(index), self.layout.offset(index))

    def write(self, index: int, data: bytes) -> None:
        """Replace one part.

        Raises:
            LocalError: the disk is full.
            ValueError: it has another length than the layout says.
        """
        if len(data) != self.layout.part_bytes(index):
            raise ValueError(f"part {index} has {self.layout.part_bytes(index)} bytes, not {len(data)}")
        with disk_errors(self.path.parent):
            os.pwrite(self._descriptor, data, self.layout.offset(index))

    def close(self) -> None:
        """Release the descriptor; closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
