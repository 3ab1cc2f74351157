"""Three steps in every trainer that people use equal three steps of N-pass by hand."""

import copy
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_cases import model_with_images
from model_cases import doubled, supported, tiny_model, to_fp64
from strategies import random_samples
from torch.utils.data import IterableDataset
from trainer_cases import (
    CONVERSATIONS,
    arguments,
    assert_same_weights,
    difference,
    npass_weights,
    parameters,
    train_npass,
    trees,
)
from transformers import Trainer, TrainerCallback

from flexmask import FlexmaskError, TreeCollator, patch
from flexmask.model.load import load_model
from flexmask.training.checkpoints import ResumableTrainer
from flexmask.training.trainer import TreeTrainer

ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


class Stream(IterableDataset):
    """The conversations without a length."""

    def __iter__(self):
        return iter(CONVERSATIONS)


def train(model, folder, kind=TreeTrainer, data=CONVERSATIONS, **settings):
    """The trainer after three steps of a patched model."""
    trainer = kind(
        model=patch(model),
        args=arguments(folder, **settings),
        train_dataset=data,
        data_collator=TreeCollator(),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", [Trainer, TreeTrainer])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param(ACCUMULATED, id="accumulated"),
        pytest.param(
            {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, id="3+1"
        ),
        pytest.param(
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            id="reentrant",
        ),
        pytest.param(
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
            }
            | ACCUMULATED,
            id="non-reentrant",
        ),
    ],
)
def test_three_steps_equal_npass(tmp_path, kind, settings):
    model = tiny_model("llama")
    train(model, tmp_path, kind, **settings)
    assert_same_weights(parameters(model), *npass_weights())


@pytest.mark.parametrize("kind", [Trainer, TreeTrainer])
@pytest.mark.parametrize("family", supported(["qwen3_vl_text"]))
def test_a_model_of_images_divides_by_the_weights_of_the_whole_step(tmp_path, kind, family):
    model, other = tiny_model(family), tiny_model(family)
    before = parameters(model)
    train(model, tmp_path, kind, **ACCUMULATED)
    assert_same_weights(parameters(model), before, train_npass(other))


@pytest.mark.parametrize(
    ("build", "family"), [(tiny_model, "gemma4_text"), (model_with_images, "gemma4")]
)
def test_steps_that_multiply_rounding_equal_npass_to_ten_digits_in_fp64(tmp_path, build, family):
    conversations = [random_samples(seed, 2 + seed, vocabulary=45) for seed in range(4)]
    model = to_fp64(build(family))
    before = parameters(model)
    with doubled():
        theirs = train_npass(copy.deepcopy(model).eval(), conversations=conversations)
        train(model, tmp_path, data=conversations, **ACCUMULATED)
    assert_same_weights(parameters(model), before, theirs)


