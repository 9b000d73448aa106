"""Messages that are nearly right: one or a few things of a sound message changed, anywhere in it."""

import math
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_TEXTS = ("", "\0", "a" * 2000, "é" * 300, "../../etc/passwd", "%s%n", "\u202e", "0" * 36, '"', "\n")
_BYTES_TYPES = {FieldDescriptor.TYPE_BYTES}
_UNSIGNED = {FieldDescriptor.TYPE_UINT32: 32, FieldDescriptor.TYPE_UINT64: 64}
_SIGNED = {FieldDescriptor.TYPE_INT32: 32, FieldDescriptor.TYPE_INT64: 64, FieldDescriptor.TYPE_ENUM: 32}
_REAL = {FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE}


def mutated(message: Message, draw: Random) -> bytes:
    """`message` with one to three changes, serialised; now and then changed again as bytes."""
    for _ in range(draw.randint(1, 3)):
        _change(message, draw)
    raw = message.SerializeToString()
    return corrupted(raw, draw) if draw.random() < 0.2 else raw


def corrupted(raw: bytes, draw: Random) -> bytes:
    """Other bytes: cut, flipped, doubled, with something put in."""
    place = draw.randrange(len(raw) + 1)
    change: Callable[[], bytes] = draw.choice(
        (
            lambda: raw[:place],
            lambda: raw[:place] + draw.randbytes(draw.randrange(1, 9)) + raw[place:],
            lambda: raw[:place] + draw.randbytes(min(8, len(raw) - place)) + raw[place + 8 :],
            lambda: raw + raw[place:],
            lambda: draw.randbytes(draw.randrange(64)),
            # A length that reaches far beyond the end; groups within groups.
            lambda: raw[:place] + b"\x0a\xff\xff\xff\xff\x07" + raw[place:],
            lambda: b"\x0b" * draw.randrange(1, 300) + raw,
        )
    )
    return change()


def _change(message: Message, draw: Random) -> None:
    """Change one field, of the message or of one inside it."""
    fields = message.DESCRIPTOR.fields
    if not fields:
        return
    field = draw.choice(fields)
    if field.is_repeated:
        _change_repeated(message, field, draw)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        if draw.random() < 0.1:
            message.ClearField(field.name)
        else:
            _change(getattr(message, field.name), draw)
    else:
        _set(message, field, _value(field, getattr(message, field.name), draw))


def _change_repeated(message: Message, field: FieldDescriptor, draw: Random) -> None:
    values = getattr(message, field.name)
    if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
        values[draw.choice(_TEXTS)] = draw.getrandbits(64)
        return
    choice = draw.random()
    if choice < 0.15:
        message.ClearField(field.name)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        if choice < 0.3:
            values.add()
        elif choice < 0.4 and values:
            values.extend([values[0]] * draw.choice((1, 20, 200)))
        elif values:
            _change(draw.choice(values), draw)
    else:
        held = list(values)
        if choice < 0.5 or not held:
            held.insert(draw.randrange(len(held) + 1), _value(field, _default(field), draw))
        elif choice < 0.7:
            held[draw.randrange(len(held))] = _value(field, held[0], draw)
        elif choice < 0.8:
            held *= draw.choice((2, 50))
        else:
            draw.shuffle(held)
        try:
            message.ClearField(field.name)
            values.extend(held)
        except (ValueError, TypeError):
            message.ClearField(field.name)


def _default(field: FieldDescriptor) -> Any:
    return b"" if field.type in _BYTES_TYPES else "" if field.type == FieldDescriptor.TYPE_STRING else 0


def _value(field: FieldDescriptor, held: Any, draw: Random) -> Any:
    if field.type in _BYTES_TYPES:
        return _bytes(held, draw)
    if field.type == FieldDescriptor.TYPE_STRING:
        return draw.choice((*_TEXTS, held[:-1], held + "x"))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return not held
    if field.type in _REAL:
        return draw.choice((math.nan, math.inf, -math.inf, -1.0, 0.0, 1e30, 2.0))
    if bits := _UNSIGNED.get(field.type):
        return draw.choice((0, 1, held + 1, max(0, held - 1), (1 << bits) - 1, draw.getrandbits(bits)))
    bits = _SIGNED[field.type]
    return draw.choice((0, 1, -1, held + 1, (1 << bits - 1) - 1, -(1 << bits - 1), draw.getrandbits(bits - 1)))


def _bytes(held: bytes, draw: Random) -> bytes:
    """An array that is too short or too long, or of which a part became something that numbers seldom are."""
    odd: Sequence[bytes] = (b"\xff", b"\0", b"\x7f", b"\x00\x7e", b"\x00\x7c", b"\x00\xfc", struct.pack("<f", math.nan))
    if held and draw.random() < 0.6:
        some = draw.choice(odd) * draw.choice((1, 4, 64))
        place = draw.randrange(len(held))
        return (held[:place] + some + held[place + len(some) :])[: len(held)]
    return draw.choice(
        (b"", held[:-1], held + b"\0", held * 2, held[: len(held) // 2], draw.randbytes(len(held)), bytes(100_000))
    )


def _set(message: Message, field: FieldDescriptor, value: Any) -> None:
    try:
        setattr(message, field.name, value)
    except ValueError:
        # An integer beyond the field's range cannot be written in Python; other changes reach what can be sent.
        message.ClearField(field.name)
