"""The host that the tests share, ended and started again in its place: same folder, same port, another process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from _host import Host, start_host
from watching import PACKS


@contextmanager
def restarted(server: Host) -> Iterator[None]:
    """End the host; what stands in the `with` block happens before it is there again, with a new log."""
    server.stop()
    try:
        yield
    finally:
        fresh = start_host(server.base, port=int(server.url.rpartition(":")[2]), extra=PACKS)
        server.process, server.log_path = fresh.process, fresh.log_path
