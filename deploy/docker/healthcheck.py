"""Exits 0 if the monitor of this container answers on its HTTP port: the image holds no curl, and needs none."""

import http.client
import os
import ssl
import sys


def setting(name: str, default: str = "") -> str:
    return os.environ.get(f"STREAM_MONITOR_{name}", default)


port = int(setting("HTTP", "127.0.0.1:9751").rpartition(":")[2])
if setting("TLS_CERTIFICATE"):
    # Whether it is the right one is not the question here, and no secret is sent.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=2, context=context)
else:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
try:
    connection.request("GET", "/healthz")
    sys.exit(connection.getresponse().status != 200)
except OSError as error:
    sys.exit(f"no answer on port {port}: {error}")
