"""
The language loss of a training step: logits at labelled tokens only and probabilities in parts, against logits of all
tokens. Time and peak memory of tensors, with the vocabulary and the width of a small language model.

    python perf/language_loss.py
"""

import torch
from measure import compare
from torch import nn

from modules_plum import IGNORE_INDEX, language_modeling_loss

ROWS, TOKENS, ANSWER_TOKENS, WIDTH, VOCABULARY = 2, 832, 240, 512, 32_064


def main() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    states = torch.randn(ROWS, TOKENS, WIDTH, generator=generator).requires_grad_()
    labels = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels[:, :-ANSWER_TOKENS] = IGNORE_INDEX
    count = labels.ne(IGNORE_INDEX).sum()

    def all_logits() -> torch.Tensor:
        return nn.functional.cross_entropy(head(states)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def labelled_logits() -> torch.Tensor:
        return language_modeling_loss(head, states, labels, count)

    def gradients(loss) -> list[torch.Tensor]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value, (states, head.weight))]

    return compare(
        f"language loss, vocabulary {VOCABULARY:,}",
        old=lambda: gradients(all_logits),
        new=lambda: gradients(labelled_logits),
        target=1.0,
        memory_target=0.5,
        rows=ROWS,
        tokens=TOKENS,
        answer_tokens=ANSWER_TOKENS,
        width=WIDTH,
    )


if __name__ == "__main__":
    main()
