"""Samples as rows: what other trainers make of them is N-pass."""

from itertools import chain

import pytest
from model_cases import tiny_model
from trainer_cases import CONVERSATIONS, arguments, assert_same_weights, npass_weights, parameters
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer
from trl import SFTConfig, SFTTrainer

from flexmask import Sample, to_dataset
from flexmask.data.rows import sample_row
from flexmask.demo import TOKENIZER_PATH
from flexmask.errors import DataError

SAMPLES = list(chain.from_iterable(CONVERSATIONS))


def test_labels_are_the_trained_tokens_in_their_own_places():
    row = sample_row(Sample([5, 6, 7, 8], [1, 0, 1, 1], key=3))
    assert row == {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "key": 3}


def test_weights_are_written_where_labels_cannot_tell_them():
    plain, weighted = Sample([5, 6], [1, 1]), Sample([5, 6, 7], [0, 0.5, 0])
    assert "loss_weights" not in to_dataset([plain]).column_names
    assert to_dataset([plain, weighted])["loss_weights"][:] == [[0, 1], [0, 0.5, 0]]
    with pytest.raises(DataError, match="got no samples"):
        to_dataset([])


@pytest.mark.parametrize("trl", [False, True], ids=["transformers", "trl"])
def test_other_trainers_take_the_rows_as_they_are_and_make_n_pass_of_them(trl, tmp_path):
    before, theirs = npass_weights()
    model, tokenizer = tiny_model("llama"), AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # one that the tiny model has
    settings = {"per_device_train_batch_size": len(SAMPLES), "remove_unused_columns": True}
    common = {"model": model, "train_dataset": to_dataset(SAMPLES), "processing_class": tokenizer}
    if trl:
        args = arguments(tmp_path, SFTConfig, max_length=None, bf16=False, **settings)
        trainer = SFTTrainer(args=args, **common)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer)
        args = arguments(tmp_path, **settings)
        trainer = Trainer(args=args, data_collator=collator, **common)
    trainer.train()
    assert_same_weights(parameters(model), before, theirs)
