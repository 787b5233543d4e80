"""Attention and dropout of the transformers on a CPU: torch's own beside ours, in training.

    python benchmarks/bench_attention.py [--batch 16] [--tokens 196] [--heads 8] [--width 256]

Forward and backward of what one attention layer of UniAD takes, with its neighbour mask; and of one
dropout on the hidden tokens of its feed-forward part.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import interleaved, print_ratios
from torch import Tensor

from allgood.layers.attention import neighbour_mask, softmax_attention
from allgood.layers.dropout import dropout

CPU = torch.device("cpu")


def both_ways(work: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """Forward and backward; `inputs` take gradients."""
    gradient = torch.randn_like(work(*inputs))

    def once() -> None:
        torch.autograd.grad(work(*inputs), inputs, gradient)

    return once


def compare(name: str, sides: dict[str, Callable[[], None]], rounds: int) -> None:
    median = interleaved(sides, rounds, CPU)
    print_ratios(name, {name: median["ours"], "torch": median["torch"]}, ("torch",), per=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=196, help="a square number")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    grid = round(arguments.tokens**0.5)
    mask = neighbour_mask(grid, grid, 7)
    split = (arguments.batch, arguments.tokens, arguments.heads, -1)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':<18}{'seconds':>12}{'a second':>12}{'over torch':>12}")
    for dtype in (torch.float32, torch.bfloat16):
        precision = "fp32" if dtype == torch.float32 else "bf16"
        for probability in (0.0, 0.1):
            inputs = [
                torch.randn(arguments.batch, arguments.tokens, arguments.width, dtype=dtype)
                .view(split)
                .transpose(1, 2)
                .requires_grad_()
                for _ in range(3)
            ]

            def theirs(q: Tensor, k: Tensor, v: Tensor, p: float = probability) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)

            def ours(*x: Tensor, p: float = probability) -> Tensor:
                return softmax_attention(*x, mask=mask, probability=p)

            sides = {"torch": both_ways(theirs, *inputs), "ours": both_ways(ours, *inputs)}
            compare(f"attention {precision} {probability}", sides, arguments.rounds)
        x = torch.randn(arguments.batch, arguments.tokens, 4 * arguments.width, dtype=dtype)
        x.requires_grad_()
        sides = {
            "torch": both_ways(lambda x: F.dropout(x, 0.1), x),
            "ours": both_ways(lambda x: dropout(x, 0.1, training=True), x),
        }
        compare(f"dropout {precision}", sides, arguments.rounds)


if __name__ == "__main__":
    main()
