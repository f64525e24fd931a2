"""A loopback server for the part of the Hugging Face hub's protocol that the project uses."""

from __future__ import annotations

import base64
import collections
import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator

COMMIT = '0123456789abcdef0123456789abcdef01234567'


class Hub(http.server.ThreadingHTTPServer):
    """Serves one folder as one repository.

    Attributes:
      folder, repository: the served folder, and its repository name.
      sent: finished downloads by file.
      requested: started downloads by file.
      files_left: files to send before every further connection is dropped; None drops none.
      gated: whether access to files is denied.
    """

    daemon_threads = True

    def __init__(self, folder: pathlib.Path, repository: str) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.folder, self.repository = folder, repository
        self.sent, self.requested = collections.Counter[str](), collections.Counter[str]()
        self.files_left: int | None = None
        self.gated = False
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """The value of HF_ENDPOINT."""
        return f'http://127.0.0.1:{self.server_address[1]}'

    def files(self) -> list[str]:
        """Return the paths of all files in the repository."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob('*') if path.is_file())

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: dropped connections are part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = 'HTTP/1.1'

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of the tests clean."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        """Accept an upload: the files come in the commit itself, in base64."""
        content = self.rfile.read(int(self.headers['Content-Length'])).decode()
        hub, api = self.server, f'/api/models/{self.server.repository}'
        if hub.gated:
            self._fail(403, 'GatedRepo')
        elif self.path == '/api/repos/create':
            self._json({'url': f'{hub.endpoint}/{hub.repository}', 'id': hub.repository})
        elif self.path == '/api/validate-yaml':
            self._json({'errors': [], 'warnings': []})
        elif self.path.startswith(f'{api}/preupload/'):
            files = json.loads(content)['files']
            plan = {'uploadMode': 'regular', 'shouldIgnore': False, 'oid': None}
            self._json({'files': [plan | {'path': file['path']} for file in files]})
        elif self.path.startswith(f'{api}/commit/'):
            for line in map(json.loads, content.splitlines()):
                if line['key'] == 'file':
                    path = hub.folder / line['value']['path']
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line['value']['content']))
            url = f'{hub.endpoint}/{hub.repository}/commit/{COMMIT}'
            self._json({'commitUrl': url, 'commitOid': COMMIT, 'success': True, 'pullRequestUrl': None})
        else:
            self._fail(404, 'RepoNotFound')

    def _answer(self, body: bool) -> None:
        hub, path = self.server, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if hub.files_left is not None and hub.files_left <= 0:
            self.close_connection = True
            self.connection.close()
            return
        api = f'/api/models/{hub.repository}'
        if path == api or path.startswith((f'{api}/revision/', f'{api}/tree/')):
            self._repository(path.removeprefix(api))
        elif path.startswith(f'/{hub.repository}/resolve/'):
            revision, name = path.removeprefix(f'/{hub.repository}/resolve/').split('/', 1)
            self._file(revision, name, body)
        else:
            self._fail(404, 'RepoNotFound')

    def _repository(self, rest: str) -> None:
        revision = rest.split('/')[2] if rest else 'main'
        if revision not in ('main', 'v1', COMMIT):
            return self._fail(404, 'RevisionNotFound')
        names = self.server.files()
        if rest.startswith('/tree/'):
            rows = [{'type': 'file', 'path': name, 'size': self._size(name), 'oid': self._etag(name)} for name in names]
            return self._json(rows)
        return self._json(
            {
                'id': self.server.repository,
                'modelId': self.server.repository,
                'sha': COMMIT,
                'private': False,
                'gated': False,
                'disabled': False,
                'downloads': 0,
                'likes': 0,
                'tags': [],
                'siblings': [{'rfilename': name} for name in names],
            }
        )

    def _file(self, revision: str, name: str, body: bool) -> None:
        hub = self.server
        if hub.gated:
            return self._fail(403, 'GatedRepo')
        if revision not in ('main', 'v1', COMMIT):
            return self._fail(404, 'RevisionNotFound')
        if name not in hub.files():
            return self._fail(404, 'EntryNotFound')
        content = (hub.folder / name).read_bytes()
        start = 0
        if body and 'Range' in self.headers:
            start = int(self.headers['Range'].removeprefix('bytes=').split('-')[0])
        self.send_response(206 if start else 200)
        self.send_header('ETag', f'"{self._etag(name)}"')
        self.send_header('X-Repo-Commit', COMMIT)
        self.send_header('Accept-Ranges', 'bytes')
        self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        if not body:
            return None
        with hub.lock:
            hub.requested[name] += 1
            last = hub.files_left is not None and hub.files_left <= 1
            if hub.files_left is not None:
                hub.files_left -= 1
        if last and len(content) > 1:  # in the middle of a file
            self.wfile.write(content[start : start + (len(content) - start) // 2])
            self.close_connection = True
            return None
        self.wfile.write(content[start:])
        with hub.lock:
            hub.sent[name] += 1
        return None

    def _size(self, name: str) -> int:
        return (self.server.folder / name).stat().st_size

    def _etag(self, name: str) -> str:
        return hashlib.sha1((self.server.folder / name).read_bytes()).hexdigest()

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header('X-Error-Code', code)
        content = json.dumps({'error': code}).encode()
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)


@contextlib.contextmanager
def serve(folder: pathlib.Path, repository: str) -> Iterator[Hub]:
    """Serve a folder as a repository while the block runs."""
    with Hub(folder, repository) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
