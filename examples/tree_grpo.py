"""TRL's GRPOTrainer over trees: the rollouts of a batch in one pass, every shared token once.

    python examples/tree_grpo.py

`TreeGRPOTrainer` stands where `trl.GRPOTrainer` does, with the same arguments. Log-probabilities
of the policy, of the policy that wrote the rollouts and of the reference each come from one pass
over the tree of the rollouts; all the rest is TRL's own: rewards, advantages, the loss in each of
its types, clipping, KL and entropy, what is logged. docs/beyond-chat.md has the settings.
"""

import tempfile
from typing import Any

import numpy as np
import torch
from comparison import small_model
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from flexmask import FlexmaskError, Sample, build_tree, pack, patch, read_conversations
from flexmask.demo import DATA_PATH, TOKENIZER_PATH


class TreeGRPOTrainer(GRPOTrainer):
    """GRPOTrainer, with the same loss and gradients, at the cost of the distinct tokens.

    It logs `padded_ratio`, the tokens of the padded batches for each that was computed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what GRPOTrainer takes; raises FlexmaskError for a model that cannot be exact."""
        super().__init__(*args, **kwargs)
        for model in (self.model, self.ref_model):
            if model is not None:
                patch(self.accelerator.unwrap_model(model))

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and entropies of the last `logits_to_keep` tokens, by their sequences.

        Args:
            model: the policy or the reference.
            input_ids: [B, T], prompts filled up on the left, completions on the right.
            attention_mask: [B, T].
            logits_to_keep: the columns of completions.
            batch_size: sequences in one pass; None for all.
            compute_entropy: else None in place of entropies.
            compute_aux_loss: of experts; else None.
            images: none of them may be there.

        Returns:
            Two tensors [B, logits_to_keep], 0 where there is no token, and the auxiliary loss.
        """
        given = [name for name, value in images.items() if value is not None]
        if given:
            raise FlexmaskError(f"a tree is of text only, got {', '.join(given)}; use GRPOTrainer")
        options = {"output_router_logits": True} if compute_aux_loss else {}
        passes = [
            self._score(model, ids, mask.bool(), logits_to_keep, options)
            for ids, mask in zip(
                input_ids.split(batch_size or len(input_ids)),
                attention_mask.split(batch_size or len(input_ids)),
                strict=True,
            )
        ]
        logprobs, entropies, aux_losses = zip(*passes, strict=True)
        return (
            torch.cat(logprobs),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    def _score(
        self,
        model: nn.Module,
        input_ids: Tensor,
        is_token: Tensor,
        logits_to_keep: int,
        options: dict[str, bool],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The three of `_get_per_token_logps_and_entropies` from one pass over one tree."""
        is_scored = is_token.clone()
        is_scored[:, :-logits_to_keep] = False
        if (is_scored == is_token).all(1).any():
            raise FlexmaskError("every prompt needs a token, from which a completion is predicted")
        ids, tokens, scored = (x.cpu().numpy() for x in (input_ids, is_token, is_scored))
        samples = [Sample(ids[b, own], scored[b, own], b) for b, own in enumerate(tokens)]
        (row,) = pack([build_tree(samples)])
        batch = row.to_batch()
        batch.pop("loss_weights", None)  # of targets that rollouts share; TRL has its own weights
        with self.accelerator.autocast():
            # TRL's head: of each position it gives the one target that the tree has for it
            outputs = model(
                **{name: value.to(input_ids.device) for name, value in batch.items()},
                **options,
                fused_lm_head=True,
            )
        before = np.zeros(ids.shape, np.int64)  # the packed position that predicts each token
        for b, index in enumerate(row.sample_indices):
            before[b, tokens[b]] = np.append(0, index[:-1])
        before = torch.from_numpy(before[:, -logits_to_keep:]).to(input_ids.device)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["padded_ratio"].append(input_ids.numel() / len(row))

        def by_sequence(scores: Tensor | None) -> Tensor | None:
            if scores is None:
                return None
            return scores[0, before].where(is_scored[:, -logits_to_keep:], 0)

        return by_sequence(outputs.log_probs), by_sequence(outputs.entropy), outputs.aux_loss


def main() -> None:
    """Two steps from the demo's conversations, of which the model writes the second message."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    chats = list(read_conversations(DATA_PATH))[:3]

    def variety(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [len(set(ids)) / len(ids) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        small_model().save_pretrained(folder)
        trainer = TreeGRPOTrainer(
            model=folder,
            reward_funcs=variety,
            args=GRPOConfig(
                folder,
                per_device_train_batch_size=24,  # three groups of eight, whole
                num_generations=8,
                steps_per_generation=1,
                num_iterations=2,
                max_completion_length=24,
                beta=0.04,
                max_steps=2,
                logging_steps=1,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict({"prompt": [chat.messages[:2] for chat in chats]}),
            processing_class=tokenizer,
        )
        trainer.train()
    for step, log in enumerate(trainer.state.log_history[:-1]):
        print(
            f"step {step}: loss {log['loss']:.6f}, kl {log['kl']:.6f}, entropy {log['entropy']:.4f}"
            f", {log['padded_ratio']:.2f} times fewer tokens"
        )


if __name__ == "__main__":
    main()
