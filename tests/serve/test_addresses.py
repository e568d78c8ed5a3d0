"""Addresses of both kinds."""

import socket

import pytest

from pagoda import EngineConfig, ServeConfig
from pagoda.serve.addresses import reachable
from pagoda.serve.supervisor import Supervisor


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(
    ("name", "host", "reach"),
    [("::1", "[::1]", ["::1"]), ("[::1]", "[::1]", ["::1"]), ("::", "[::1]", ["::1", "127.0.0.1"]),
     ("0.0.0.0", "127.0.0.1", ["127.0.0.1"]), ("localhost", "localhost", ["127.0.0.1"])],
)  # fmt: skip
def test_a_server_listens_where_it_is_told(name: str, host: str, reach: list[str]) -> None:
    server = Supervisor("mini", EngineConfig(), ServeConfig(server_name=name, server_port=0))
    try:
        before, _, port = server.url.rpartition(":")
        assert before == f"http://{host}" == f"http://{reachable(name)}"
        for address in reach:
            socket.create_connection((address, int(port)), timeout=5).close()
    finally:
        server._listener.close()
