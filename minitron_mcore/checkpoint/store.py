"""Save and load sharded checkpoints through megatron-core's dist_checkpointing (torch_dist).

The tensors of layout.py are stored. Instead of a layer spec's own `_extra_state` objects, empty ones are stored that
every spec accepts (way_back.py), so that one checkpoint loads under all.
"""

from __future__ import annotations

import copy
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import check_architecture, iteration_folder
from minitron_mcore.checkpoint.iteration import UnfinishedIteration, write_iteration
from minitron_mcore.checkpoint.manifest import StoredPiece, stored_piece
from minitron_mcore.checkpoint.reader import TensorReader
from minitron_mcore.checkpoint.unpickle import read_common, read_metadata, refuse_objects
from minitron_mcore.checkpoint.way_back import extra_states
from minitron_mcore.checkpoint.writer import pieces_of
from minitron_mcore.errors import InputError, StorageError
from minitron_mcore.layout import parameter_table
from minitron_mcore.model.gpt import LanguageModel, build_model, unwrap
from minitron_mcore.model.initialize import Rows, named_parameters
from minitron_mcore.runtime.agree import all_come, all_or_none
from minitron_mcore.runtime.background import Background
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.repairs import (
    load_optimizer_state,
    optimizer_state,
    own_storage,
    plan_save,
    save_without_helper,
    write_errors,
)
from minitron_mcore.runtime.start import Runtime

SMALL = 1 << 28  # bytes of a rank, about a second's work of one process
HINT = "; what was saved before is whole: make room, and the same command goes on from there"


def model_state(chunks: list[torch.nn.Module]) -> dict[str, ShardedStateDict]:
    """Sharded tensors of this rank's chunks: {"model": …} or {"model0": …, "model1": …} when interleaved."""
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    state = {}
    for name, chunk in zip(names, chunks, strict=True):
        tensors = unwrap(chunk).sharded_state_dict()
        state[name] = {key: value for key, value in tensors.items() if not key.endswith("_extra_state")}
    return state


def save_state(
    folder: Path,
    iteration: int,
    state: ShardedStateDict,
    runtime: Runtime,
    architecture: Architecture | None = None,
) -> None:
    """Write `state` as a whole iteration of `folder`, or nothing of it. All ranks call.

    With an `architecture`, what other projects on megatron-core need to load it is written too (way_back.py).

    Written to a temporary folder, which is renamed when every rank is done, with a manifest of the tensors' checksums.
    Raises StorageError, on every rank, if the disk is full: the unfinished iteration is gone then, the others whole.
    """
    sharded, common, tensors, processes = _prepared(state, runtime, architecture)

    def write(temporary: Path) -> list[StoredPiece]:
        with write_errors() as met:
            _SaveOrTell(met, processes).save(sharded, temporary)
        # Those of which this rank is the main replica, optimizer included.
        return [
            stored_piece(piece.key, piece.offsets, part.data.reshape(piece.shape))
            for part in tensors
            for piece in pieces_of([part])
        ]

    write_iteration(folder, iteration, runtime, write, common, architecture, hint=HINT)


