"""The names and shapes of EfficientNet-B4 in the PyTorch port that UniAD's authors built on."""

STAGES = (  # repeats, kernel, expansion, channels in and out
    (2, 3, 1, 48, 24),
    (4, 3, 6, 24, 32),
    (4, 5, 6, 32, 56),
    (6, 3, 6, 56, 112),
    (6, 5, 6, 112, 160),
    (8, 5, 6, 160, 272),
    (2, 3, 6, 272, 448),
)


def batch_norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    four = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in four} | {f"{name}.num_batches_tracked": ()}


def b4_shapes(prefix: str = "") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"_conv_stem.weight": (48, 3, 3, 3)}
    shapes |= batch_norm("_bn0", 48)
    number = 0
    for repeats, kernel, expansion, first, out in STAGES:
        for i in range(repeats):
            block, inputs = f"_blocks.{number}", first if i == 0 else out
            inner, squeezed = inputs * expansion, inputs // 4
            if expansion > 1:
                shapes[f"{block}._expand_conv.weight"] = (inner, inputs, 1, 1)
                shapes |= batch_norm(f"{block}._bn0", inner)
            shapes[f"{block}._depthwise_conv.weight"] = (inner, 1, kernel, kernel)
            shapes |= batch_norm(f"{block}._bn1", inner)
            shapes[f"{block}._se_reduce.weight"] = (squeezed, inner, 1, 1)
            shapes[f"{block}._se_reduce.bias"] = (squeezed,)
            shapes[f"{block}._se_expand.weight"] = (inner, squeezed, 1, 1)
            shapes[f"{block}._se_expand.bias"] = (inner,)
            shapes[f"{block}._project_conv.weight"] = (out, inner, 1, 1)
            shapes |= batch_norm(f"{block}._bn2", out)
            number += 1
    shapes["_conv_head.weight"] = (1792, 448, 1, 1)
    shapes |= batch_norm("_bn1", 1792)
    shapes |= {"_fc.weight": (1000, 1792), "_fc.bias": (1000,)}
    return {prefix + name: shape for name, shape in shapes.items()}
