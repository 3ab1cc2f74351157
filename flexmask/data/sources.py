"""What the words of a command line name as data: files, folders, patterns, datasets; weights."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from flexmask.data.dataset_split import DatasetSplit, hub_split, saved_split
from flexmask.data.file_formats import SUFFIXES, DataFile
from flexmask.errors import DataError, announce_once, first_of, pluralize

SETTINGS = "settings.json"  # in a folder that was prepared
_NOT_READ = (".json", ".json.gz", ".ndjson", ".csv", ".tsv", ".arrow")  # and yet data, maybe
_WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d+)?)")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")  # in names of files


def find_data_files(
    data: Sequence[str | os.PathLike[str]],
    split: str | None = None,
    *,
    default_split: str = "train",
) -> dict[DataFile, float]:
    """The files and splits that `data` names, each with its weight, in the order of `data`.

    Args:
        data: files, folders (all data files in them, at any depth), patterns such as
            "part-*.jsonl.zst", folders of `datasets` and names on the Hub. Each may end in ":2", a
            weight, unless it is a file that has that in its name.
        split: of datasets, and of folders that name their files by split.
        default_split: of datasets where `split` is None.

    Raises:
        DataError: a name stands for nothing, or a file is named twice; a split is asked for that is
            not there, or has to be.
    """
    found: dict[DataFile, float] = {}
    seen: set[Path] = set()
    has_splits = False
    for entry in data:
        name = word = os.fspath(entry)
        weight = 1.0
        files = _named(name, split, default_split)
        if not files and (match := _WEIGHTED.fullmatch(word)):
            name, weight = match[1], float(match[2])
            files = _named(name, split, default_split)
        if not files:
            raise DataError(
                f"{word}: no such file; flexmask reads {', '.join(SUFFIXES)}, folders of them and "
                "of the package datasets, and names on the Hub (org/name)"
            )
        if not weight:
            raise DataError(f"{word}: a weight must be above 0, got 0; leave the data out")
        for file in files:
            known = Path(str(file)).resolve()
            if known in seen:
                raise DataError(
                    f"{file}: is named twice; name every file once, {file}:2 trains it twice"
                )
            seen.add(known)
            found[file] = weight
        has_splits |= Path(name).is_dir() or isinstance(files[0], DatasetSplit)
    if split is not None and not has_splits:
        raise DataError(
            f"split {split!r}: {', '.join(map(str, found))}: files have no splits; leave it out"
        )
    return found


def check_not_prepared(path: Path) -> None:
    """Raise DataError for a folder that was prepared."""
    if (path / SETTINGS).is_file():
        raise DataError(
            f"{path}: is a folder of `flexmask prepare`, which only `flexmask train` reads, as all "
            "of its data; name the files that it was made from"
        )


def _named(name: str, split: str | None, default_split: str) -> Sequence[DataFile]:
    """What a word without a weight names; nothing where it names nothing."""
    path = Path(name)
    check_not_prepared(path)
    if saved := saved_split(path, split, default_split):
        return [saved]
    if path.is_dir():
        return _in_folder(path, split)
    if found := [path] if path.exists() else sorted(map(Path, glob(name, recursive=True))):
        return found
    named = hub_split(name, split or default_split)
    return [named] if named else []


def _in_folder(folder: Path, split: str | None) -> list[Path]:
    """The data files of a folder; those of a split where their names tell splits apart.

    Files and folders whose names begin with a dot, as editors and notebooks write, are left out.
    """
    shown = [
        file
        for file in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    files = [file for file in shown if file.name.endswith(SUFFIXES)]
    others = [str(file.relative_to(folder)) for file in shown if file.name.endswith(_NOT_READ)]
    if files and others:
        announce_once(
            f"{folder}: {pluralize(len(others), 'file')} of other endings left out: "
            f"{', '.join(first_of(others, 3))}; flexmask reads {', '.join(SUFFIXES)} of a folder"
        )
    if not files:
        raise DataError(f"{folder}: holds no data file; flexmask reads {', '.join(SUFFIXES)}")
    by_split: dict[str, list[Path]] = {}
    for name in {*_SPLITS, *([] if split is None else [split])}:
        word = re.compile(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])")
        if named := [file for file in files if word.search(str(file.relative_to(folder)).lower())]:
            by_split[name] = named
    if split is None and len(by_split) > 1 and "train" in by_split:
        raise DataError(
            f"{folder}: holds files of the splits {', '.join(sorted(by_split))}; choose one by "
            f"--split or --eval_data_split, or name the files, as in '{folder}/*.jsonl'"
        )
    if split is not None and split not in by_split:
        raise DataError(
            f"{folder}: has no file of the split {split!r} by its name; name the files themselves"
        )
    return files if split is None else by_split[split]
