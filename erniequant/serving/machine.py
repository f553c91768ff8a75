"""The machine that is to serve: processors, memory, cards, and whether a port is free."""

import errno
import ipaddress
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_NODES = Path("/sys/devices/system/node")
_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Machine:
    """What a server can have.

    Attributes:
        processors: numbers of the logical CPUs that this process may use, ascending.
        nodes: NUMA nodes.
        memory: bytes of main memory, within this process's control group.
        cards: bytes of each GPU that torch finds.
    """

    processors: tuple[int, ...]
    nodes: int
    memory: int
    cards: tuple[int, ...] = ()


def this_machine() -> Machine:
    """The machine at hand."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = tuple(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # another system, or no limit ("max")
        memory = min(memory, int(_GROUP_LIMIT.read_text()))
    nodes = 0
    with suppress(OSError):
        nodes = sum(bool(re.fullmatch(r"node\d+", path.name)) for path in _NODES.iterdir())
    return Machine(_processors(), max(nodes, 1), memory, cards)


def _processors() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def why_not_listen(host: str, port: int) -> str | None:
    """The reason why no server can listen there, None if one can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as candidate:
            # As servers do: connections that are about to end do not count.
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            candidate.bind(address)
    except socket.gaierror as error:
        return f"--host {host} cannot be resolved: {error.strerror}"
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            return f"port {port} of {host} is taken by another program; give another with --port"
        reason = getattr(error, "strerror", None) or error
        return f"nothing can listen at {host}, port {port}: {reason}"
    return None


def is_loopback(host: str) -> bool:
    """True if only programs of this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
