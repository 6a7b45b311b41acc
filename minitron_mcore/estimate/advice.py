"""Which change of a single key saves most memory, and how much. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from minitron_mcore.distillation.config import LEAST_CHUNK, default_chunk_tokens
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.forecast import Forecast, bytes_text, forecast
from minitron_mcore.estimate.setting import Setting
from minitron_mcore.estimate.teacher import host_bytes
from minitron_mcore.layout import check_tensor_parallel, split_layers
from minitron_mcore.model.recompute import Recompute


def advice(found: Forecast, count: int = 3) -> list[str]:
    """The `count` changes of a single key that save most, each with its saving over the whole run, in words."""
    saved: dict[str, tuple[int, str]] = {}
    for key, words, changes in _changes(found.setting):
        changed = [replace(found.setting, **changes)]
        for shape in found.beside:
            is_elsewhere = key == "micro_batch_size" and shape.micro_batch_key != found.setting.micro_batch_key
            changed.append(shape if is_elsewhere else replace(shape, **changes))
        if not all(map(_holds, changed)):
            continue
        saving = found.total - max(forecast(shape).total for shape in changed)
        if saving > max(saved.get(key, (0, ""))[0], found.total // 100):
            saved[key] = (saving, f"{words} saves {bytes_text(saving)}")
    return [words for _, words in sorted(saved.values(), reverse=True)[:count]]


def _changes(setting: Setting) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(key, what to set, the changed fields of Setting) for every change of one key that does not change results."""
    s, section = setting, setting.section
    if s.micro_batch_size > 1:
        micro_key = s.micro_batch_key or f"{section}.micro_batch_size"
        yield "micro_batch_size", f"{micro_key}=1", {"micro_batch_size": 1}
    if (s.loss_chunk_tokens or default_chunk_tokens(s.tokens)) > LEAST_CHUNK:
        yield "chunk", f"{section}.loss_chunk_tokens={LEAST_CHUNK}", {"loss_chunk_tokens": LEAST_CHUNK}
    again = "at the cost of one more forward pass,"
    if s.recompute.granularity != "full":
        recompute = Recompute("full")
        yield "recompute", f"{section}.recompute_granularity=full, {again}", {"recompute": recompute}
    if s.teacher_trained and s.teacher_recompute.granularity != "full":
        yield "correct", f"correct.recompute_granularity=full, {again}", {"teacher_recompute": Recompute("full")}
    if s.teacher_trained and (s.teacher_chunk_tokens or default_chunk_tokens(s.tokens)) > LEAST_CHUNK:
        yield "correct chunk", f"correct.loss_chunk_tokens={LEAST_CHUNK}", {"teacher_chunk_tokens": LEAST_CHUNK}
    if s.teacher is not None and not s.teacher_trained:  # a trained teacher takes neither key
        yield from _teacher_changes(s)
    yield from _layouts(s)


def _teacher_changes(setting: Setting) -> Iterator[tuple[str, str, dict[str, Any]]]:
    s, window = setting, setting.parallel.pipeline
    if window < (s.teacher_window or s.microbatches):
        yield "window", f"{s.section}.teacher_window={window}", {"teacher_window": window}
    if s.data_parallel > 1:
        yield "placement", "teacher.placement=sharded", {"teacher_placement": "sharded"}
    offloaded = replace(s, teacher_placement="offloaded")
    if s.host_free is None or host_bytes(offloaded) <= s.host_free:
        yield "placement", "teacher.placement=offloaded", {"teacher_placement": "offloaded"}


def _layouts(setting: Setting) -> Iterator[tuple[str, str, dict[str, Any]]]:
    s, parallel = setting, setting.parallel
    parts = parallel.tensor * (2 * parallel.context if parallel.context > 1 else 1)
    if parallel.tensor > 1 and not parallel.sequence and s.sequence_length % parts == 0:
        yield "sequence", "parallel.sequence=true", {"parallel": replace(parallel, sequence=True)}
    if s.data_parallel == 1 or s.data_parallel % 2 == 0:
        ranks = "" if s.data_parallel > 1 else " on twice the ranks"
        for name in ("tensor", "pipeline"):
            wider = replace(parallel, **{name: 2 * getattr(parallel, name)})
            fields = {"parallel": wider, "data_parallel": s.data_parallel // 2 or 1}
            yield name, f"parallel.{name}={getattr(wider, name)}{ranks}", fields
    yield "data", "twice as many ranks at the same parallel.*", {"data_parallel": 2 * s.data_parallel}


def _holds(setting: Setting) -> bool:
    """Whether a run can have this setting."""
    models = [(setting.student, setting.parallel)]
    if setting.teacher is not None:
        models.append((setting.teacher, setting.teacher_layout))
    if setting.global_batch_size % (setting.micro_batch_size * setting.data_parallel):
        return False
    if setting.parallel.virtual_pipeline and setting.microbatches % setting.parallel.pipeline:
        return False
    try:
        for architecture, parallel in models:
            check_tensor_parallel(architecture, parallel.tensor)
            split_layers(architecture.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    except InputError:
        return False
    return True
