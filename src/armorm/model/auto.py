"""Register armorm models with the Auto classes of transformers on `import armorm`, without importing transformers.

transformers and torch take seconds to import, and many commands need neither. So registration happens when the auto
modules of transformers are loaded, by anyone: the one for configs and the one for models are loaded separately.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

# Each auto module of transformers, and the module that registers with it on import.
_REGISTRARS = {
    "transformers.models.auto.configuration_auto": "armorm.model.configuration",
    "transformers.models.auto.modeling_auto": "armorm.model.modeling",
}


def register_with_transformers() -> None:
    """Register with the auto modules that are loaded now, and with the others when they are loaded."""
    for auto, registrar in _REGISTRARS.items():
        finder = _AutoFinder(auto, registrar)
        if auto in sys.modules:
            importlib.import_module(registrar)
        elif finder not in sys.meta_path:
            sys.meta_path.insert(0, finder)


@dataclass(frozen=True)
class _AutoFinder(importlib.abc.MetaPathFinder):
    """Finds an auto module with a loader that registers after running it."""

    auto: str
    registrar: str

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.auto:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self.registrar)
        return spec


@dataclass(frozen=True)
class _RegisteringLoader(importlib.abc.Loader):
    loader: importlib.abc.Loader
    registrar: str

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the auto module, then register (a no-op if the registrar itself is importing it)."""
        self.loader.exec_module(module)
        importlib.import_module(self.registrar)
