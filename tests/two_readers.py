"""What two processes read together, run by torchrun: writes each rank's outcome to a folder."""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from flexmask.data.renderer import Renderer
from flexmask.data.trees import load_trees
from flexmask.demo import TOKENIZER_PATH
from flexmask.errors import FlexmaskError
from flexmask.training.data import ranks_on_cpu


def outcome(path, on_bad_line):
    """The trees' tokens, places and bad lines, or the error; and how many this rank rendered."""
    rendered = []

    class Counting(Renderer):
        def render(self, conversation):
            rendered.append(conversation.where)
            return Renderer.render(self, conversation)

    renderer = Counting(AutoTokenizer.from_pretrained(TOKENIZER_PATH))

    try:
        with ranks_on_cpu() as ranks:
            found = load_trees([path], renderer, on_bad_line=on_bad_line, ranks=ranks)
    except FlexmaskError as error:
        return f"{type(error).__name__}: {error}", len(rendered)
    tokens = [tree.input_ids.tolist() for tree in found.trees]
    return (tokens, found.places, found.bad_lines), len(rendered)


def main(folder):
    distributed = torch.distributed.is_torchelastic_launched()
    if distributed:
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank() if distributed else "alone"
    other = folder / f"own-{rank if distributed else 0}.jsonl"
    results = {
        (path.name, policy): outcome(path, policy)
        for path in (folder / "good.jsonl", folder / "bad.jsonl")
        for policy in ("error", "skip")
    }
    results["cut"] = outcome(folder / "cut.jsonl.gz", "skip")
    results["other"] = outcome(other, "skip")
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
