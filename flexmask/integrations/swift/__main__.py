"""Prints the file for `swift sft --external_plugins`."""

from pathlib import Path

print(Path(__file__).with_name("plugin.py"))
