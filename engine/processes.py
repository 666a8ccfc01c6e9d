"""More than one GPU: `accelerate launch --num_processes 2 train.py ...`, or torchrun.

In one process each function here does nothing, or gives back what it
is given. In several, each plays its share of the episodes. The episodes are gathered, so
advantages, novelty and memories are the same everywhere. Each computes the gradient of its share of
an optimiser step. The gradients are added up, so the weights are the same everywhere.
"""

import functools
import os
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

MEETING = timedelta(minutes=2)  # a launcher starts all at once
PATIENCE = timedelta(hours=1)  # with a slower process; the launcher ends all if one ends

rank = 0  # the number of this process; 0 alone writes files and shows progress
count = 1  # of processes
store = None  # a key-value store that all share
lost = "another process was lost; the same launch with --resume continues"


def start():
    """Join the other processes, if any; each takes a GPU. Raises RuntimeError or ValueError."""
    global rank, count, store
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started == 1:
        return
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=MEETING))
        store.set(f"process {rank}", "is here")
        store.wait([f"process {other}" for other in range(count)], MEETING)
        backend = take_gpu()
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    except RuntimeError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RuntimeError(
            f"the {started} processes did not meet at {address}; is the port another program's, or "
            "a process missing? --main_process_port (torchrun: --master-port) takes another port"
        ) from error


def take_gpu():
    """Use this process's own GPU -> the backend of torch.distributed."""
    if not torch.cuda.is_available():
        return "gloo"
    local = int(os.environ.get("LOCAL_RANK", 0))
    here = torch.cuda.device_count()
    if local >= here:
        raise ValueError(f"more processes than GPUs; --num_processes {here} at most")
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def say(line, file=None):
    """Print why the run ends, unless another process has printed its reason.

    Returns if it was printed.
    """
    if count > 1:
        with suppress(RuntimeError):  # the store may be lost, too
            if store.add("said", 1) > 1:
                return False
    tqdm.write(line, file=file)
    return True


# --- Collectives ----------------------------------------------------------------------------------
@contextmanager
def together():
    """Report a lost process."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(lost) from error


def share(items):
    """This process's share: every n-th item, for n processes."""
    return items[rank::count]


def gather(items):
    """The lists of all processes, one after the other."""
    if count == 1:
        return items
    lists = [None] * count
    with together():
        dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def add_gradients(parameters):
    """Give every process the sum of the gradients of all."""
    if count == 1:
        return
    with together():
        for parameter in parameters:
            if parameter.grad is None:  # its share of the step was empty
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def from_first(function, *args):
    """Call it in the first process; all wait, and get what it returns."""
    return gather([function(*args)] if rank == 0 else [])[0]


def only_first(function):
    """A function that runs in the first process only."""

    @functools.wraps(function)
    def called(*args, **kwargs):
        if rank == 0:
            return function(*args, **kwargs)

    return called
