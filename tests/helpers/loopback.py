"""A server on a free port of this machine, for tests."""

import http.server
import threading


class LoopbackServer(http.server.ThreadingHTTPServer):
  """Answers in threads of its own; a context manager."""

  daemon_threads = True
  request_queue_size = 64

  def __init__(self, handler):
    super().__init__(("127.0.0.1", 0), handler)

  @property
  def port(self):
    return self.server_address[1]

  def __enter__(self):
    threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
    return self

  def __exit__(self, *_):
    self.shutdown()
    self.server_close()

  def handle_error(self, request, client_address):
    """Says nothing of clients that were killed."""
