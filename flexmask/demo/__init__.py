"""The embedded demo: tutoring conversations, their tokenizer, and a tiny model's config.

All of it ships with the package; tests/test_demo_data.py proves that every answer is true.

Attributes:
    DATA_PATH: the conversations, one JSON object a line.
    TOKENIZER_PATH: a folder for `AutoTokenizer.from_pretrained`.
    CONFIG_PATH: a Qwen3 config for `AutoConfig.from_pretrained`; its weights are drawn at random.
"""

from pathlib import Path

ASSETS_PATH = Path(__file__).parent / "assets"
DATA_PATH = ASSETS_PATH / "tutoring.jsonl"
TOKENIZER_PATH = ASSETS_PATH / "tokenizer"
CONFIG_PATH = ASSETS_PATH / "config.json"
