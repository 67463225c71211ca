"""Ranks meet over a socket that their launcher has bound and handed to rank 0."""

import os
import socket
import subprocess
import sys

from paths import ROOT

MEET = """
import torch
from pretrain.world import connect, disconnect
world = connect(60)
print(world.add([world.rank + 1])[0])
disconnect()
"""


def test_rank_0_listens_on_the_socket_that_it_was_given():
    with socket.create_server(("127.0.0.1", 0)) as server:
        # Nothing but this very socket can listen on the port while it is held.
        shared = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "lo",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(server.getsockname()[1]),
        }
        places = [{"RANK": "0", "LOCAL_RANK": "0", "MASTER_LISTEN_FD": str(server.fileno())}]
        places.append({"RANK": "1", "LOCAL_RANK": "1"})
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", MEET],
                env=shared | place,
                pass_fds=[server.fileno()] if "MASTER_LISTEN_FD" in place else [],
                stdout=subprocess.PIPE,
                text=True,
            )
            for place in places
        ]
        try:
            said = [rank.communicate(timeout=120)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert said == ["3.0\n", "3.0\n"]
