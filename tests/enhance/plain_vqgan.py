"""A VQ-GAN of Esser et al. in plain functions, with its weights under the names of taming-transformers or LlamaGen."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

# Names inside of encoder and decoder. taming numbers decoder levels from the image up, LlamaGen from the codes down.
TAMING = {
    "down": "down.{i}.block.{j}",
    "down_attn": "down.{i}.attn.{j}",
    "down_conv": "down.{i}.downsample.conv",
    "up": "up.{i}.block.{j}",
    "up_attn": "up.{i}.attn.{j}",
    "up_conv": "up.{i}.upsample.conv",
    "mid": ("mid.block_1", "mid.attn_1", "mid.block_2"),
}
LLAMAGEN = {
    "down": "conv_blocks.{i}.res.{j}",
    "down_attn": "conv_blocks.{i}.attn.{j}",
    "down_conv": "conv_blocks.{i}.downsample.conv",
    "up": "conv_blocks.{k}.res.{j}",
    "up_attn": "conv_blocks.{k}.attn.{j}",
    "up_conv": "conv_blocks.{k}.upsample.conv",
    "mid": ("mid.0", "mid.1", "mid.2"),
}


@dataclass
class PlainVqGan:
    """Weights come into being where a function first asks for them: the names are those that the forward pass uses."""

    names: dict
    widths: tuple[int, ...]
    channels: int
    code_width: int
    codes: int
    blocks: int = 2
    device: str = "cpu"
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = None if self.device == "meta" else torch.Generator().manual_seed(0)
        self.weight("quantize.embedding.weight", self.codes, self.code_width, scale=1.0)
        size = 2 ** (len(self.widths) - 1)
        self.decode(self.encode(torch.zeros(1, 3, size, size, device=self.device)), 1)

    def weight(self, name: str, *shape: int, scale: float, around: float = 0.0) -> Tensor:
        if name not in self.state:
            noise = torch.randn(*shape, generator=self.generator, device=self.device)
            self.state[name] = around + scale * noise
        return self.state[name]

    def conv(self, name: str, x: Tensor, out: int, kernel: int = 3, **options) -> Tensor:
        w = self.weight(f"{name}.weight", out, x.shape[1], kernel, kernel, scale=(x.shape[1] * kernel**2) ** -0.5)
        return F.conv2d(x, w, self.weight(f"{name}.bias", out, scale=0.1), **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        c = x.shape[1]
        scale, shift = (
            self.weight(f"{name}.weight", c, scale=0.1, around=1.0),
            self.weight(f"{name}.bias", c, scale=0.1),
        )
        grouped = x.reshape(len(x), 32, -1)
        mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, unbiased=False)
        grouped = (grouped - mean) / (variance + 1e-6).sqrt()
        return grouped.reshape(x.shape) * scale[:, None, None] + shift[:, None, None]

    def block(self, name: str, x: Tensor, out: int) -> Tensor:
        h = self.conv(f"{name}.conv1", swish(self.norm(f"{name}.norm1", x)), out, padding=1)
        h = self.conv(f"{name}.conv2", swish(self.norm(f"{name}.norm2", h)), out, padding=1)
        return (x if x.shape[1] == out else self.conv(f"{name}.nin_shortcut", x, out, 1)) + h

    def attention(self, name: str, x: Tensor) -> Tensor:
        c, normed = x.shape[1], self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", normed, c, 1).flatten(2) for part in "qkv")
        chances = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / c**0.5, dim=2)
        mixed = torch.einsum("bij,bcj->bci", chances, v).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", mixed, c, 1)

    def middle(self, half: str, x: Tensor) -> Tensor:
        first, attention, second = self.names["mid"]
        c = x.shape[1]
        return self.block(
            f"{half}.{second}", self.attention(f"{half}.{attention}", self.block(f"{half}.{first}", x, c)), c
        )

    def encode(self, x: Tensor) -> Tensor:
        """Images in [-1, 1] (B, 3, H, W) to encodings (B, E, h, w)."""
        top = len(self.widths) - 1
        h = self.conv("encoder.conv_in", x, self.widths[0], padding=1)
        for i, width in enumerate(self.widths):
            for j in range(self.blocks):
                h = self.block("encoder." + self.names["down"].format(i=i, j=j), h, width)
                if i == top:
                    h = self.attention("encoder." + self.names["down_attn"].format(i=i, j=j), h)
            if i < top:
                h = self.conv("encoder." + self.names["down_conv"].format(i=i), F.pad(h, (0, 1, 0, 1)), width, stride=2)
        h = swish(self.norm("encoder.norm_out", self.middle("encoder", h)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", h, self.channels, padding=1), self.code_width, 1)

    def ids(self, x: Tensor, unit: bool) -> Tensor:
        """The nearest code of each encoding, by distances written out."""
        codes, z = self.state["quantize.embedding.weight"], self.encode(x).flatten(2).transpose(1, 2)
        if unit:
            codes, z = (y / y.norm(dim=-1, keepdim=True) for y in (codes, z))
        return (z[:, :, None] - codes).square().sum(-1).argmin(-1)

    def pixels(self, ids: Tensor, unit: bool) -> Tensor:
        """Images (B, 3, H, W), near [-1, 1], of token ids (B, N)."""
        codes = self.state["quantize.embedding.weight"]
        if unit:
            codes = codes / codes.norm(dim=-1, keepdim=True)
        side = int(ids.shape[1] ** 0.5)
        return self.decode(codes[ids].transpose(1, 2).reshape(len(ids), -1, side, side), side)

    def decode(self, z: Tensor, side: int) -> Tensor:
        top = len(self.widths) - 1
        h = self.conv("post_quant_conv", z, self.channels, 1)
        h = self.middle("decoder", self.conv("decoder.conv_in", h, self.widths[-1], padding=1))
        for i in range(top, -1, -1):
            for j in range(self.blocks + 1):
                h = self.block("decoder." + self.names["up"].format(i=i, k=top - i, j=j), h, self.widths[i])
                if i == top:
                    h = self.attention("decoder." + self.names["up_attn"].format(i=i, k=top - i, j=j), h)
            if i > 0:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = self.conv("decoder." + self.names["up_conv"].format(i=i, k=top - i), h, self.widths[i], padding=1)
        return self.conv("decoder.conv_out", swish(self.norm("decoder.norm_out", h)), 3, padding=1)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
