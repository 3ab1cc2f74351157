"""A folder of shards, begun, gone on with, and finished."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flexmask
from flexmask.data.files import OnBadLine, check_on_bad_line
from flexmask.data.output_formats import OUTPUT_FORMATS, TREES
from flexmask.data.prepare_pool import (
    COUNTS,
    REMEDY,
    ShardMaker,
    add_counts,
    changed_data,
    lines_of_shards,
    make_shards,
)
from flexmask.data.prepared import FORMAT, LEFT_OUT, MANIFEST, SETTINGS, read_manifest
from flexmask.data.renderer import Renderer
from flexmask.data.sources import find_data_files
from flexmask.data.tokenize import tokenizer_fingerprint
from flexmask.errors import DataError
from flexmask.files import LOCK, atomic_write, disk_errors, only_run, write_json


def prepare(
    data: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    tokenizer: Any,
    *,
    split: str | None = None,
    on_bad_line: OnBadLine = "error",
    num_proc: int = 1,
    shard_lines: int = 1000,
    output_format: str = TREES,
    progress: Callable[[int], object] = lambda conversations: None,
    **settings: Any,
) -> dict[str, Any]:
    """Render conversations into the folder `output`; returns its manifest.

    Called again after an interruption, with the same arguments, it goes on where it was.

    Args:
        data: files, folders, patterns and datasets, see `find_data_files`; weights are kept.
        output: a new folder, or one that this call has begun.
        tokenizer: a Hugging Face tokenizer with a chat template.
        split: of datasets, see `find_data_files`.
        on_bad_line: "error" raises at the first line that cannot be used, "skip" lists it.
        num_proc: processes that render; the output is the same with any number.
        shard_lines: lines of a shard, at most.
        output_format: "trees", or "samples": rows for other trainers, see docs/formats.md.
        progress: called with the number of conversations that have been dealt with.
        settings: attributes of `Renderer`, such as `weighting`; a folder that is gone on with keeps
            its `date`.

    Raises:
        FlexmaskError: the data, the folder or an argument cannot be used.
    """
    if num_proc < 1:
        raise DataError(f"--num_proc must be at least 1, got {num_proc}")
    if shard_lines < 1:
        raise DataError(f"--shard_lines must be at least 1, got {shard_lines}")
    check_on_bad_line(on_bad_line)
    if output_format not in OUTPUT_FORMATS:
        named = " or ".join(map(repr, OUTPUT_FORMATS))
        raise DataError(f"output_format must be {named}, got {output_format!r}")
    files = find_data_files(data, split)
    if output_format != TREES and not {*files.values()} <= {1}:
        raise DataError(
            "weights of data are for trees, which `flexmask train` reads; leave them out"
        )
    folder = Path(output)
    renderer = Renderer(tokenizer, **settings)
    with only_run(folder):
        begun = _begun_settings(folder)
        renderer = renderer.dated(None if begun is None else begun["date"])
        made_by: dict[str, Any] = {
            "format": FORMAT,
            "flexmask": flexmask.__version__,
            "files": [str(file) for file in files],
            "weights": list(files.values()),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            **renderer.settings,
            "on_bad_line": on_bad_line,
            "shard_lines": shard_lines,
            "output_format": output_format,
        }
        maker = ShardMaker(folder, made_by["files"], renderer, on_bad_line, output_format)
        _enter(folder, made_by, begun)
        manifest = _finished_manifest(folder)
        if manifest is not None:
            progress(manifest["conversations"])
            return manifest
        num_shards = 0
        for num_made in make_shards(maker, lines_of_shards(files, shard_lines), num_proc):
            num_shards += 1
            progress(num_made)
        return _finish(folder, made_by | {"thinking": renderer.thinking_text}, num_shards)


def _begun_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that began a folder, or None; it has to be of this format."""
    path = folder / SETTINGS
    try:
        begun = json.loads(path.read_text("utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; use another --output") from None
    if begun is not None and begun.get("format") != FORMAT:
        raise DataError(
            f"{folder}: has format {begun.get('format')}, this flexmask writes {FORMAT}; use "
            "another --output"
        )
    return begun


def _enter(folder: Path, settings: dict[str, Any], begun: dict[str, Any] | None) -> None:
    """Take possession of an empty folder, or find in it a run of the same settings.

    Without a finished shard all settings may change; with some, bad lines may be skipped now that
    were an error before: these shards hold none.
    """
    if begun is None:
        if any(entry.name != LOCK for entry in folder.iterdir()):
            raise DataError(f"{folder}: holds other files; name a new folder for --output")
    elif OUTPUT_FORMATS[begun["output_format"]].find_shards(folder):
        for name, value in settings.items():
            if begun.get(name) != value and (name, value) != ("on_bad_line", "skip"):
                raise DataError(
                    f"{folder}: was begun with {name} {begun.get(name)!r}, not {value!r}; "
                    "run the command that began it, or use another --output"
                )
    with disk_errors(folder, REMEDY):
        for half in folder.glob("*.partial"):
            half.unlink()
        if begun != settings:
            (folder / MANIFEST).unlink(missing_ok=True)  # it names the settings too
            write_json(settings, folder / SETTINGS)


def _finished_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder with all of its shards; without them it goes, and there is none."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    find_about = OUTPUT_FORMATS[manifest["output_format"]].find_about
    if None not in [find_about(folder / shard["name"]) for shard in manifest["shards"]]:
        return manifest
    (folder / MANIFEST).unlink()
    return None


def _finish(folder: Path, settings: dict[str, Any], num_shards: int) -> dict[str, Any]:
    """Write what was left out, and the manifest; with it the folder is finished."""
    output = OUTPUT_FORMATS[settings["output_format"]]
    if len(output.find_shards(folder)) > num_shards:
        raise changed_data(folder / output.name(num_shards))
    names = list(map(output.name, range(num_shards)))
    abouts = [output.read_about(folder / name) for name in names]
    bad_lines = [bad for about in abouts for bad in about["bad_lines"]]
    counts = dict.fromkeys(COUNTS, 0)
    unused_keys: Counter[str] = Counter()
    for about in abouts:
        add_counts(counts, about["counts"])
        unused_keys.update(about["unused_keys"])
    if not counts["conversations"]:
        first = bad_lines[0]["reason"] if bad_lines else "the files are empty"
        raise DataError(f"{folder}: no conversation can be used; the first: {first}")
    manifest = {
        **settings,
        **counts,
        "unused_keys": unused_keys,
        "bad_lines": len(bad_lines),
        "shards": [
            {"name": name, "digest": about["digest"]}
            for name, about in zip(names, abouts, strict=True)
        ],
    }
    lines = (json.dumps(bad, ensure_ascii=False) + "\n" for bad in bad_lines)
    with disk_errors(folder, REMEDY):
        with atomic_write(folder / LEFT_OUT) as partial:
            partial.write_text("".join(lines), encoding="utf-8")
        write_json(manifest, folder / MANIFEST)
    return manifest
