"""Zstandard frames with a window over 128 MiB (`zstd --long=31`), which pyarrow refuses: the system's libzstd reads."""

from __future__ import annotations

import ctypes
import ctypes.util
import io
from functools import cache
from pathlib import Path
from typing import Any

LONGEST_WINDOW = 31  # log2 of the bytes: what 64-bit machines can decode
PYARROWS_WINDOW = 2**27  # bytes: the largest that it reads
_WINDOW_LOG_MAX = 100  # ZSTD_d_windowLogMax
_CHUNK = 2**17


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer have the same layout."""

    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("position", ctypes.c_size_t)]


@cache
def _library() -> Any:
    name = ctypes.util.find_library("zstd")
    if name is None:
        raise OSError(
            f"its window is over 128 MiB and this machine has no libzstd; unpack it: zstd -d --long={LONGEST_WINDOW}"
        )
    library = ctypes.CDLL(name)
    library.ZSTD_createDCtx.restype = ctypes.c_void_p
    library.ZSTD_freeDCtx.argtypes = [ctypes.c_void_p]
    library.ZSTD_DCtx_setParameter.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    library.ZSTD_decompressStream.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Buffer), ctypes.POINTER(_Buffer)]
    library.ZSTD_decompressStream.restype = ctypes.c_size_t
    library.ZSTD_isError.argtypes = [ctypes.c_size_t]
    library.ZSTD_getErrorName.argtypes = [ctypes.c_size_t]
    library.ZSTD_getErrorName.restype = ctypes.c_char_p
    return library


class LongWindowReader(io.RawIOBase):
    """The content of a file of zstd frames, with windows of up to 2 GiB.

    Raises:
        OSError: it is damaged or cut short, or there is no libzstd.
    """

    def __init__(self, path: Path) -> None:
        self._library = _library()
        self._file = open(path, "rb")  # noqa: SIM115
        self._context = self._library.ZSTD_createDCtx()
        self._library.ZSTD_DCtx_setParameter(self._context, _WINDOW_LOG_MAX, LONGEST_WINDOW)
        self._packed = ctypes.create_string_buffer(_CHUNK)
        self._input = _Buffer(ctypes.addressof(self._packed), 0, 0)
        self._inside = False  # a frame has begun and not ended

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        output = _Buffer(ctypes.addressof(ctypes.c_char.from_buffer(view)), len(view), 0)
        while output.position == 0 and len(view):
            if self._input.position == self._input.size:
                # Read in any case: what the decoder still holds comes out without input.
                self._input.size, self._input.position = self._file.readinto(self._packed), 0
                if self._input.size == 0 and not self._inside:
                    return 0
            ended = self._input.size == 0
            left = self._library.ZSTD_decompressStream(self._context, output, self._input)
            if self._library.ZSTD_isError(left):
                raise OSError(self._library.ZSTD_getErrorName(left).decode())
            self._inside = left != 0
            if ended and self._inside and output.position == 0:
                raise OSError("the last frame has no end")
        return int(output.position)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            self._library.ZSTD_freeDCtx(self._context)
        super().close()


def window_of(path: Path) -> int:
    """Bytes of the window of a file's first frame (RFC 8878, section 3.1.1.1); 0 where it is no frame.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        header = file.read(18)
    if len(header) < 6 or header[:4] != b"\x28\xb5\x2f\xfd":
        return 0
    if header[4] & 0x20:  # a single segment: the window is the content, whose size is written
        width = (1, 2, 4, 8)[header[4] >> 6]
        begin = 5 + (0, 1, 2, 4)[header[4] & 3]
        return int.from_bytes(header[begin : begin + width], "little")
    exponent, mantissa = header[5] >> 3, header[5] & 7
    return (1 << (10 + exponent)) * (8 + mantissa) // 8
