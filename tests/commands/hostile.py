"""Input that is made to do harm."""

import struct
import zlib


def png(width: int, height: int, rows: int = 0) -> bytes:
    """A PNG of one bit a pixel that claims a size and holds so many black rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    packer = zlib.compressobj(9)
    body = packer.compress(bytes(rows * (1 + (width + 7) // 8))) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")
