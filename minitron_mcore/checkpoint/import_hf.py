"""Hugging Face folder -> Megatron checkpoint at any layout; each rank reads the slices it will hold, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.families.find import find_family
from minitron_mcore.checkpoint.conversion import Unit, units
from minitron_mcore.families.table import fields_of
from minitron_mcore.checkpoint.sharding import sharded_parts
from minitron_mcore.checkpoint.store import save_state
from minitron_mcore.errors import InputError
from minitron_mcore.layout import check_tensor_parallel, local_shape, split_layers
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.start import Runtime

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(source: Path, make_vocab_size_divisible_by: int = 128) -> Architecture:
    """The Architecture that `config.json` in `source` describes, transformers' defaults filled in. Any rank calls.

    Raises InputError where there is no such file, or no family here for it.
    """
    path = source / "config.json"
    if not path.is_file():
        raise InputError(f"hf={source} holds no config.json: name a Hugging Face folder")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    family = find_family(given.get("model_type"), str(path))
    # transformers takes seconds to import; a folder that is none need not wait for it
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True).to_dict()
    except Exception as error:
        raise InputError(f"{path} is refused by transformers: {' '.join(str(error).split())}") from error
    fields = fields_of(family, config, str(path))
    divisor = {"make_vocab_size_divisible_by": make_vocab_size_divisible_by}
    try:
        return build_architecture({"family": family.model_type, **fields, **divisor})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def import_checkpoint(
    source: Path, target: Path, architecture: Architecture, parallel: ParallelConfig, runtime: Runtime
) -> None:
    """Write the weights of the Hugging Face folder `source` as iteration 0 of `target`, in their stored dtype.

    Every rank calls, after `use_layout(parallel)`. A rank holds its own shard and one tensor more. Raises InputError,
    naming file and tensor, where tensors are missing, left over, of another shape or cut off; nothing is written then.
    """
    check_tensor_parallel(architecture, parallel.tensor)
    stages = split_layers(architecture.num_layers, parallel.pipeline)
    wanted = units(find_family(architecture.family, f"hf={source}"), architecture)
    # Embedding on the first stage, final norm and output head on the last; replicas of a shard have nothing to write.
    stage = parallel_state.get_pipeline_model_parallel_rank()
    first, last = stage == 0, stage == parallel.pipeline - 1
    mine = [
        unit
        for unit in wanted
        if (unit.layer in stages[stage][0] if unit.layer is not None else first if _is_embedding(unit) else last)
        and parallel_state.get_data_parallel_rank() == 0
    ]
    save_state(target, 0, _read_shard(source, architecture, wanted, mine, parallel.tensor), runtime)


def _is_embedding(unit: Unit) -> bool:
    return unit.parameter.key.startswith("embedding.")


def _read_shard(
    source: Path, architecture: Architecture, wanted: list[Unit], mine: list[Unit], size: int
) -> dict[str, Any]:
    """This tensor-parallel rank's parts of `mine`, once the folder is seen to hold just what is `wanted`."""
    folder = SafetensorsFolder(source)
    folder.check(wanted, architecture)
    rank = parallel_state.get_tensor_model_parallel_rank()
    state: dict[str, Any] = {}
    for unit in mine:
        local = folder.read_part(unit, architecture, rank, size)
        state[f"{unit.parameter.key}@{unit.layer}"] = sharded_parts(
            unit.parameter,
            architecture,
            local,
            layer=unit.layer,
            tensor_rank=rank,
            tensor_size=size,
            data_rank=0,
        )
    return state


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, in one file or several with an index; read by slices."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.handles: dict[str, Any] = {}
        if (source / INDEX).is_file():
            try:
                self.places: dict[str, str] = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{source / INDEX} is no index of safetensors: it has no weight_map") from error
        elif (source / SINGLE).is_file():
            self.places = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise InputError(f"hf={source} holds neither {SINGLE} nor {INDEX}: only safetensors are read")

    def _open(self, name: str) -> Any:
        if name not in self.handles:
            path = self.source / name
            if not path.is_file():
                raise InputError(f"{path} is missing, though {INDEX} names it")
            try:
                self.handles[name] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} is no whole safetensors file: {error}") from error
        return self.handles[name]

    def _slice(self, name: str) -> Any:
        file = self.places[name]
        try:
            return self._open(file).get_slice(name)
        except SafetensorError as error:
            raise InputError(f"{self.source / file} holds no {name}, though {INDEX} says so") from error

    def check(self, wanted: list[Unit], architecture: Architecture) -> None:
        """Raise InputError unless the folder holds exactly what `wanted` needs, in its shapes."""
        shapes = {
            name: shape for unit in wanted for name, shape in zip(unit.names, unit.shapes(architecture), strict=True)
        }
        for name, shape in shapes.items():
            if name not in self.places:
                raise InputError(f"hf={self.source} holds no tensor {name}, which its config.json asks for")
            if (found := tuple(self._slice(name).get_shape())) != shape:
                raise InputError(
                    f"{self.source / self.places[name]}: {name} is of shape {found}, but config.json means {shape}"
                )
        # Older Llama folders carry their rotary frequencies, and tied heads may lie there twice; both are known.
        known = {"lm_head.weight"} if not architecture.untie_embeddings_and_output_weights else set()
        for name in self.places:
            if name not in shapes and name not in known and not name.endswith("rotary_emb.inv_freq"):
                raise InputError(
                    f"{self.source / self.places[name]} holds a tensor {name}, which a "
                    f"{architecture.family} model does not have"
                )

    def read_part(self, unit: Unit, architecture: Architecture, rank: int, size: int) -> torch.Tensor:
        """Tensor-parallel `rank`'s part of a checkpoint tensor [layout.local_shape], vocabulary padding as zeros."""
        axis = unit.parameter.shard_axis
        parts = []
        for name, shape in zip(unit.names, unit.shapes(architecture), strict=True):
            if axis is None:
                parts.append(self._slice(name)[:])
                continue
            full = architecture.padded_vocab_size if "vocab" in unit.parameter.axes else shape[axis]
            bounds = slice(min(rank * full // size, shape[axis]), min((rank + 1) * full // size, shape[axis]))
            parts.append(self._slice(name)[(slice(None),) * axis + (bounds,)])
        local = unit.layout.join(parts, architecture)
        expected = local_shape(unit.parameter, architecture, size)
        if "vocab" in unit.parameter.axes and local.shape[0] < expected[0]:
            local = torch.cat([local, local.new_zeros(expected[0] - local.shape[0], *expected[1:])])
        assert tuple(local.shape) == expected, (unit, local.shape)
        return local.contiguous()
