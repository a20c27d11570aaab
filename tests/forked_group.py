"""Processes that train together, as torchrun starts them: forks of one that has imported it all."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch._dynamo  # noqa: F401 (it takes seconds)
import torch.distributed as dist

__all__ = ["run_together"]


def run_together(count: int, train: Callable[[], None]) -> None:
    """Run a function in processes of one group (gloo); ends this one where one of them fails.

    Args:
        count: How many processes.
        train: The function. Before it is called the process group is there, and torchrun's
            variables are.

    Raises:
        SystemExit: A process has failed, and the others were killed.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_run, args=(rank, count, listening, train)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    running = {process.sentinel: process for process in processes}
    while running:
        ended = {sentinel for sentinel in wait([*running]) if isinstance(sentinel, int)}
        if any([running.pop(sentinel).exitcode for sentinel in ended]):
            for process in running.values():
                process.kill()
    listening.close()
    if codes := [process.exitcode for process in processes if process.exitcode]:
        sys.exit(f"exit codes of {count} processes: {codes}")


def _run(rank: int, count: int, listening: socket.socket, train: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    host, port = listening.getsockname()
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "forked"}
    store = dist.TCPStore(  # type: ignore[attr-defined]
        *(host, port, count, rank == 0),
        timeout=timedelta(minutes=5),
        master_listen_fd=listening.detach() if rank == 0 else None,
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    train()
    dist.barrier()
    dist.destroy_process_group()