class SaveUnderWay:
    """`save_state`, except that a forked process writes what the memory holds now, while this one goes on.

    All ranks make it, and all call `finish` later. Until then the iteration lies in its temporary folder. On a GPU the
    state is copied to the host first. Raises as `save_state` does if the folder cannot be made.
    """

    DONE, WRITING, FAILED = range(3)

    def __init__(
        self,
        folder: Path,
        iteration: int,
        state: ShardedStateDict,
        runtime: Runtime,
        architecture: Architecture | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """then: what `finish` does at the end, on all ranks."""
        self.iteration, self._then = iteration, then
        self._writing: Background[tuple[list[WriteResult], list[StoredPiece]]] | None = None
        self._failure: Exception | None = None
        sharded, common, tensors, processes = _prepared(state, runtime, architecture)
        order = {part.key: number for number, part in enumerate(tensors)}  # weights come first
        common = copy.deepcopy(common)  # written last, when training has gone on
        self._made = UnfinishedIteration(folder, iteration, runtime, common, architecture, hint=HINT)
        self._strategy = _SaveOrTell([], processes)
        with self._made.whole_or_gone():
            self._made.begin()
            request = plan_save(self._strategy, sharded, self._made.temporary)
            if request.async_fn is not None:
                self._fork(request, order)
        self._strategy.forget_tensors()

    def _fork(self, request: AsyncRequest, order: dict[str, int]) -> None:
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = request.preload_fn()

        def write() -> tuple[list[WriteResult], list[StoredPiece]]:
            with write_errors() as met:
                self._strategy.met = met
                request.async_fn(*arguments, **request.async_fn_kwargs)
                results = self._strategy.written()
            pieces = [
                stored_piece(item.index.fqn, item.index.offset, tensor)
                for _, _, (_, tensors) in arguments[1]
                for item, tensor in tensors
            ]
            return results, sorted(pieces, key=lambda piece: order[piece.key])

        try:
            self._writing = Background(write)
        except OSError as error:
            self._failure = error

    @property
    def state(self) -> int:
        """How far this rank is: DONE, WRITING or FAILED; the largest of the ranks' is that of the save."""
        if self._failure is None and self._writing is not None:
            if self._writing.is_running:
                return self.WRITING
            self._wait()
        return self.DONE if self._failure is None else self.FAILED

    def _wait(self) -> tuple[list[WriteResult], list[StoredPiece]]:
        """What this rank has written; nothing after a failure, which is kept."""
        try:
            if self._writing is not None and self._failure is None:
                return self._writing.result()
        except ChildProcessError as error:
            rule = f"cannot be written: of the process that wrote rank {self._made.runtime.rank}'s part, {error}{HINT}"
            self._failure = StorageError("", self._made.folder, rule)
        except Exception as error:
            self._failure = error
        return [], []

    def finish(self) -> None:
        """Wait until every rank has written, and make the iteration whole. All ranks call. Raises as `save_state`."""
        results, pieces = self._wait()
        all_come()  # not in a collective, which would run into its time limit

        def written() -> list[WriteResult]:
            if self._failure is not None:
                raise self._failure
            return results

        with self._made.whole_or_gone():
            self._strategy.publish(written)
            self._made.finish(pieces)
        self._then()

    def stop(self) -> None:
        """End this rank's part, if it still runs: nothing is left of the iteration, and `finish` fails on all ranks."""
        if self._writing is not None and self._writing.is_running:
            self._writing.stop()
            # No OSError: what is told is why another rank failed, if one did.
            self._failure = self._failure or RuntimeError("the checkpoint was given up")
        if self._made.runtime.is_main:
            shutil.rmtree(self._made.temporary, ignore_errors=True)


def _prepared(
    state: ShardedStateDict, runtime: Runtime, architecture: Architecture | None
) -> tuple[ShardedStateDict, dict[str, Any], list[ShardedTensor], int]:
    """(what is sharded, what is common, the sharded tensors, how many processes are to write this rank's part)."""
    save_without_helper()
    logging.getLogger(FileSystemWriterAsync.__module__).setLevel(logging.CRITICAL)  # what it logs is raised, too
    if architecture is not None and runtime.is_main:
        state["extra_states"] = {value.unique_key: value for value in extra_states(architecture)}
    sharded, common = save_preprocess(state)
    tensors = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    for part in tensors:
        part.data = own_storage(part.data)
    return sharded, common, tensors, 2 if sum(part.data.nbytes for part in tensors) > SMALL else 1


class _SaveOrTell(TorchDistSaveShardedStrategy):
    """megatron-core's own strategy, except that a failure on one rank is raised on all. There, the others wait forever
    if the first rank cannot write the metadata, and only the first rank learns of their failures."""

    def __init__(self, met: list[Exception], processes: int) -> None:
        """`met`: where `write_errors` puts what goes wrong. processes: that write this rank's part, each a fork."""
        super().__init__("torch_dist", 1, thread_count=processes)
        self.met = met

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, save_state_dict_ret: Any, *how: Any
    ) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, *how)
        self.writer, (_, self.metadata, self.ranks) = writer, save_state_dict_ret
        return request._replace(finalize_fns=[lambda: self.publish(self.written)])

    def written(self) -> list[WriteResult]:
        """What was written, in this process; raises what went wrong."""
        found = self.writer.retrieve_write_results()
        if isinstance(found, tuple):  # an error and its traceback; the system's own, where there is one, is below
            raise next(iter(self.met), None) or found[0].__cause__ or found[0]
        return found

    def publish(self, written: Callable[[], list[WriteResult]]) -> None:
        """Write the metadata, from every rank's `written`. All ranks call; raises on all where it does on one."""
        self.ranks.all_reduce("write", written, lambda results: self.writer.finish(self.metadata, results))

    def forget_tensors(self) -> None:
        """Let go of what another process writes."""
        self.writer.write_buckets = []


