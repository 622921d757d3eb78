"""Files of the Hugging Face hub, or the copies of them that were downloaded before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["download", "is_id"]


def is_id(name: str) -> bool:
    """Whether a repository could be called that: "bert-base-uncased", "Salesforce/blip-vqa-base"."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def download(name: str, patterns: Sequence[str]) -> Path:
    """The folder with those files of a repository that match a pattern. One attempt: offline it takes no time.

    Raises:
        ValueError: no such repository, or no way to it and no earlier copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except RepositoryNotFoundError as error:
        raise ValueError(f"{name}: neither a path nor a repository of the hub that one may read") from error
    except Exception as error:  # connections, HTTP, settings of the hub, disks: each with a kind of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name}: neither a path, nor reachable on the hub, nor downloaded before: {reason}"
        ) from error
