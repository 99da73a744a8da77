"""What is asked of the Hugging Face hub, and whether it answers.

Its libraries try again for a minute and more, with a line for each try, where a machine has no network: it is asked
once a minute at most, with a short time limit, and where it does not answer they get only what is in the local cache.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from armorm.errors import ArmormError, CheckpointError
from armorm.files import embedded_names

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TYPO, _FOLDER_TYPO = 0.85, 0.75  # similarity of a name to that of an embedded model, or of a folder, as of difflib
_TIMEOUT = 10  # seconds


def _settings() -> list[Any]:
    """The modules whose `HF_HUB_OFFLINE` holds; `datasets` takes long to import, and only counts if it is."""
    import huggingface_hub.constants

    datasets = sys.modules.get("datasets")
    return [huggingface_hub.constants, *([datasets.config] if datasets is not None else [])]


def hub_answers() -> bool:
    """Whether the hub answers within seconds; asked at most once a minute, since a connection may come back."""
    return _answers(int(time.monotonic() // 60))


@lru_cache(maxsize=1)
def _answers(minute: int) -> bool:
    import ssl
    import urllib.error
    import urllib.request

    import huggingface_hub

    if any(place.HF_HUB_OFFLINE for place in _settings()):
        return False
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True  # it answered, if only with an error
    except urllib.error.URLError as error:  # (the hub's libraries have certificates of their own)
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


@contextmanager
def without_hub() -> Iterator[None]:
    """No requests to the hub within the block."""
    places = _settings()
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@contextmanager
def hub_if_it_answers(name: str | Path) -> Iterator[None]:
    """Within the block, files of a model come from the local cache where the hub does not answer.

    Args:
        name: of the model; for a folder nothing is asked.
    """
    if Path(name).exists() or hub_answers():
        yield
    else:
        with without_hub():
            yield


def not_loaded(name: str | Path, error: BaseException) -> str:
    """Why a model could not be loaded: the error, or that there is no hub to ask; with the folder that was meant."""
    if Path(name).exists():
        return str(error)
    if hub_answers():
        return f"{error}{_folder_meant(str(name))}"
    return f"no such folder{_folder_meant(str(name))}, not in the local cache, and the hub cannot be reached"


def require_spelling(name: str) -> None:
    """Check, before a hub is asked, that a name is not that of an armorm model with a typo.

    Raises:
        CheckpointError: with the name that was meant.
    """
    models = embedded_names()
    if name in models or "/" in name or Path(name).exists():
        return
    meant = difflib.get_close_matches(name, models, n=1, cutoff=_TYPO)
    if meant:
        raise CheckpointError(f"{name}: no such folder or model (did you mean {meant[0]}?)")


def require_folder(name: str, error: type[ArmormError] = CheckpointError) -> None:
    """Check, before a hub is asked, that a name that is no folder may be an id of the hub.

    Raises:
        ArmormError: of the given type, with the folder that was meant, if one is near.
    """
    if not (Path(name).exists() or name.endswith(".gguf") or _HUB_ID.fullmatch(name)):
        raise error(f"{name}: no such folder{_folder_meant(name)}")


def _folder_meant(name: str) -> str:
    """' (did you mean FOLDER?)' for a path whose last part is nearly the name of a folder, or an empty string."""
    path = Path(name)
    beside = [near.name for near in path.parent.glob("*") if near.is_dir()] if "/" in name or os.sep in name else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=_FOLDER_TYPO)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""