def test_three_compiled_steps_equal_npass(tmp_path):
    model = tiny_model("llama")
    train(model, tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert_same_weights(parameters(model), *npass_weights())


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_worker_processes_change_nothing(tmp_path):
    model = tiny_model("llama")
    train(model, tmp_path, dataloader_num_workers=2, dataloader_pin_memory=True)
    assert_same_weights(parameters(model), *npass_weights())


def test_a_stream_without_a_length_changes_nothing(tmp_path):
    model = tiny_model("llama")
    train(model, tmp_path, data=Stream(), max_steps=3, dataloader_num_workers=1, **ACCUMULATED)
    assert_same_weights(parameters(model), *npass_weights())


@pytest.mark.parametrize("weighting", ["turn", "conversation"])
def test_the_weights_of_the_whole_step_are_the_divisor(tmp_path, weighting):
    model = tiny_model("llama")
    train(model, tmp_path, data=trees(weighting), **ACCUMULATED)
    assert_same_weights(parameters(model), *npass_weights(weighting))


def test_another_divisor_would_be_noticed(tmp_path):
    model = tiny_model("llama")
    train(model, tmp_path, Trainer, trees("turn"), **ACCUMULATED)
    before, theirs = npass_weights("turn")
    assert difference(parameters(model), theirs) > 1e-3 * difference(before, theirs)


def test_bf16_errs_no_more_than_npass_in_bf16(tmp_path):
    model, other = tiny_model("llama"), tiny_model("llama")
    train(model, tmp_path, bf16=True)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = train_npass(other)
    _, exact = npass_weights()
    assert difference(parameters(model), exact) <= 2 * difference(rounded, exact)


def lora_model(**settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", **settings)
    return get_peft_model(tiny_model("llama"), config)


@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_around_frozen_weights_equal_npass(tmp_path, reentrant):
    model = lora_model()
    before = parameters(model)
    theirs = train_npass(copy.deepcopy(model))
    model.enable_input_require_grads()
    checkpointing = {"use_reentrant": reentrant}
    train(model, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=checkpointing)
    ours = parameters(model)
    assert_same_weights(ours, before, theirs)
    frozen = [name for name in before if "lora_" not in name]
    assert frozen
    assert all(torch.equal(ours[name], before[name]) for name in frozen)


def test_adapters_around_weights_of_4_bits_equal_npass(tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"), "float32", load_in_4bit=True)
    assert base.is_loaded_in_4bit
    base = prepare_model_for_kbit_training(base)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    before = parameters(model)
    theirs = train_npass(copy.deepcopy(model))
    train(model, tmp_path, gradient_checkpointing=True, **ACCUMULATED)
    ours = parameters(model)
    frozen = {name for name in before if "lora_" not in name}
    assert all(torch.equal(ours[name], before[name]) for name in frozen)
    adapters = (
        {k: v for k, v in some.items() if k not in frozen} for some in (ours, before, theirs)
    )
    assert_same_weights(*adapters)


def sft(model, folder, **settings):
    """TRL's SFTTrainer over positions in a list, as docs/trainers.md has it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Resumable(ResumableTrainer, SFTTrainer):
        pass

    collator = TreeCollator()
    trainer = Resumable(
        model=patch(model),
        args=arguments(
            folder,
            SFTConfig,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            bf16=False,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"index": range(len(CONVERSATIONS))}),
        data_collator=lambda rows: collator([CONVERSATIONS[row["index"]] for row in rows]),
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("start", [train, sft])
def test_the_auxiliary_loss_of_experts_is_trained_as_in_npass(tmp_path, start):
    model = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    before = parameters(model)
    theirs = train_npass(copy.deepcopy(model))
    start(model, tmp_path)
    assert_same_weights(parameters(model), before, theirs)


def tokenizer():
    from transformers import AutoTokenizer

    from flexmask.demo import TOKENIZER_PATH

    return AutoTokenizer.from_pretrained(TOKENIZER_PATH)


@pytest.mark.parametrize("is_lora", [False, True])
def test_trl_equals_npass(tmp_path, is_lora):
    model = lora_model() if is_lora else tiny_model("llama")
    before = parameters(model)
    theirs = train_npass(copy.deepcopy(model))
    trainer = sft(model, tmp_path, save_strategy="steps", save_steps=2, **ACCUMULATED)
    assert_same_weights(parameters(model), before, theirs)
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-3"]
    assert "mean_token_accuracy" in trainer.state.log_history[0]


def test_trl_refuses_loss_weights_that_its_loss_would_lose(tmp_path, monkeypatch):
    weighted = trees("turn")[0]
    monkeypatch.setattr(TreeCollator, "tree", lambda self, item: weighted)
    with pytest.raises(FlexmaskError, match="computed its loss without loss_weights"):
        sft(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("weighting", ["token", "turn"])
def test_evaluation_takes_the_mean_over_loss_weights(tmp_path, batch_size, weighting):
    model = tiny_model("llama")
    data = trees(weighting)
    whole = patch(model)(**TreeCollator()(data)).loss.item()
    trainer = TreeTrainer(
        model=model,
        args=arguments(tmp_path, per_device_eval_batch_size=batch_size),
        eval_dataset={"held_out": data},
        data_collator=TreeCollator(),
    )
    metrics = trainer.evaluate()
    assert metrics["eval_held_out_loss"] == pytest.approx(whole, rel=1e-6)
    assert trainer.state.log_history[-1]["eval_held_out_loss"] == metrics["eval_held_out_loss"]


def test_a_log_says_what_its_steps_computed(tmp_path, monkeypatch):
    clock = count(1)  # each look at it takes a second; evaluation has two of them
    monkeypatch.setattr("flexmask.training.throughput.perf_counter", clock.__next__)
    trainer = TreeTrainer(
        model=patch(tiny_model("llama")),
        args=arguments(tmp_path, eval_strategy="epoch", **ACCUMULATED),
        train_dataset=CONVERSATIONS,
        eval_dataset=CONVERSATIONS,
        data_collator=TreeCollator(pad_to_multiple_of=64),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    data = trees()
    num_tokens = sum(tree.num_tokens for tree in data)
    trained = sum(np.count_nonzero(tree.loss_weights) for tree in data)
    assert [entry["trained_tokens_per_second"] for entry in logs] == [trained, *[trained / 2] * 2]
    whole = sum(tree.num_sample_tokens for tree in data)
    assert [entry["npass_tokens_per_second"] for entry in logs] == [whole, *[whole / 2] * 2]
    assert [entry["num_input_tokens_seen"] for entry in logs] == [num_tokens * k for k in (1, 2, 3)]
    for entry in logs:
        assert entry["row_fill"] == num_tokens / sum(-(-t.num_tokens // 64) * 64 for t in data)
        assert entry["npass_ratio"] == whole / num_tokens


def test_evaluating_and_generating_leave_the_training_as_it_is(tmp_path):
    texts = []

    class Generate(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            ids = torch.arange(1, 7)[None]
            text = model.generate(ids, max_new_tokens=4, do_sample=False)
            with torch.no_grad():
                for _ in range(4):
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            assert torch.equal(text, ids[:, : text.shape[1]])
            texts.append(text)

    model = tiny_model("llama")
    trainer = TreeTrainer(
        model=patch(model),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=1, **ACCUMULATED),
        train_dataset=CONVERSATIONS,
        eval_dataset=CONVERSATIONS,
        data_collator=TreeCollator(),
        callbacks=[Generate],
    )
    trainer.train()
    assert len(texts) == 3
    assert_same_weights(parameters(model), *npass_weights())
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] > losses[1] > losses[2]


def test_a_saved_model_knows_nothing_of_its_training(tmp_path):
    trainer = train(tiny_model("llama"), tmp_path)
    trainer.save_model()
    assert "flexmask" not in (tmp_path / "config.json").read_text()
    again = type(trainer.model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert difference(parameters(again), parameters(trainer.model)) == 0


def test_columns_are_left_for_the_collator(tmp_path):
    model = tiny_model("llama", vocab_size=2048)
    conversation = {"messages": [{"role": "user", "content": "1 + 1?"}], "note": "kept"}
    conversation["messages"].append({"role": "assistant", "content": "2"})
    trainer = TreeTrainer(
        model=patch(model),
        args=arguments(tmp_path, remove_unused_columns=True),
        train_dataset=[conversation],
        data_collator=TreeCollator(tokenizer()),
    )
    assert trainer.train().global_step == 3


def test_a_model_that_is_not_patched_is_refused(tmp_path):
    trainer = TreeTrainer(
        model=tiny_model("llama"),
        args=arguments(tmp_path),
        train_dataset=CONVERSATIONS,
        data_collator=TreeCollator(),
    )
    with pytest.raises(FlexmaskError, match="the model is not patched"):
        trainer.train()


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_rows_cut_between_processes_are_refused(tmp_path, monkeypatch, name):
    def set_up(trainer, **_):
        parallelism = SimpleNamespace(**{"cp_size": 1, "sp_size": 1} | {name: 2})
        trainer.accelerator = SimpleNamespace(parallelism_config=parallelism)

    monkeypatch.setattr(ResumableTrainer, "__init__", set_up)
    with pytest.raises(FlexmaskError, match=f"ParallelismConfig: {name} must be 1, got 2"):
        TreeTrainer(model=patch(tiny_model("llama")), args=arguments(tmp_path))


def test_a_trainer_without_a_collator_of_trees_is_refused(tmp_path):
    trainer = TreeTrainer(
        model=patch(tiny_model("llama")), args=arguments(tmp_path), train_dataset=trees("token")
    )
    with pytest.raises(FlexmaskError, match=r"given no data_collator; give TreeCollator\(tokeniz"):
        trainer.train()


def test_an_iterator_is_no_training_set(tmp_path):
    options = {"train_dataset": iter(trees("token")), "data_collator": TreeCollator()}
    with pytest.raises(FlexmaskError, match="train_dataset is an iterator, read once only"):
        TreeTrainer(model=patch(tiny_model("llama")), args=arguments(tmp_path), **options)


def test_loss_weights_rounded_on_the_way_are_refused():
    batch = TreeCollator()(trees("turn"))
    model = patch(tiny_model("llama"))
    batch["loss_weights"] = batch["loss_weights"].bfloat16()
    with pytest.raises(FlexmaskError, match=r"must be float32 or float64, got torch\.bfloat16"):
        model(**batch)
