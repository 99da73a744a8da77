"""Fixtures for many tests: the embedded backbone, a small training run, and the real data if available."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.shared_folders import shared_folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """Tests have a cache of their own, in which `armorm-small` stays converted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARMORM_CACHE", str(Path(__file__).parents[1] / "build" / "test-cache"))
        yield


# As of the command line (`armorm/__main__.py`), for the same reason.
gc.set_threshold(50_000, 20, 20)

# A shell ignores SIGINT for what it runs in the background, and the programs that tests start and interrupt inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of garbage collection, which would look through all of it every time."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Leave all of it out of the collections at exit, too."""
    gc.freeze()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real sets (docs/data.md); tests that need it are skipped where it is absent."""
    root = Path(os.environ.get("ARMORM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "ratings").is_dir():
        pytest.skip(f"no real data at {root} (set ARMORM_DATA)")
    return root


@pytest.fixture(scope="session")
def tiny_backbone():
    """The embedded backbone in float32."""
    from armorm.backbone.decoder import Backbone

    return Backbone.load("armorm-tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def small_backbone_path() -> Path:
    """Folder of `armorm-small`; tests that use it are skipped where its weights are absent."""
    from armorm.backbone.locate import backbone_path
    from armorm.errors import BackboneError

    try:
        return Path(backbone_path("armorm-small"))
    except BackboneError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def one_layer_backbone(tmp_path_factory) -> Path:
    """A folder with the first layer of the embedded backbone, in float32, and its tokenizer: a fifth of its cost."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from armorm.files import EMBEDDED_BACKBONE, embedded_path

    def write(folder: Path) -> None:
        model = AutoModel.from_pretrained(embedded_path(EMBEDDED_BACKBONE), dtype=torch.float32)
        model.layers, model.config.num_hidden_layers = model.layers[:1], 1
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(embedded_path(EMBEDDED_BACKBONE)).save_pretrained(folder)

    return shared_folder(tmp_path_factory, "backbone", write)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A folder with a random Llama of two layers, its language head, and the embedded tokenizer."""
    from tests.helpers.backbones import save_backbone

    return shared_folder(tmp_path_factory, "llama", save_backbone)


@pytest.fixture(scope="session")
def small_recipe(one_layer_backbone, tmp_path_factory):
    """A recipe on a small part of the generated corpus: 48 prompts, 288 responses, the embedded backbone's first layer."""
    from armorm import Recipe
    from armorm.data.synthetic import RECIPE, generate, write_corpus

    rows = [row for row in generate(0) if row.prompt % 5 == 0]
    folder = shared_folder(tmp_path_factory, "corpus", lambda folder: write_corpus(folder, rows, seed=0))
    text = RECIPE.replace("runs/demo/data", str(folder))
    return Recipe.from_text(
        text,
        [
            "name=small",
            "gating.steps=100",
            "gating.hidden_size=16",
            "backbone.dtype=float32",
            f"backbone.model={one_layer_backbone}",
        ],
    )


@pytest.fixture(scope="session")
def small_run(small_recipe, tmp_path_factory):
    """The folder of a finished run of `small_recipe`; to be read only."""
    from armorm import train

    return shared_folder(tmp_path_factory, "run", lambda folder: train(small_recipe, folder, quiet=True))


@pytest.fixture
def small_features(small_run, tmp_path) -> Path:
    """A copy of the features of `small_run`, which a test may add to."""
    return shutil.copytree(small_run / "work" / "features", tmp_path / "small-features")
