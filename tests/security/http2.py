"""A publisher in a few lines of HTTP/2, for what no gRPC library would do."""

import socket

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_HEADERS = 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def field(name: bytes, value: bytes) -> bytes:
    """A header in HPACK, never indexed, of less than 127 bytes each."""
    assert len(name) < 127
    assert len(value) < 127
    return b"\x10" + bytes([len(name)]) + name + bytes([len(value)]) + value


def publishing(*messages: bytes) -> bytes:
    """All the bytes of a connection that opens a Publish stream and sends these."""
    headers = b"".join(
        field(*each)
        for each in (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", b"/stream_monitor.v1alpha1.IngestService/Publish"),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
        )
    )
    data = [frame(DATA, 0, 1, b"\0" + len(each).to_bytes(4, "big") + each) for each in messages]
    return PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, headers) + b"".join(data)


def fire_and_forget(path: str, raw: bytes, wait: float) -> None:
    """Connect to a Unix socket, send, and be gone, after `wait` seconds at most if something is answered."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(raw)
        if wait:
            connection.settimeout(wait)
            try:
                connection.recv(4096)
            except OSError:
                return
