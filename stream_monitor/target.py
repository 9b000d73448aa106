"""Where a monitor is and how to speak to it: in the clear, or over TLS, with what certificate and what token.

Publishers, the client library and the command line all use it. Secrets are in files, which are read when a connection
is made, so that replaced ones are taken without a restart.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stream_monitor.addresses import check_address, is_local
from stream_monitor.replaced import Mark, mark
from stream_monitor.socket_folders import folder_fault, own_folder

if TYPE_CHECKING:
    import grpc

SYSTEM = "system"
"""In the place of a file of CAs: those of this host."""
MOST_TOKEN_BYTES = 4096


class TargetError(ValueError):
    """A monitor cannot be spoken to in this way. One line that names what is wrong, and no secret."""


@dataclass(frozen=True)
class Target:
    """One monitor.

    Attributes:
        address: unix:/path or host:port.
        ca: file of the CAs that may have signed the monitor's certificate, or SYSTEM; empty: no TLS.
        certificate, key: files of what is shown to the monitor (mTLS); both or none.
        token_file: file of the bearer token that is shown to it.
        insecure: speak without TLS beyond this host.

    Raises:
        TargetError: the parts do not go together.
    """

    address: str
    ca: str = ""
    certificate: str = ""
    key: str = ""
    token_file: str = ""
    insecure: bool = False

    def __post_init__(self) -> None:
        try:
            check_address(self.address)
        except ValueError as error:
            raise TargetError(f"{error} (got {self.address!r})") from None
        if bool(self.certificate) != bool(self.key):
            raise TargetError("a client certificate needs its key, and a key its certificate")
        if self.ca:
            return
        if self.certificate:
            raise TargetError("a client certificate is shown over TLS: name the file of the monitor's CA, or `system`")
        if is_local(self.address):
            return
        if self.token_file:
            raise TargetError(
                f"{self.address} is beyond this host: a token is not sent there in the clear; name the file of the "
                "monitor's CA, or `system`"
            )
        if not self.insecure:
            raise TargetError(
                f"{self.address} is beyond this host and would be spoken to in the clear; name the file of the "
                "monitor's CA, or `system`, or allow it"
            )

    def check_folder(self) -> bool:
        """Whether the folder of a socket in `own_folder` is there; True for all other addresses.

        Raises:
            TargetError: others may put a socket there, and would get what is sent.
        """
        folder = Path(self.address.removeprefix("unix:")).parent
        if folder != own_folder():
            return True
        try:
            fault = folder_fault(folder)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise TargetError(f"cannot look at folder {folder}: {error.strerror}") from None
        if fault:
            raise TargetError(f"{fault}; have it removed, or name another socket: target, and ingest of the monitor")
        return True

    def credentials(self) -> "grpc.ChannelCredentials | None":
        """Of a gRPC channel; None for one in the clear. Raises TargetError if a file cannot be read."""
        if not self.ca:
            return None
        import grpc  # Not in a vLLM worker, which only checks its settings.

        return grpc.ssl_channel_credentials(
            _system_cas() if self.ca == SYSTEM else _read(self.ca),
            _read(self.key) if self.key else None,
            _read(self.certificate) if self.certificate else None,
        )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes along with every call. Raises TargetError if the token cannot be read."""
        if not self.token_file:
            return ()
        token = _read(self.token_file).strip()
        if not token or len(token) > MOST_TOKEN_BYTES or not all(0x21 <= byte <= 0x7E for byte in token):
            raise TargetError(f"{self.token_file} holds no token: one line of printable characters without spaces")
        return (("authorization", f"Bearer {token.decode()}"),)

    def mark(self) -> Mark:
        """Differs after one of its files was replaced."""
        files = (self.ca, self.certificate, self.key, self.token_file)
        return mark(path for path in files if path and path != SYSTEM)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise TargetError(f"cannot read {path}: {error.strerror}") from None


def _system_cas() -> bytes:
    path = ssl.get_default_verify_paths().cafile
    if path is None:
        raise TargetError("this host has no file of CAs; name one")
    return _read(path)
