"""A web server on loopback that gives the files of a folder."""

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def web_server(folder: Path, ranges: bool = True, most_bytes: int | None = None) -> Iterator[str]:
    """A server while the block lasts; its URL.

    Args:
        folder: whose files it has; the page of a folder is a list of links.
        ranges: whether it knows ranges.
        most_bytes: after which an answer breaks off, the first time; None: never.
    """
    broken = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = folder / self.path.partition("?")[0].strip("/")
            if not path.exists():
                self.send_error(404)
                return
            links = "".join(f'<a href="{each.name}">{each.name}</a>' for each in sorted(path.glob("*")))
            data = f"<html>{links}</html>".encode() if path.is_dir() else path.read_bytes()
            asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if ranges else None
            self.send_response(206 if asked else 200)
            if asked:
                start, stop = int(asked[1]), int(asked[2]) + 1
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
                data = data[start:stop]
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", str(hash(data)))
            self.end_headers()
            if body and most_bytes is not None and len(data) > most_bytes and not broken:
                broken.append(path)
                data = data[:most_bytes]
                self.close_connection = True
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
