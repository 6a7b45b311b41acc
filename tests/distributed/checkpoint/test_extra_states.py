"""What Transformer Engine's modules keep beside their weights in fp8 (scales and their history, pickled into bytes) is
in no checkpoint written here, and in the way of none that is read: a run goes on with it and without it.

Modules of megatron-core's local layers give here what Transformer Engine's give: a buffer (1.x) or bytes in a tensor.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from minitron_mcore.checkpoint.unpickle import read_metadata
from tests.distributed.models import assemble, start_layout, tiny
from tests.distributed.ranks import run_on_ranks
from tests.distributed.training.test_resume import CUT, STEPS, cut_off, fit_on_rank

MARK = b"amax_history of linear_fc2"


def as_engine(form: str) -> Any:
    """Within the `with`, linear_proj and linear_fc2 have an extra state, and refuse one that they did not give."""
    from megatron.core.tensor_parallel import RowParallelLinear

    content = pickle.dumps({"recipe": "DelayedScaling", "scale_fwd": [1.0], "mark": MARK})

    def get_extra_state(self: Any) -> Any:
        return io.BytesIO(content) if form == "buffer" else torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def set_extra_state(self: Any, state: Any) -> None:
        assert state is None, "which megatron-core fills in, and Transformer Engine passes over"

    return mock.patch.multiple(RowParallelLinear, get_extra_state=get_extra_state, set_extra_state=set_extra_state)


def runs(root: Path) -> dict[str, Any]:
    """A run with extra states as buffers, its second half without them, and from there with them as bytes."""
    with as_engine("buffer"):
        found = {"with": fit_on_rank({}, 1, str(root / "with"), "bf16")}
    cut_off(root / "with", root / "without")
    found["without"] = fit_on_rank({}, 1, str(root / "without"), "bf16")
    cut_off(root / "without", root / "again")
    with as_engine("bytes"):
        found["again"] = fit_on_rank({}, 1, str(root / "again"), "bf16")
    found["read"] = read_foreign(root)
    return found


def read_foreign(root: Path) -> dict[str, bool]:
    """Weights of a checkpoint in which extra states were stored with their content, as Megatron-LM does."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.reader import TensorReader
    from minitron_mcore.checkpoint.store import as_chunks, load_weights, model_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize, named_parameters

    layout, architecture = start_layout({}, 1), tiny("llama")
    (model,) = build_model(architecture, layout, "bf16")
    initialize([model], architecture, seed=11)
    content = pickle.dumps({"mark": MARK})
    state: dict[str, Any] = model_state(as_chunks([model]))
    state["extra"] = {
        str(layer): ShardedObject("decoder.layers.mlp.linear_fc1._extra_state", io.BytesIO(content), (4,), (layer,))
        for layer in range(4)
    }
    place = root / "foreign" / "iter_0000007"
    place.mkdir(parents=True)
    dist_checkpointing.save(state, str(place))
    (root / "foreign" / "latest_checkpointed_iteration.txt").write_text("7")
    write_description(root / "foreign", architecture, lineage={}, recipe="", save_tokenizer=None)
    (other,) = build_model(architecture, layout, "bf16")
    load_weights(root / "foreign", 7, as_chunks([other]), architecture)
    pairs = zip(named_parameters(model), named_parameters(other), strict=True)
    reader = TensorReader(root / "foreign", 7, architecture)
    return {
        "loaded": all(torch.equal(ours[2], theirs[2]) for ours, theirs in pairs),
        "readable": reader.dtype("decoder.layers.mlp.linear_fc1.weight", 0) is torch.bfloat16,
        "stored": any(MARK in file.read_bytes() for file in place.iterdir()),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extra_states")


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    return run_on_ranks(runs, 1, root)[0]


def test_a_run_goes_on_with_and_without(found: dict[str, Any]) -> None:
    """Bit for bit: what is saved is weights, optimizer and progress alone."""
    for name in ("without", "again"):
        last = range(CUT + 1, STEPS + 1)
        assert [found[name]["history"][step] for step in last] == [found["with"]["history"][step] for step in last]
        ours, theirs = (assemble([found[each]["weights"]], tiny("llama")) for each in (name, "with"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_no_checkpoint_holds_them(root: Path, found: dict[str, Any]) -> None:
    """The same entries, in plain types, as of a run that has none."""
    known = [read_metadata(root / name / f"iter_{STEPS:07d}").state_dict_metadata for name in ("with", "without")]
    assert known[0].keys() == known[1].keys()
    types = {value.properties.dtype for value in known[0].values() if hasattr(value, "properties")}
    assert types == {torch.bfloat16, torch.float32}
    for name in ("with", "again"):
        place = root / name / f"iter_{STEPS:07d}"
        assert not any(MARK in file.read_bytes() for file in place.iterdir() if file.is_file())


def test_one_that_holds_them_is_read(found: dict[str, Any]) -> None:
    assert found["read"] == {"loaded": True, "readable": True, "stored": True}
