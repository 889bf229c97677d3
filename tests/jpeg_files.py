"""JPEG files that are not as they should be."""

from __future__ import annotations


def broken(content: bytes) -> bytes:
    """One with more codes in a table than there can be; its header says what it is."""
    table = content.index(b"\xff\xc4") + 5
    return content[:table] + b"\xff" * 16 + content[table + 16 :]
