"""Make the Auto classes of transformers know armorm models after `import armorm`, without importing transformers.

In:  nothing; called once by the package.
Out: `AutoConfig` and `AutoModelForSequenceClassification` resolve `model_type: armorm`.

transformers and torch take seconds to import, which a command that needs neither should not wait for. So
the registration waits for the moment when transformers' auto modules are loaded, by whomever: the config's
and the models' one are loaded apart.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

# Each auto module of transformers, and the module of ours that registers with it when it is imported.
_REGISTRARS = {
    "transformers.models.auto.configuration_auto": "armorm.model.configuration",
    "transformers.models.auto.modeling_auto": "armorm.model.modeling",
}


def register_with_transformers() -> None:
    """Register now with the auto modules that are loaded, and with the others as soon as they are."""
    for auto, registrar in _REGISTRARS.items():
        finder = _AutoFinder(auto, registrar)
        if auto in sys.modules:
            importlib.import_module(registrar)
        elif finder not in sys.meta_path:
            sys.meta_path.insert(0, finder)


@dataclass(frozen=True)
class _AutoFinder(importlib.abc.MetaPathFinder):
    """Sees an auto module being imported, and lets its loader register once it has run."""

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
        """Run the auto module, then register. (Where our own import loads it, that import is under way already.)"""
        self.loader.exec_module(module)
        importlib.import_module(self.registrar)
