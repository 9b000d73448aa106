"""The bytes that a token of a vocabulary stands for, by its name there."""

import re

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte of SentencePiece's, for what has no token."""


def byte_level(name: str) -> bytes:
    """The bytes of a token's name in a byte-level vocabulary; what has other characters stands for itself.

    >>> byte_level("Ġ$$")
    b' $$'
    """
    try:
        return bytes(_BYTES[letter] for letter in name)
    except KeyError:
        return name.encode()


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that stand for the 256 bytes (GPT-2): themselves, the others from 256 on in order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()
