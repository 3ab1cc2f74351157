"""Where a model or tokenizer is: in a folder, in the Hub's cache on this machine, or on the Hub."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from flexmask.errors import DataError, did_you_mean, one_line

_CACHED = "models--"  # begins the name of a repository's folder in the cache


def check_source(source: str, what: str) -> None:
    """Raise DataError unless there is such a folder, or a repository in the cache or on the Hub.

    The Hub is asked once, and only for what is not in the cache. Without a network transformers
    asks six times, which takes half a minute.

    Args:
        source: a folder or hub id.
        what: is in it, such as "model".
    """
    if Path(source).exists():
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    folder = f"{source}: no such folder{_nearest(source, Path(HF_HUB_CACHE))}"
    try:
        url = hf_hub_url(source, "config.json")
    except HFValidationError:
        raise DataError(f"{folder}; name a {what}'s folder or hub id") from None
    snapshots = Path(HF_HUB_CACHE, _CACHED + source.replace("/", "--"), "snapshots")
    if snapshots.is_dir() and any(snapshots.iterdir()):
        return
    try:
        get_hf_file_metadata(url)
    except GatedRepoError:
        return  # loading it says how to get access
    except RepositoryNotFoundError:
        raise DataError(
            f"{folder}, and the Hub shows no {what} of that name; if it is a private one, log in "
            "with `hf auth login`"
        ) from None
    except HfHubHTTPError:
        return  # it has no config, or the Hub has a trouble that may pass
    except Exception as error:  # of the HTTP library, which is not the same in every version
        raise DataError(
            f"{folder}, nothing in {HF_HUB_CACHE}, and the Hub cannot be reached "
            f"({one_line(error)}); name a {what}'s folder, or copy what `hf download {source}` "
            "puts there from a machine with a network"
        ) from error


def _nearest(source: str, cache: Path) -> str:
    """The question whether a folder of a like name is meant, or a hub id in the cache."""
    parent, name = os.path.split(os.path.expanduser(source).rstrip("/"))
    while parent and not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    folders, cached = list[str](), list[str]()
    with suppress(OSError):
        folders = [entry.name for entry in os.scandir(parent or ".") if entry.is_dir()]
    with suppress(OSError):
        found = (entry.name for entry in os.scandir(cache) if entry.name.startswith(_CACHED))
        cached = [name.removeprefix(_CACHED).replace("--", "/") for name in found]
    return did_you_mean(name, folders, os.path.join(parent, "")) or did_you_mean(source, cached)
