"""What is logged of a run, for the terminal, TensorBoard and wandb."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
from model_cases import tiny_model
from torch.distributions import Categorical
from trainer_cases import CONVERSATIONS, arguments
from transformers import AutoTokenizer

import flexmask
from flexmask import TreeCollator, TreeTrainer, patch
from flexmask.demo import TOKENIZER_PATH
from flexmask.errors import DataError
from flexmask.training.checks import check_reports

TEMPLATE = AutoTokenizer.from_pretrained(TOKENIZER_PATH).chat_template
ABOUT = {
    "flexmask_version": flexmask.__version__,
    "backend": "cpu",
    "template_digest": hashlib.sha256(TEMPLATE.encode()).hexdigest()[:16],
}


def trainer_of(folder, *, log_token_metrics=False, **settings):
    return TreeTrainer(
        model=patch(tiny_model("llama")),
        args=arguments(folder, **settings),
        train_dataset=CONVERSATIONS,
        data_collator=TreeCollator(AutoTokenizer.from_pretrained(TOKENIZER_PATH)),
        log_token_metrics=log_token_metrics,
    )


def losses_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("settings", [{}, {"per_device_train_batch_size": 1}], ids=["row", "four"])
def test_accuracy_and_entropy_are_those_of_the_trained_tokens_of_a_step(tmp_path, settings):
    if settings:
        settings = settings | {"gradient_accumulation_steps": 4}
    trainer = trainer_of(tmp_path, log_token_metrics=True, **settings)
    batch = TreeCollator()(CONVERSATIONS)
    labels = batch.pop("shift_labels")
    del batch["labels"]
    with torch.no_grad():
        logits = trainer.model(**batch).logits[labels != -100]
    trainer.train()
    first = losses_of(trainer)[0]
    right = logits.argmax(-1) == labels[labels != -100]
    assert first["mean_token_accuracy"] == pytest.approx(right.double().mean().item())
    entropy = Categorical(logits=logits.double()).entropy().mean().item()
    assert first["entropy"] == pytest.approx(entropy, rel=1e-5)


def test_accuracy_and_entropy_change_no_weight_and_are_left_out_unless_asked_for(tmp_path):
    plain, counted = (trainer_of(tmp_path, log_token_metrics=asked) for asked in (False, True))
    plain.train()
    counted.train()
    for ours, theirs in zip(plain.model.parameters(), counted.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not {"mean_token_accuracy", "entropy"} & {*losses_of(plain)[0]}


def test_a_resumed_run_goes_on_counting_tokens(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path, **settings)
    whole.train()
    resumed = trainer_of(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    counts = [losses_of(one)[-1]["num_input_tokens_seen"] for one in (whole, resumed)]
    assert counts[0] == counts[1]


def test_tensorboard_has_the_figures_of_steps_and_what_the_run_was_trained_with(
    tmp_path, monkeypatch
):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trainer_of(tmp_path, report_to="tensorboard", log_token_metrics=True)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    logged = losses_of(trainer)
    for name in ("npass_ratio", "npass_tokens_per_second", "row_fill", "num_input_tokens_seen"):
        written = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert written == [(one["step"], pytest.approx(one[name])) for one in logged]
    assert {"train/mean_token_accuracy", "train/entropy"} <= {*events.Tags()["scalars"]}
    for name, text in ABOUT.items():
        (event,) = events.Tensors(f"{name}/text_summary")
        assert [one.decode() for one in event.tensor_proto.string_val] == [text]


def test_wandb_has_in_its_config_what_the_run_was_trained_with(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer_of(tmp_path, report_to="wandb").train()
    try:
        assert {name: wandb.config[name] for name in ABOUT} == ABOUT
        assert wandb.run.summary["train/npass_ratio"] > 1
    finally:
        wandb.finish()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_reporter_that_is_not_installed_is_one_line(name, monkeypatch):
    where = "transformers.integrations.integration_utils"
    monkeypatch.setattr(f"{where}.get_available_reporting_integrations", list)
    monkeypatch.setattr(f"{where}.is_{name}_available", lambda: False)
    monkeypatch.setattr("flexmask.errors.find_spec", lambda name: None)
    with pytest.raises(DataError, match=f"^--report_to.*{name}.*pip install {name}") as caught:
        check_reports(SimpleNamespace(report_to=[name]))
    assert "\n" not in str(caught.value)
