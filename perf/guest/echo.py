"""A program: sends one TCP stream back whole, once all of it is there.

``echo.py ADDRESS SIZE`` writes "port N" when it listens, and at the end one line of JSON: the
seconds from the connection to its end, and the SHA-256 of what came. It needs the standard library
only, so that it starts at once.
"""

import hashlib
import json
import socket
import sys
import time


def main() -> None:
    address, size = sys.argv[1], int(sys.argv[2])
    with socket.create_server((address, 0)) as listening:
        print(f"port {listening.getsockname()[1]}", flush=True)
        connection, _ = listening.accept()
    start = time.monotonic()
    content = bytearray()
    with connection:
        while len(content) < size and (part := connection.recv(1 << 20)):
            content += part
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        # The guest closes when it has all.
        while connection.recv(1 << 20):
            pass
    seconds = time.monotonic() - start
    print(json.dumps({"seconds": seconds, "sha256": hashlib.sha256(content).hexdigest()}))


if __name__ == "__main__":
    main()
