"""Room 2: image (B, 3, H, W) in [0, 1] -> feature levels (B, C, h, w), from a frozen network.

`frozen.py` builds any backbone of timm's, and `unireplknet.py`, which timm has not; `lite0.py`
brings the weights of the embedded default; `efficientnet.py` knows the original PyTorch port's
names and padding; `tiled.py` reads large images piece by piece.
"""

RECOMMENDED = {
    "efficientnet_lite0": "embedded: its weights come with the installation; fast on a CPU",
    "vit_small_patch14_reg4_dinov2.lvd142m": "DINOv2 with registers, small (hub)",
    "vit_base_patch14_reg4_dinov2.lvd142m": "DINOv2 with registers, base (hub); recommended",
    "vit_large_patch14_reg4_dinov2.lvd142m": "DINOv2 with registers, large (hub)",
    "vit_small_patch14_dinov2.lvd142m": "DINOv2, small: AnomalyDINO's (hub)",
    "wide_resnet50_2.tv_in1k": "WideResNet-50-2 of torchvision: PatchCore's (hub)",
    "tf_efficientnet_b4.aa_in1k": "EfficientNet-B4: UniAD's and UniAS's (hub)",
    "unireplknet_n": "UniRepLKNet-N, not in timm: MiniMaxAD's (hub)",
    "any other timm backbone": "by its timm name; weights from the hub, a local file, or random",
}
"""Name, as `--encoder` takes it -> what it is."""
