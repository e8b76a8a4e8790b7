"""A web server of files for the tests, which can be slow, break off, or answer anything."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path


class Server(http.server.SimpleHTTPRequestHandler):
    """A server that counts requests; ``answers`` has what it does for some paths."""

    asked: list[str]
    answers: dict[str, Callable[[Server], None]]
    slow = 0.0
    cut = ""

    def do_GET(self) -> None:
        self.asked.append(self.path)
        time.sleep(self.slow)
        with suppress(BrokenPipeError, ConnectionResetError):  # the client has gone
            if self.path in self.answers:
                self.answers[self.path](self)
            elif self.cut and self.path.endswith(self.cut):
                content = Path(self.translate_path(self.path)).read_bytes()
                self.send(content[:5000], {"Content-Length": str(len(content))})
            else:
                super().do_GET()

    def send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, type[Server]]]:
    """Serve a folder; give the address and the server's class."""
    handler = type("Handler", (Server,), {"asked": [], "answers": {}})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(handler, directory=str(folder))
    ) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}", handler
        finally:
            httpd.shutdown()
            thread.join()
