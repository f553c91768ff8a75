"""A Ray cluster: reached or started, and the answers of its nodes before the work."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from erniequant.errors import ErnieQuantError, wrap_errors
from erniequant.quantization.ray_engine.matrices import SeenFile
from erniequant.quantization.ray_engine.nodes import Node, answers
from erniequant.quantization.ray_engine.worker import Answer, describe

ANSWER_SECONDS = 60.0
"""A node that has not answered by then is taken as it is when it does jobs: importing torch from a
slow disk takes half of that."""

_HOST_PORT = re.compile(r"[^/]+:\d+")


@contextmanager
def connected(address: str | None, cores: int) -> Iterator[None]:
    """Ray, connected to a cluster for as long as the context lasts.

    That is the one which this process is connected to already, and stays so, with jobs under way
    running to their end; else the one at
    ``address`` or in ``RAY_ADDRESS``; else one of ``cores`` cores that is started here.

    Raises:
        ErnieQuantError: there is none at the address, or none can be started.
    """
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", there):
            raise ErnieQuantError(
                f"this process is connected to the Ray cluster at {there}, not {address}"
            )
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if "://" in address:
        raise ErnieQuantError(
            f"{address} is an address for clients; run this on a machine of the cluster and give "
            "HOST:PORT"
        )
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    failure = f"cannot reach the Ray cluster at {address}"
    if address == "local":
        options |= {"num_cpus": cores, "include_dashboard": False}
        failure = "cannot start Ray here"
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    elif _HOST_PORT.fullmatch(address) and not answers(address):
        # Ray itself would try for minutes.
        raise ErnieQuantError(
            f"{failure}: nothing answers there; start one by 'ray start --head --port PORT', and "
            "give its HOST:PORT"
        )
    with _quiet():
        with wrap_errors(failure):
            ray.init(logging_level=logging.ERROR, **options)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from printing a lost node's log onto stdout, where results go; it has no option for
    that, and `Nodes` tells what a user needs."""
    module: Any = import_module("ray._private.worker")
    before = getattr(module, "print_to_stdstream", None)
    module.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        module.print_to_stdstream = before


def ask(nodes: list[Node], file: SeenFile | None) -> dict[Node, Answer]:
    """Answers of nodes; those that have none yet are left out. ``file``: see `describe`.

    Raises:
        ErnieQuantError: a node cannot run our code.
    """
    # Without a core, so that nodes answer that are busy with others' work.
    task = ray.remote(num_cpus=0)(describe)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        asked[task.options(scheduling_strategy=there).remote(file)] = node
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    answers = {}
    for reference in done:
        node = asked[reference]
        try:
            answers[node] = ray.get(reference)
        except RayTaskError as error:
            lines = str(error.cause or error).strip().splitlines()
            raise ErnieQuantError(
                f"the node {node.address} cannot run erniequant ({lines[-1]}); install the same "
                "version on all nodes"
            ) from error
        except RayError:
            continue  # the node is lost
    return answers
