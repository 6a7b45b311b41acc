"""The harness's tasks, loaded by the first rank: data sets from the hub or its cache, and a sentence where neither has
them. Importing this module imports the harness.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import datasets
import huggingface_hub.constants
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.harness.names import KEY, LOCAL, Asked
from minitron_mcore.files import first_line

WITH_BARS = ("lm_eval.api.model", "lm_eval.api.task", "lm_eval.models.huggingface", "lm_eval.api.metrics")
FORMATS = ("json", "csv", "parquet", "text", "arrow", "pandas", "xml")  # of files that a task names itself
CONNECT_SECONDS = 3.0
PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def load_tasks(
    asked: Sequence[Asked], task_folder: str | None, local: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The tasks as `lm_eval.evaluate` takes them: `tasks`, `groups` and `group_map` by name.

    local: the configuration of the tasks that are made here. The first rank calls. Raises InputError for a task whose
    data set is neither in the cache nor within reach, and for one that cannot be loaded.
    """
    folders = sorted({folder for each in asked for folder in each.folders})
    manager = TaskManager(include_path=[*folders, *([task_folder] if task_folder else [])], include_defaults=False)
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    is_offline = any(_asks_hub(each, manager) for each in asked) and not hub_within_reach()
    with offline() if is_offline else quiet():
        for each in asked:
            found = _load(each, manager, local, is_offline)
            for part, named in found.items():
                if part == "tasks" and (twice := sorted(named.keys() & loaded["tasks"].keys())):
                    raise InputError(KEY, each.name, f"asks once more for {twice[0]}", "name it once")
                loaded[part] |= named
            for task in found["tasks"].values():
                _set_shots(task, each.shots)
    return loaded


def _load(
    asked: Asked, manager: TaskManager, local: Mapping[str, Mapping[str, Any]], is_offline: bool
) -> Mapping[str, Any]:
    try:
        try:
            return manager.load([dict(local[asked.name]) if asked.name in local else asked.name])
        except KeyError:  # a group whose parts lie in other folders: now the whole index
            return TaskManager(include_path=manager.include_path).load([asked.name])
    except InputError:
        raise
    except Exception as error:  # the data set libraries raise whatever they met
        path = _data_set(asked, manager)
        if path and (is_offline or isinstance(error, OSError)):
            reason = "which is not in the cache, and the Hugging Face hub is out of reach"
            remedy = f"load it once where there is a network, or name {' or '.join(LOCAL)}, which need none"
            raise InputError(KEY, asked.name, f"needs the data set {path}, {reason}", remedy) from error
        remedy = "mend the task, or leave it out"
        raise InputError(KEY, asked.name, f"cannot be loaded: {first_line(error)}", remedy) from error


def _data_set(asked: Asked, manager: TaskManager) -> str | None:
    """The data set of a task, or of a group's first task that names one."""
    entry = manager.task_index.get(asked.name)
    config = (entry.cfg if entry else None) or {}
    if isinstance(path := config.get("dataset_path"), str):
        return path
    parts = config.get("task") if isinstance(config.get("task"), list) else sorted(entry.tags if entry else ())
    names = [part if isinstance(part, str) else part.get("task", "") for part in parts or ()]
    return next((path for name in names if name and (path := _data_set(Asked(name, None), manager))), None)


def _asks_hub(asked: Asked, manager: TaskManager) -> bool:
    path = None if asked.is_local else _data_set(asked, manager)
    return path is not None and path not in FORMATS and not os.path.exists(path)


def _set_shots(task: Task, shots: int | None) -> None:
    """As the harness's own command does: a task that is written for none stays so."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)


def hub_within_reach() -> bool:
    """Whether the Hugging Face hub can be asked, as far as a connection tells within seconds."""
    if huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in PROXIES):
        return True
    parts = urlsplit(huggingface_hub.constants.ENDPOINT)
    address, reached = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)), []

    def connect() -> None:
        try:
            socket.create_connection(address, CONNECT_SECONDS).close()
            reached.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)  # looking a name up takes as long as it likes
    thread.start()
    thread.join(CONNECT_SECONDS + 1)
    return bool(reached)


@contextmanager
def offline() -> Iterator[None]:
    """Within the `with`, the hub is not asked: without a network each question would be tried again for a minute."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        with quiet():
            yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


class _Silent(tqdm):
    def __init__(self, *words: Any, **named: Any) -> None:
        super().__init__(*words, **(named | {"disable": True}))


@contextmanager
def quiet() -> Iterator[None]:
    """Within the `with`, the harness and its libraries show no bars, and start no processes."""
    modules: list[Any] = [module for name in WITH_BARS if (module := sys.modules.get(name)) and hasattr(module, "tqdm")]
    before, bars = [module.tqdm for module in modules], datasets.are_progress_bars_disabled()
    multiprocessing = os.environ.get("DISABLE_MULTIPROC")
    try:
        for module in modules:
            module.tqdm = _Silent
        datasets.disable_progress_bars()
        os.environ["DISABLE_MULTIPROC"] = "1"  # a bootstrap would fork a process that holds a process group
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.tqdm = own
        if not bars:
            datasets.enable_progress_bars()
        if multiprocessing is None:
            os.environ.pop("DISABLE_MULTIPROC", None)
