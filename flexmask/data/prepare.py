"""A folder of shards, begun, gone on with, and finished."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import flexmask
from flexmask.data.files import OnBadLine, check_on_bad_line, find_data_files
from flexmask.data.fingerprint import tokenizer_fingerprint
from flexmask.data.prepare_pool import (
    SHARD_LINES,
    ShardInput,
    ShardMaker,
    make_shards,
    shard_inputs,
)
from flexmask.data.prepared import FORMAT, LEFT_OUT, MANIFEST, SETTINGS, read_manifest, shard_name
from flexmask.data.samples import Weighting
from flexmask.data.shards import Shard, ShardError
from flexmask.data.trees import Renderer
from flexmask.errors import DataError
from flexmask.files import atomic_write, write_json

LOCK = "prepare.lock"
_OWN = "shard-*.safetensors"
_PATIENCE_S = 5.0  # for a run that is about to end
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def prepare(
    data: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    tokenizer: Any,
    *,
    weighting: Weighting = "token",
    on_bad_line: OnBadLine = "error",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    num_proc: int = 1,
    shard_lines: int = SHARD_LINES,
    progress: Callable[[int], object] = lambda conversations: None,
) -> dict[str, Any]:
    """Render conversations into the folder `output`; returns its manifest.

    Called again after an interruption, with the same arguments, it goes on where it was.

    Args:
        data: files, folders and patterns, see `find_data_files`.
        output: a new folder, or one that this call has begun.
        tokenizer: a Hugging Face tokenizer with a chat template.
        weighting: as in `weigh_samples`.
        on_bad_line: "error" raises at the first line that cannot be used, "skip" lists it.
        chat_template_kwargs: settings for the chat template.
        num_proc: processes that render; the output is the same with any number.
        shard_lines: lines of a shard, at most.
        progress: called with the number of conversations that have been dealt with.

    Raises:
        FlexmaskError: the data, the folder or an argument cannot be used.
    """
    if num_proc < 1:
        raise DataError(f"--num_proc must be at least 1, got {num_proc}")
    if shard_lines < 1:
        raise DataError(f"--shard_lines must be at least 1, got {shard_lines}")
    check_on_bad_line(on_bad_line)
    files = find_data_files(data)
    folder = Path(output)
    settings: dict[str, Any] = {
        "format": FORMAT,
        "flexmask": flexmask.__version__,
        "files": [str(file) for file in files],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "weighting": weighting,
        "on_bad_line": on_bad_line,
        "chat_template_kwargs": dict(chat_template_kwargs or {}),
        "shard_lines": shard_lines,
    }
    renderer = Renderer(tokenizer, weighting, settings["chat_template_kwargs"])
    maker = ShardMaker(folder, tuple(settings["files"]), renderer, on_bad_line)
    with _only_run(folder):
        _enter(folder, settings)
        return _fill(maker, settings, files, num_proc, progress)


@contextmanager
def _only_run(folder: Path) -> Iterator[None]:
    """A block that no other process is in for the same `folder`, which is made if need be.

    The lock is one of the operating system, which ends with its process; its file stays.

    Raises:
        DataError: another one is, or the folder cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; name a folder for --output")
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE_S)
    except Timeout:
        raise DataError(
            f"{folder}: is being written by another run; wait for its end, or use another --output"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise DataError(f"{folder}: cannot be written: {error.strerror}") from None
        warnings.warn(
            f"{folder}: files cannot be locked here; see to it that no other run writes this "
            "folder",
            stacklevel=2,
        )
    try:
        yield
    finally:
        lock.release()


def _fill(
    maker: ShardMaker,
    settings: dict[str, Any],
    files: Sequence[Path],
    num_proc: int,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """Make the shards that are missing, and the manifest."""
    folder = maker.folder
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        if all(_finished(folder / shard["name"]) for shard in manifest["shards"]):
            progress(manifest["conversations"])
            return manifest
        (folder / MANIFEST).unlink()
    digests: list[str] = []

    def missing() -> Iterator[ShardInput]:
        for shard_input in shard_inputs(files, settings["shard_lines"]):
            digests.append(shard_input.digest)
            shard = _finished(folder / shard_name(shard_input.number))
            if shard is None:
                yield shard_input
            elif shard.about["digest"] == shard_input.digest:
                progress(len(shard))
            else:
                raise _changed(shard.path)

    for num_made in make_shards(maker, missing(), num_proc):
        progress(num_made)
    return _finish(folder, settings, digests)


def _enter(folder: Path, settings: dict[str, Any]) -> None:
    """Take possession of an empty folder, or find in it a run of the same settings.

    Without a finished shard all settings may change; with some, bad lines may be skipped now that
    were an error before: these shards hold none.
    """
    path = folder / SETTINGS
    begun = _read_settings(path) if path.exists() else None
    if begun is None:
        if any(entry.name != LOCK for entry in folder.iterdir()):
            raise DataError(f"{folder}: holds other files; name a new folder for --output")
    elif any(folder.glob(_OWN)):
        for name, value in settings.items():
            if begun.get(name) != value and (name, value) != ("on_bad_line", "skip"):
                raise DataError(
                    f"{folder}: was begun with {name} {begun.get(name)!r}, not {value!r}; "
                    "run the command that began it, or use another --output"
                )
    try:
        for half in folder.glob("*.partial"):
            half.unlink()
        if begun != settings:
            (folder / MANIFEST).unlink(missing_ok=True)  # it names the settings too
            write_json(settings, path)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from None


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; use another --output") from None


def _finished(path: Path) -> Shard | None:
    """The shard at `path`; None where there is none or it is damaged."""
    try:
        return Shard(path)
    except ShardError:
        return None


def _changed(path: Path) -> DataError:
    return DataError(
        f"{path}: was made of other lines: the data have changed since; use another --output"
    )


def _finish(folder: Path, settings: dict[str, Any], digests: list[str]) -> dict[str, Any]:
    """Write what was left out, and the manifest; with it the folder is finished."""
    names = [shard_name(number) for number in range(len(digests))]
    if len(list(folder.glob(_OWN))) > len(names):
        raise _changed(folder / shard_name(len(names)))
    shards = [Shard(folder / name) for name in names]
    bad_lines = [bad for shard in shards for bad in shard.about["bad_lines"]]
    if not any(map(len, shards)):
        first = bad_lines[0]["reason"] if bad_lines else "the files are empty"
        raise DataError(f"{folder}: no conversation can be used; the first: {first}")
    manifest = {
        **settings,
        "conversations": sum(map(len, shards)),
        "samples": sum(int(shard.num_samples.sum()) for shard in shards),
        "tokens": sum(int(shard.num_tokens.sum()) for shard in shards),
        "visible_pairs": sum(int(shard.num_pairs.sum()) for shard in shards),
        "sample_tokens": sum(shard.about["num_sample_tokens"] for shard in shards),
        "trained_tokens": sum(shard.about["num_trained_tokens"] for shard in shards),
        "longest_sample": max(int(max(shard.longest_samples(), default=0)) for shard in shards),
        "bad_lines": len(bad_lines),
        "shards": [
            {"name": name, "digest": digest} for name, digest in zip(names, digests, strict=True)
        ],
    }
    lines = (json.dumps(bad, ensure_ascii=False) + "\n" for bad in bad_lines)
    try:
        with atomic_write(folder / LEFT_OUT) as partial:
            partial.write_text("".join(lines), encoding="utf-8")
        write_json(manifest, folder / MANIFEST)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written: {error.strerror}; make room and run the same command "
            "again: finished shards are kept"
        ) from None
    return manifest
