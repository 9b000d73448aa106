"""A TCP proxy whose connections can be cut off without a word, as when a host or a cable in between is gone."""

import contextlib
import socket
import threading

from tests.monitor.process import free_port


class Proxy:
    """Forwards to `host:port` until `silence`: then what is connected hears nothing more, no end either."""

    def __init__(self, target: str) -> None:
        self._target = target
        self.address = f"127.0.0.1:{free_port()}"
        self.connections = 0
        self._silent = threading.Event()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(_place(self.address))
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self) -> None:
        """Cut off what is connected now."""
        self._silent.set()
        self._silent = threading.Event()

    def close(self) -> None:
        """End everything."""
        self.silence()
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(_place(self._target))
                except OSError:  # nobody is there now
                    near.close()
                    continue
                self._sockets += [near, far]
                self.connections += 1
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_forward, args=(source, sink, self._silent), daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket, silent: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if silent.is_set():
                return
            sink.sendall(data)
        if not silent.is_set():
            sink.shutdown(socket.SHUT_WR)


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
