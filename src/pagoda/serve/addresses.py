"""Where a server listens, and how it is reached there."""

import socket


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `host` is a name, or an address of either kind (`::` listens to both kinds)."""
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)


def reachable(host: str) -> str:
    """The host of an address that connects to a server that listens at `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))
    return f"[{host}]" if ":" in host else host
