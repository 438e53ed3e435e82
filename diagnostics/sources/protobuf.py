"""The wire format of protocol buffers, as far as logs need it: fields of a message, without its schema.

Source: protobuf.dev, "Encoding".
"""

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class Malformed(ValueError):
    """Bytes that are no message."""


def varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned integer of at most 64 bits at `at`, and where it ends."""
    value = shift = 0
    while shift < 70:
        if at >= len(data):
            raise Malformed
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise Malformed


def fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(number, wire type, value) of each field, in order; a value is an int for VARINT, else its bytes.

    Raises:
        Malformed: the bytes are no message, or end within a field.
    """
    at, end = 0, len(data)
    while at < end:
        key, at = varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = varint(data, at)
            yield number, wire, value
            continue
        if wire == BYTES:
            length, at = varint(data, at)
        elif wire == FIXED64:
            length = 8
        elif wire == FIXED32:
            length = 4
        else:
            raise Malformed
        if length > end - at:
            raise Malformed
        yield number, wire, data[at : at + length]
        at += length


def messages(data: bytes, wanted: int) -> Iterator[bytes]:
    """The bytes of each field of this number that holds a message, a text or bytes."""
    for number, _, value in fields(data):
        if number == wanted and isinstance(value, bytes):
            yield value


def signed(value: int) -> int:
    """An int64 as it was meant."""
    return value - (1 << 64) if value >= 1 << 63 else value


def unzigzag(value: int) -> int:
    """A sint64 as it was meant."""
    return (value >> 1) ^ -(value & 1)
