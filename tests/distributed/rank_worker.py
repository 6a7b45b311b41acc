"""The worker process behind `run_on_ranks`: `python -m tests.distributed.rank_worker FILE_DESCRIPTOR`.

The main thread runs the calls; a second thread reads them, so that a worker hung in a collective still notices that
the tests have ended and leaves.
"""

import datetime
import faulthandler
import gc
import importlib
import importlib.util
import io
import logging
import os
import pickle
import queue
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any

SEED = 1234
COLLECT_AFTER = 10_000  # objects more than before: at Python's 700, collecting takes 8 % of a training of a tiny model


def _read_messages(connection: Connection, messages: "queue.Queue[dict[str, Any]]") -> None:
    try:
        while True:
            messages.put(pickle.loads(connection.recv_bytes()))
    except (EOFError, OSError):
        os._exit(0)


def _dumps(value: Any) -> bytes:
    """Pickle with every tensor as detached bytes on the CPU: no shared memory, no graph."""
    import torch

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, torch.Tensor):
                return obj.detach().cpu().clone().as_subclass(torch.Tensor).__reduce_ex__(pickle.HIGHEST_PROTOCOL)
            return NotImplemented

    buffer = io.BytesIO()
    Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _reset_seeds() -> None:
    import numpy
    import torch

    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


def _set_up(call: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    rank, world_size = call["rank"], call["world_size"]
    host, port, number = call["store"]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        # As of torchrun: the ranks meet at a store that is there. A port to be opened might be taken meanwhile.
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT=str(number),
    )
    _reset_seeds()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    # Longer than the call may take: the tests' own time limit reports more than gloo's would.
    patience = datetime.timedelta(seconds=call["timeout"] + 60)
    store = dist.PrefixStore(f"call_{number}", dist.TCPStore(host, port, is_master=False, timeout=patience))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)


def _tear_down(environment: dict[str, str]) -> None:
    """Leave nothing of a call behind: megatron-core's globals, the process group, the environment."""
    import torch.distributed as dist
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.tensor_parallel import random as megatron_random

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    megatron_random._CUDA_RNG_STATE_TRACKER = None
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def _run(call: dict[str, Any]) -> tuple[bool, bytes]:
    """Run one call: whether it succeeded, and the pickled report of what it returned or how it failed."""
    try:
        module, name = call["function"]
        _set_up(call)
        arguments, keywords = pickle.loads(call["arguments"])
        result = getattr(importlib.import_module(module), name)(*arguments, **keywords)
        return True, _dumps({"time": time.monotonic(), "result": result})
    except BaseException as error:  # SystemExit too: a rank that leaves has to say so
        report = {"time": time.monotonic(), "traceback": traceback.format_exc(), "exception": None}
        try:
            pickle.loads(_dumps(error))
            return False, _dumps({**report, "exception": error})
        except Exception:
            return False, _dumps(report)


def _share_gloo_device() -> None:
    """One device for all gloo groups that this process will make.

    By default each group has its own, whose thread wakes up a hundred times a second for as long as anything refers to
    the group: Megatron makes twenty groups a layout, and hundreds of such threads took more time than the tests.
    """
    from torch.distributed import ProcessGroupGloo

    gloo: Any = ProcessGroupGloo
    make = gloo.__init__
    devices: list[Any] = []

    def make_on_shared_device(self: Any, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        options = gloo._Options()
        if not devices:
            devices.append(gloo.create_default_device())
        options._devices, options._timeout = devices, timeout
        make(self, store, rank, size, options)

    gloo.__init__ = make_on_shared_device


def _prepare() -> None:
    """Import what every call needs, once."""
    # Megatron warns about every CUDA library that is not there.
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available() and importlib.util.find_spec("minitron_mcore.runtime.cpu_adapter"):
        importlib.import_module("minitron_mcore.runtime.cpu_adapter").install()
    importlib.import_module("megatron.core")
    _share_gloo_device()
    if os.environ.get("MINITRON_TEST_DEVICE") == "stand-in":
        importlib.import_module("tests.device_stand_in").install()


def main() -> None:
    faulthandler.enable()  # a crash in C++ says where it was
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # a training has SIGUSR1
    connection = Connection(int(sys.argv[1]))
    messages: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read_messages, args=(connection, messages), daemon=True).start()
    _prepare()
    gc.set_threshold(COLLECT_AFTER)
    environment = dict(os.environ)
    connection.send_bytes(b"ready")
    while True:
        call = messages.get()
        succeeded, report = _run(call)
        connection.send_bytes(report)
        # After a failure, closing this rank's connections wakes the peers that wait for it. After a success a peer may
        # still be inside a collective with this rank: wait until every rank has reported.
        if succeeded:
            messages.get()
            _tear_down(environment)
        else:
            _tear_down(environment)
            messages.get()


if __name__ == "__main__":
    main()
