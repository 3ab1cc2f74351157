"""Splits of datasets of the package `datasets`: in a folder, or on the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmask.data.values import parse_json, without_nulls
from flexmask.errors import DataError, need_packages, one_line

# org/name, or org/name/subset
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_ENDS = (".csv", ".gz", ".json", ".jsonl", ".parquet", ".txt", ".zst")


@dataclass(frozen=True, slots=True)
class DatasetSplit:
    """The rows of one split.

    Attributes:
        name: a folder that `save_to_disk` wrote for one split, or what `hub_split` takes.
        split: its name on the Hub; None for a folder.
    """

    name: str
    split: str | None = None

    def __str__(self) -> str:
        return self.name if self.split is None else f"{self.name}[{self.split}]"

    def lines(self) -> Iterator[bytes]:
        """The JSON text of each row, in UTF-8, without what is null.

        Raises:
            DataError: the dataset cannot be loaded.
        """
        for row in self._load():
            yield json.dumps(without_nulls(row), ensure_ascii=False, default=str).encode()

    def _load(self) -> Any:
        import datasets

        try:
            if self.split is None:
                return datasets.load_from_disk(self.name)
            organisation, name, *subset = self.name.split("/")
            return datasets.load_dataset(f"{organisation}/{name}", *subset, split=self.split)
        except Exception as error:  # of datasets, or of the HTTP library
            here = "" if self.split is None else "no such file here, and from the Hub it "
            raise DataError(f"{self}: {here}cannot be loaded: {one_line(error)}") from error


def saved_split(folder: Path, split: str | None, default: str) -> DatasetSplit | None:
    """The split that a folder holds which `save_to_disk` wrote; None for any other folder.

    Args:
        folder: of one split, or of several.
        split: which one; None for the only one, or `default` where it is one of several.
        default: a split.

    Raises:
        DataError: the folder does not hold the split, or `datasets` is not installed.
    """
    several, single = folder / "dataset_dict.json", folder / "state.json"
    if several.is_file():
        held = parse_json(several.read_text("utf-8"), str(several))["splits"]
        found = folder / (split or default)
    elif single.is_file() and (folder / "dataset_info.json").is_file():
        held = [parse_json(single.read_text("utf-8"), str(single)).get("_split")]
        found, default = folder, held[0]
    else:
        return None
    if (split or default) not in held:
        names = ", ".join(name or "one without a name" for name in held)
        raise DataError(f"{folder}: has no split {split or default!r}; it holds {names}")
    need_packages(f"{folder}: is a folder of the package datasets, and", "datasets")
    return DatasetSplit(str(found))


def hub_split(name: str, split: str) -> DatasetSplit | None:
    """A split on the Hub; None where `name` is none of the Hub's, such as "org/name".

    Args:
        name: "org/name", or "org/name/subset" of a dataset that has several subsets. What ends like
            a file is none, and what would be in a folder that is here.
        split: such as "train".

    Raises:
        DataError: `datasets` is not installed.
    """
    if not _HUB_NAME.fullmatch(name) or name.endswith(_FILE_ENDS) or Path(name).parent.is_dir():
        return None
    need_packages(f"{name}: no such file here; from the Hub it", "datasets")
    return DatasetSplit(name, split)
