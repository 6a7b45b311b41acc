"""The families there are: every module of this folder with a FAMILY, so that adding one is adding a file."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from minitron_mcore import families
from minitron_mcore.errors import InputError
from minitron_mcore.families.table import Family


@cache
def known_families() -> dict[str, Family]:
    """Families by their Hugging Face `model_type`, which is also their name in an Architecture."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.model_type: family for family in found}


def find_family(model_type: object, where: str) -> Family:
    """Raises InputError, naming `where` it was asked for, if there is no such family."""
    known = known_families()
    if not isinstance(model_type, str) or model_type not in known:
        remedy = f"choose one of {', '.join(sorted(known))}"
        raise InputError("model_type", model_type, f"in {where} is not known", remedy)
    return known[model_type]
