"""Dinomaly as its paper describes it, pass by pass: what `bench_dinomaly.py` measures against.

Float32, unfused attention, all kept layers stacked, a loss with a hook, an optimizer that asks the
GPU once per tensor, maps in four passes.

Letters: B images, L kept layers, N tokens with prefix, P patches, C channels, h w grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.encoders.frozen import middle_levels

LEARNING_RATE = 2e-3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PlainEncoderBlock(nn.Module):
    """A DINOv2 block whose attention keeps its N x N scores; parameters are named as timm's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        packed = self.attn["qkv"](self.norm1(x)).reshape(images, tokens, 3, self.heads, 64)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        scores = (q * 64**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, N, N)
        out = (scores @ v).transpose(1, 2).reshape(images, tokens, width)
        x = x + self.ls1["gamma"] * self.attn["proj"](out)
        return x + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainEncoder(nn.Module):
    """A DINOv2 with registers, frozen; the residual stream after each kept block."""

    def __init__(self, width: int, depth: int, kept: tuple[int, ...]) -> None:
        super().__init__()
        self.kept = kept
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 14, stride=14)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, 4, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 37 * 37, width))
        self.blocks = nn.ModuleList(PlainEncoderBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, image: Tensor, all_blocks: bool) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] -> L x (B, N, C)."""
        x = self.patch_embed["proj"]((image - self.mean) / self.std)
        grid = self.pos_embed.reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
        scale = tuple((side + 0.1) / 37 for side in x.shape[-2:])
        x = x + F.interpolate(grid, scale_factor=scale, mode="bicubic")
        prefix = torch.cat([self.cls_token, self.reg_token], dim=1).expand(len(image), -1, -1)
        x = torch.cat([prefix, x.flatten(2).transpose(1, 2)], dim=1)
        layers = []
        for index, block in enumerate(self.blocks):
            if index > self.kept[-1] and not all_blocks:
                break
            x = block(x)
            if index in self.kept:
                layers.append(x)
        return layers


class PlainDecoderBlock(nn.Module):
    """A decoder block; parameters are named as ours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1 = nn.LayerNorm(width, eps=1e-8)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.norm2 = nn.LayerNorm(width, eps=1e-8)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        packed = self.attn["qkv"](self.norm1(x)).reshape(images, tokens, 3, self.heads, 64)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        context = torch.einsum("bhnd,bhne->bhde", k, v)
        inverse = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(dim=-2))
        out = torch.einsum("bhde,bhnd,bhn->bhne", context, q, inverse)
        x = x + self.attn["proj"](out.transpose(1, 2).reshape(images, tokens, width))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainDinomaly(nn.Module):
    """The reference's model, training loss and map."""

    def __init__(self, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.encoder = PlainEncoder(width, depth, middle_levels(depth))
        self.bottleneck = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.decoder = nn.ModuleList(PlainDecoderBlock(width) for _ in range(8))

    def forward(self, image: Tensor, all_blocks: bool) -> tuple[list[Tensor], list[Tensor]]:
        """(B, 3, H, W) -> two groups of the encoder and two of the decoder, (B, C, h, w) each."""
        layers = self.encoder(image, all_blocks)
        x = torch.stack(layers, dim=1).mean(dim=1)
        x = F.dropout(x, self.dropout, self.training)
        x = F.dropout(F.gelu(self.bottleneck["fc1"](x)), self.dropout, self.training)
        x = F.dropout(self.bottleneck["fc2"](x), self.dropout, self.training)
        outputs = []
        for block in self.decoder:
            x = block(x)
            outputs.append(x)
        outputs = outputs[::-1]
        side = math.isqrt(x.shape[1] - 5)

        def groups(tokens: list[Tensor]) -> list[Tensor]:
            means = [torch.stack(tokens[i : i + 4], dim=1).mean(dim=1) for i in (0, 4)]
            return [
                mean[:, 5:].permute(0, 2, 1).reshape(len(mean), -1, side, side).contiguous()
                for mean in means
            ]

        return groups(layers), groups(outputs)

    def loss(self, image: Tensor, discard_rate: float, all_blocks: bool) -> Tensor:
        total = torch.zeros((), device=image.device)
        for target, group in zip(*self(image, all_blocks), strict=True):
            target = target.detach()
            with torch.no_grad():
                distance = 1 - F.cosine_similarity(target, group).unsqueeze(1)  # (B, 1, h, w)
            count = int(distance.numel() * (1 - discard_rate))
            easy = distance < torch.topk(distance.reshape(-1), count)[0][-1]
            total = total + (1 - F.cosine_similarity(target.flatten(1), group.flatten(1))).mean()
            if group.requires_grad:
                group.register_hook(lambda gradient, easy=easy: _shrunk(gradient, easy))
        return total / 2

    def predict(self, image: Tensor, all_blocks: bool) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> map (B, 1, 256, 256) and score (B,)."""
        maps = []
        for target, group in zip(*self(image, all_blocks), strict=True):
            distance = 1 - F.cosine_similarity(target, group).unsqueeze(1)
            maps.append(
                F.interpolate(distance, image.shape[-2:], mode="bilinear", align_corners=True)
            )
        whole = torch.cat(maps, dim=1).mean(dim=1, keepdim=True)
        whole = F.interpolate(whole, (256, 256), mode="bilinear", align_corners=False)
        line = torch.exp(-0.5 * (torch.arange(-2, 3, device=image.device) / 4) ** 2)
        line = line / line.sum()
        whole = F.conv2d(whole, (line[:, None] * line)[None, None], padding=2)
        ranked = whole.flatten(1).sort(dim=1, descending=True).values
        return whole, ranked[:, : int(ranked.shape[1] * 0.01)].mean(dim=1)


def _shrunk(gradient: Tensor, easy: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[easy.expand_as(gradient)] *= 0.1
    return gradient


class PlainOptimizer:
    """Tensor after tensor, and the size of each update is read by the host."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.moments = [[torch.zeros_like(p) for _ in range(3)] for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        correction1, correction2 = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for p, (mean, square, largest) in zip(self.parameters, self.moments, strict=True):
            assert p.grad is not None
            p.mul_(1 - LEARNING_RATE * 1e-4)
            mean.mul_(0.9).add_(p.grad, alpha=0.1)
            square.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            torch.maximum(largest, square, out=largest)
            denominator = (largest.sqrt() / math.sqrt(correction2)).add_(1e-10)
            rms = (p.grad / denominator).norm(2) / p.numel() ** 0.5
            rate = LEARNING_RATE / correction1 / max(1.0, rms.item())
            p.addcdiv_(mean, denominator, value=-rate)
