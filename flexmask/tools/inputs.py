"""What is refused of a command's options before torch and transformers are imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexmask.data.jinja import read_template
from flexmask.data.prepared import is_prepared, read_manifest
from flexmask.data.sources import find_data_files
from flexmask.errors import DataError
from flexmask.tools.model_source import check_source
from flexmask.tools.run_file import SUFFIXES
from flexmask.training.options import check_rendering


def check_inputs(options: Any, *, prepared: bool = False) -> None:
    """Raise FlexmaskError for data, models, templates and settings that cannot be used.

    Args:
        options: of a command; those that it does not have are passed over.
        prepared: whether its data may be a folder of `flexmask prepare`.
    """
    given = vars(options).get
    words = (("data", "split", "train"), ("eval_data", "eval_data_split", "test"))
    for name, split_name, default_split in words:
        data, split = given(name), given(split_name)
        if data and prepared and len(data) == 1 and is_prepared(data[0]):
            read_manifest(Path(data[0]))
            if split is not None:
                raise DataError(f"{data[0]}: was prepared, and has no splits; leave out {split!r}")
        elif data:
            if file := next((word for word in data if word.endswith(SUFFIXES)), None):
                raise DataError(f"{file}: is no data; a file of options comes before all else")
            find_data_files(data, split, default_split=default_split)
    if given("chat_template") is not None:
        read_template(given("chat_template"))
    check_rendering(options)
    for name in ("model", "tokenizer"):
        if given(name) is not None:
            check_source(given(name), name)
    if given("model") is not None:
        _check_model(Path(given("model")), needs_weights=given("from_config") is False)
    if given("kernel_options") is not None:
        from flexmask.backends.flex_options import check_kernel_options  # which imports torch

        check_kernel_options(given("kernel_options"), given("backend"))


def _check_model(folder: Path, *, needs_weights: bool) -> None:
    """Raise DataError for a folder without what a model is built from; a hub id is passed over."""
    if not folder.is_dir():
        return
    held = list(folder.iterdir())
    if folder / "config.json" not in held and folder / "adapter_config.json" in held:
        raise DataError(
            f"{folder}: holds adapters without their model; name that, or the folder 'merged' that "
            "--merge_lora writes"
        )
    if folder / "config.json" not in held:
        raise DataError(f"{folder}: holds no config.json; name a model's folder or hub id")
    if needs_weights and not {file.suffix for file in held} & {".safetensors", ".bin"}:
        raise DataError(
            f"{folder}: holds a config but no weights (*.safetensors or *.bin); "
            "--from_config draws them at random"
        )
