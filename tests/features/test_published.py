"""Feature files of the published scripts are read, and rejected by tensor name otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from armorm.errors import StoreError
from armorm.features.published import read_published


def test_shards_of_labelled_embeddings_continue_each_other(tmp_path: Path) -> None:
    x, y = torch.arange(12.0).reshape(4, 3), torch.arange(8.0).reshape(4, 2)
    for i in range(2):
        part = {"embeddings": x[2 * i : 2 * i + 2].bfloat16(), "labels": y[2 * i : 2 * i + 2]}
        save_file({k: v.contiguous() for k, v in part.items()}, tmp_path / f"{i}.safetensors")
    found = read_published(sorted(tmp_path.glob("*.safetensors")))
    assert found["embeddings"].tolist() == x.tolist()
    assert found["labels"].tolist() == y.tolist()
    assert set(found) == {"embeddings", "labels"}


@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 3)])
def test_pairs_come_with_their_prompts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file({"embeddings": torch.ones(2, 2, 3), "prompt_embeddings": torch.full(shape, 2.0)}, tmp_path / "a")
    found = read_published([tmp_path / "a"])
    assert found["prompt_embeddings"].shape == shape and (found["prompt_embeddings"] == 2).all()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"labels": torch.ones(2, 1)}, "'embeddings': found no such tensor"),
        ({"embeddings": torch.ones(2, 3), "labels": torch.ones(1, 1)}, r"'labels': found \(1, 1\), expected \(2, k\)"),
        ({"embeddings": torch.ones(2, 2, 3)}, "'prompt_embeddings': found no such tensor"),
        ({"embeddings": torch.ones(2, 3).double(), "labels": torch.ones(2, 1)}, "found torch.float64"),
    ],
)
def test_another_layout_is_rejected_by_tensor(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "a")
    with pytest.raises(StoreError, match=message):
        read_published([tmp_path / "a"])
