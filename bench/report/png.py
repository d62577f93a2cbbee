"""A note in a PNG file: a text chunk, read without any library.

Source: the PNG specification, third edition, sections 5.3 and 11.3.3.3 (tEXt).
"""

from __future__ import annotations

import struct
from pathlib import Path

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def note(path: Path, keyword: str) -> str | None:
    """The text under a keyword; None if there is no such file, or no such text in it."""
    data = path.read_bytes() if path.is_file() else b""
    if not data.startswith(_SIGNATURE):
        return None
    place = len(_SIGNATURE)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + length]
        key, _, value = body.partition(b"\0")
        if kind == b"tEXt" and key == keyword.encode("latin-1"):
            return value.decode("latin-1")
        place += 12 + length
    return None