def load_state(folder: Path, iteration: int, state: ShardedStateDict) -> dict[str, Any]:
    """Read what `state` asks for from a finished iteration of a run of this project; all ranks call.

    Raises InputError if its files are missing, cut off or of another model, or ask for code to be run.
    """
    source = iteration_folder(folder, iteration)
    metadata = read_metadata(source)
    read_common(source, metadata)
    refuse_objects(source, metadata)
    try:
        return dist_checkpointing.load(state, str(source))
    except CheckpointException as error:  # torch's, with each rank's failure; not a subclass of Exception
        cause: BaseException = next(iter(error.failures.values()))[0]
    except (CheckpointingException, OSError, EOFError, pickle.UnpicklingError) as error:
        cause = error
    words = " ".join(str(cause).split()) or type(cause).__name__
    raise InputError("", source, f"is damaged or of another model ({words})", "restore it, or name another") from cause


def load_weights(
    folder: Path,
    iteration: int,
    chunks: list[torch.nn.Module],
    architecture: Architecture,
    rows: Rows = named_parameters,
) -> None:
    """Fill the chunks from a checkpoint saved at any layout, by this project or by another on megatron-core.

    All ranks call; each reads only its parts, straight into its parameters, or into what `rows` gives for them. Raises
    InputError, on every rank, if the checkpoint is of another architecture or damaged.
    """

    def fill_here() -> None:
        check_architecture(folder, architecture)
        reader = TensorReader(folder, iteration, architecture)
        table = {parameter.key: parameter for parameter in parameter_table(architecture)}
        for model in map(unwrap, chunks):
            group = model.tp_group  # of this model: a teacher may have groups of its own
            for key, layer, tensor in rows(model):
                reader.fill_part(tensor, table[key], architecture, layer, group.rank(), group.size())

    all_or_none(fill_here)


def load_model(
    place: tuple[Path, int], architecture: Architecture, parallel: ParallelConfig, precision: str
) -> list[LanguageModel]:
    """The model at `place`, (folder, iteration), to be read and not trained. Else as `load_weights`."""
    chunks = build_model(architecture, parallel, precision, trainable=False)
    load_weights(*place, as_chunks(chunks), architecture)
    return chunks


def training_state(
    chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    progress: dict[str, Any],
    *,
    is_loading: bool,
) -> ShardedStateDict:
    """Everything a run resumes from: weights, optimizer, schedule, and `progress` (plain numbers)."""
    model = model_state(chunks)
    tensors: Any = next(iter(model.values())) if len(model) == 1 else dict(enumerate(model.values()))
    return {
        **model,
        "optimizer": optimizer_state(optimizer, tensors, is_loading=is_loading),
        "opt_param_scheduler": scheduler.state_dict(),
        "progress": progress,
    }


def load_training_state(
    folder: Path,
    iteration: int,
    chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> dict[str, Any]:
    """Resume in place from a checkpoint saved at any layout; returns its `progress`. All ranks call."""
    state = training_state(chunks, optimizer, scheduler, {}, is_loading=True)
    loaded = load_state(folder, iteration, state)
    load_models(chunks, loaded)
    load_optimizer_state(optimizer, loaded["optimizer"])
    scheduler.load_state_dict(loaded["opt_param_scheduler"])
    return loaded["progress"]


def load_models(chunks: list[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Every weight of this rank's chunks, in place, by the names of `model_state`."""
    for name, chunk in zip(model_state(chunks), chunks, strict=True):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[name], strict=False)
        missing = [key for key in missing if not key.endswith("_extra_state")]
        assert not missing and not unexpected, (missing, unexpected)


def as_chunks(models: list[LanguageModel]) -> list[torch.nn.Module]:
    """The same list, under the wider type that Megatron's wrappers need."""
    return list(models)
