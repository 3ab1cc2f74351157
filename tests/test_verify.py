"""`flexmask verify`: proves what is equal, and finds what is not."""

import json
import re

import pytest
import torch
from command_cases import run, write_conversations, write_model
from model_cases import tiny_model
from strategies import random_samples
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from flexmask import Sample
from flexmask.backends import BackendChoice
from flexmask.backends.reference import reference_attention
from flexmask.tools.verify.differences import Difference
from flexmask.tools.verify.expected import within
from flexmask.tools.verify.parameter_groups import GROUPS, parameter_groups
from flexmask.tools.verify.proof import Chat, verify_model
from flexmask.tools.verify.run import describe_choices

CHATS = [Chat(random_samples(seed, num_samples=3)) for seed in range(2)]
CHECKS = ["dropout", "patch", "mask", "loss", "gradients", "step", "control"]


def names(report, *, ok):
    return [finding.name for finding in report.findings if finding.is_ok is ok]


@pytest.mark.parametrize("backend", ["cpu", "reference", "varlen"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_proves_verified_families_and_backends(family, backend):
    report = verify_model(tiny_model(family), CHATS, backend=backend)
    assert report.is_proved, str(report)
    assert names(report, ok=True) == CHECKS
    assert [(turn.place.conversation, turn.place.turn) for turn in report.turns] == [
        (chat, turn) for chat in range(2) for turn in range(3)
    ]


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gpt2", {}), ("olmo2", {}), ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2})],
    ids=["gpt2", "olmo2", "qwen3_moe"],
)
def test_proves_other_kinds_of_models(family, settings):
    report = verify_model(tiny_model(family, **settings), CHATS[:1])
    assert report.is_proved, str(report)


def test_proves_bf16_within_the_error_of_bf16_npass():
    report = verify_model(tiny_model("llama").bfloat16(), CHATS)
    assert report.is_proved, str(report)


def test_fp32_bounds_are_a_few_roundings():
    report = verify_model(tiny_model("llama"), CHATS)
    for turn in report.turns:
        for difference in (report.loss_of(turn), *turn.gradients.values()):
            assert 2**-24 < difference.bound < 1e-5


def test_a_wrong_mask_fails_by_far():
    report = verify_model(tiny_model("llama"), CHATS)
    control = next(f for f in report.findings if f.name == "control")
    assert report.control.mask == "plain causal"
    assert report.control.turn.place.turn < 2  # the last turn is the trunk, and as it should be
    assert control.difference.by_bound > 1000


def test_a_single_turn_has_a_negative_control_too():
    report = verify_model(tiny_model("llama"), [Chat(random_samples(0, num_samples=1))])
    assert report.is_proved, str(report)
    assert report.control.mask == "the first half hidden"


def causal_attention(q, k, v, subtree_end, *window, **options):
    """A backend that ignores the mask."""
    every = torch.full_like(subtree_end, subtree_end.shape[-1])
    return reference_attention(q, k, v, every, *window, **options)


def test_finds_attention_that_ignores_the_mask(monkeypatch):
    monkeypatch.setattr("flexmask.backends.api._implementation", lambda name: causal_attention)
    report = verify_model(tiny_model("llama"), CHATS)
    assert names(report, ok=False) == ["mask", "loss", "gradients", "step"]
    mask = next(finding for finding in report.findings if finding.name == "mask")
    assert "the model ignores the mask" in mask.text


@pytest.mark.parametrize(
    "error",
    [
        lambda out: out + 1e-4 * out.detach().abs().mean(),
        lambda out: out * (1 + 1e-4),
        lambda out: out * float("nan"),
        lambda out: out.detach(),
    ],
    ids=["bias", "scale", "nan", "no-gradient"],
)
def test_finds_a_backend_that_is_slightly_wrong(monkeypatch, error):
    def broken(*args, **kwargs):
        return error(reference_attention(*args, **kwargs))

    monkeypatch.setattr("flexmask.backends.api._implementation", lambda name: broken)
    report = verify_model(tiny_model("llama"), CHATS)
    assert "gradients" in names(report, ok=False)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["proved"] is False


class DeafAttention(LlamaAttention):
    """Attention that is causal, whatever mask it is given."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return super().forward(hidden_states, attention_mask=None, **kwargs)


def test_finds_a_layer_that_never_asks_for_the_mask():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.__class__ = DeafAttention
    report = verify_model(model, CHATS)
    assert names(report, ok=False) == ["mask"]
    assert "ignored the mask" in report.findings[-1].text


def test_a_stop_by_the_user_leaves_what_was_found(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    report = verify_model(tiny_model("llama"), CHATS, tell=interrupt)
    assert names(report, ok=False) == ["stopped"]
    assert names(report, ok=True) == ["dropout", "patch", "mask", "loss", "gradients"]
    assert "after 1 of 6 turns: by the user" in str(report)
    assert json.loads(json.dumps(report.to_json()))["step"] is None


def test_finds_dropout_in_the_config():
    model = tiny_model("llama", attention_dropout=0.1)
    report = verify_model(model, CHATS)
    assert names(report, ok=False) == ["dropout", "patch"]
    assert "attention_dropout = 0.1" in report.findings[0].text


def test_finds_dropout_that_has_no_name():
    model = tiny_model("llama")
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: nn.functional.dropout(output, 0.1, module.training)
    )
    report = verify_model(model, CHATS)
    assert names(report, ok=False) == ["dropout"]
    assert "N-pass itself differs from run to run" in report.findings[0].text


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    verify_model(model, CHATS[:1])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not hasattr(model, "_flexmask")


def test_every_parameter_has_a_group():
    groups = parameter_groups(tiny_model("qwen3"))
    kinds = {name: str(group) for name, group in groups.items()}
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["model.layers.1.self_attn.k_proj.weight"] == "attention of layer 1"
    assert kinds["model.layers.1.self_attn.k_norm.weight"] == "norm of layer 1"
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "mlp of layer 0"
    assert kinds["model.norm.weight"] == "norm"
    assert kinds["lm_head.weight"] == "head"
    assert {group.kind for group in groups.values()} == set(GROUPS) - {"other"}


def test_a_difference_that_is_not_a_number_is_above_any_bound():
    assert not Difference(float("nan"), 1.0).is_within
    assert not Difference(0.0, float("nan")).is_within
    assert Difference(float("nan"), 1.0).by_bound == float("inf")


@pytest.fixture
def model_dir(tmp_path):
    return write_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    return write_conversations(tmp_path / "conversations.jsonl", 3)


def verify(model_dir, data, *options):
    return run("verify", data, "--model", model_dir, "--from_config", *options)


def test_the_command_says_what_it_checked(model_dir, data, tmp_path, capsys):
    assert verify(model_dir, data, "--conversations", 2, "--json", tmp_path / "report.json") == 0
    out, err = capsys.readouterr()
    assert re.search("expected: at least .* GiB and .* s on cpu", err)
    assert all(f", {what}]" in err for what in ("N-pass", "N-pass in float64", "single pass"))
    assert "conversations.jsonl:1, message 2: largest difference of gradients " in err
    for text in ("Qwen3ForCausalLM, 1 layer,", "float32 on cpu", "2 conversations, ", "whole step"):
        assert text in out
    assert re.search("backend +cpu: flash kernels", out)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["proved"] is True
    assert [finding["name"] for finding in report["findings"]] == ["template", *CHECKS]
    assert all(finding["ok"] for finding in report["findings"])
    assert report["turns"][0]["where"].endswith("conversations.jsonl:1")
    assert report["turns"][0]["gradients"]["attention"]["difference"] < 1e-5
    assert report["control"]["mask"] == "plain causal"


def test_tokens_are_limited_by_leaving_out_the_last_turns(model_dir, data, capsys):
    chats = [Chat([Sample([1] * size, [1] * size) for size in sizes]) for sizes in ((5, 9), (2, 2))]
    for limit, lengths in ((1, [1]), (14, [2]), (17, [2, 1]), (18, [2, 2])):
        kept, left_out = within(chats, limit)
        assert [len(chat.samples) for chat in kept] == lengths
        assert (left_out is None) == (sum(lengths) == 4)
    assert verify(model_dir, data, "--max_verify_tokens", 600) == 0
    assert re.search("[0-9]+ turns of 10 left out, beyond --max_ver.* 600", capsys.readouterr().out)


def test_the_report_names_each_backend_that_was_called():
    choices = {
        BackendChoice("varlen", "FlashAttention"): 2,
        BackendChoice("flex", "7 keys"): 1,
        BackendChoice("flex", "9 keys"): 3,
    }
    named = "varlen in 2 calls: FlashAttention; flex in 4 calls: 7 keys"
    assert describe_choices(choices) == named


def test_a_broken_backend_has_exit_code_1(model_dir, data, monkeypatch, capsys):
    monkeypatch.setattr("flexmask.backends.api._implementation", lambda name: causal_attention)
    assert verify(model_dir, data, "--conversations", 2, "--json") == 1
    assert json.loads(capsys.readouterr().out)["proved"] is False


def test_a_template_that_does_not_continue_its_prompt_is_a_finding(model_dir, data, capsys):
    template = (
        "{{ messages | length }}{% for m in messages %}{{ m.role }}: {{ m.reasoning_content }}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (model_dir / "bad.jinja").write_text(template)
    assert verify(model_dir, data, "--chat_template", model_dir / "bad.jinja") == 1
    out = capsys.readouterr().out
    assert "FAILED  template" in out
    assert "does not continue its own prompt" in out
    assert "NOT proved: template" in out


def test_dropout_left_on_is_a_finding(model_dir, data, capsys):
    write_model(model_dir, attention_dropout=0.1)
    assert verify(model_dir, data) == 1
    out = capsys.readouterr().out
    assert "FAILED  dropout" in out
    assert "attention_dropout = 0.1" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "no/such/place"), "no/such/place: no such folder"),
        (("--conversations", 0), "--conversations must be at least 1, got 0"),
        (("--device", "nowhere"), "--device nowhere cannot be used"),
        (("--device", "cpu", "--backend", "triton"), "backend 'triton' needs CUDA tensors"),
        (("--backend", "flex", "--kernel_options", '{"M": 1}'), "FlexAttention has no 'M'"),
        (("--chat_template", "none.jinja"), "none.jinja: no such file"),
        (("--json", "no/such/place/report.json"), "no such folder"),
        (("--sequence_parallel_size", 2), "must be the number of processes, 1, got 2; torchrun"),
    ],
)
def test_unusable_input_is_one_line(model_dir, data, monkeypatch, capsys, options, message):
    monkeypatch.chdir(model_dir)
    assert verify(model_dir, data, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("flexmask: error: ")
    assert message in error


def test_takes_several_files_and_refuses_what_is_none(model_dir, data, tmp_path, capsys):
    lines = data.read_text().splitlines(keepends=True)
    weighed = json.loads(lines[0])  # weights, which N-pass does not know, change nothing
    weighed["messages"][-1]["weight"] = 0.5
    (tmp_path / "a.jsonl").write_text(json.dumps(weighed))
    (tmp_path / "b.jsonl").write_text(lines[1])
    assert verify(model_dir, tmp_path / "[ab].jsonl") == 0
    assert "[ab].jsonl: 2 conversations, " in capsys.readouterr().out
    assert verify(model_dir, "none.jsonl") == 2
    assert "flexmask: error: none.jsonl: no such file" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(model_dir, data, capsys):
    write_model(model_dir, vocab_size=100, pad_token_id=None)
    assert verify(model_dir, data) == 2
    assert "the tokenizer belongs to another model" in capsys.readouterr().err


def test_samples_may_share_a_trained_token():
    shared = [Sample([5, 6, 7, 8], [0, 0, 1, 1], 0), Sample([5, 6, 7, 9, 10], [0, 0, 1, 1, 1], 1)]
    report = verify_model(tiny_model("llama"), [Chat(shared)])
    assert names(report, ok=False) in ([], ["control"])
