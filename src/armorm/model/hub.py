"""A saved model to the Hub.

In:  the folder that a model was saved to, the id of a repository.
Out: the folder's files in that repository, as one commit. Nothing else in the package writes to the network.
"""

from __future__ import annotations

from pathlib import Path


def require_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the id of a repository, before anything is saved or sent.

    Raises:
        ValueError: saying what is wrong with it.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)


def files_to_send(folder: Path) -> list[tuple[str, int]]:
    """Name and size in bytes of every file that an upload of the folder sends."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Send a folder; a repository or branch that does not exist is created.

    Args:
        private: whether a new repository is private; by default as its owner has it.
        token: by default the one that `hf auth login` keeps.
        revision: branch; by default `main`.

    Returns:
        the address of the commit.

    Raises:
        OSError: as huggingface_hub has it, where the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    message = commit_message or "Upload reward model"
    return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message).commit_url
