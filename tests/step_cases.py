"""Small models and losses that between them use every operator a step's graph may hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 6


def image(channels: int = 3, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, channels, size, size)


def labels() -> Tensor:
    return torch.arange(BATCH) % 4


class Does(nn.Module):
    """A first layer, a function of its output, and a linear head on what that gives."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], first: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1) if first is None else first
        self.function = function
        self.head = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.first(x)).flatten(1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Tokens, PyTorch's attention module, attention by hand, a class token."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8) * 0.02)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, dropout, batch_first=True)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.attention(*[self.norm(x)] * 3, need_weights=False)[0]
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.gelu(mixed.transpose(1, 2).reshape(batch, tokens, 8))
        return self.head(x[:, 0])  # type: ignore[no-any-return]


class Words(nn.Module):
    """Token indices: no layer reads them before they are embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).mean(1))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One layer on two inputs, one of them given by keyword, and weights that are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.unused = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(2, 2)
        self.mid.weight = self.first.weight
        self.head = nn.Linear(12, 4)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor, *, other: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.first(x)) + self.first(other)
        return {"logits": self.head(self.mid(hidden)), "hidden": hidden}


@dataclass(frozen=True)
class Case:
    """A model, a batch for it and a loss.

    Attributes:
        build: Makes the model.
        input: Makes its input.
        loss: Of its output and the targets.
        targets: Makes them.
        other: Makes the keyword input `other`.
    """

    build: Callable[[], nn.Module]
    input: Callable[[], Tensor] = field(default_factory=image)
    loss: Callable[..., Tensor] = F.cross_entropy
    targets: Callable[[], Tensor] = labels
    other: Callable[[], Tensor] | None = None


def does(
    function: Callable[[Tensor], Tensor], first: nn.Module | None = None, **options: Any
) -> Case:
    return Case(lambda: Does(function, first), **options)


def stack(*modules: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(make() for make in modules))


def frozen_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    head = nn.LazyLinear(4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm.eval(), nn.ReLU(), nn.Flatten(), head)


def upsampled(z: Tensor) -> Tensor:
    larger = F.interpolate(z, scale_factor=2, mode="nearest")
    return F.interpolate(larger, size=(5, 7), mode="bilinear", align_corners=False)


def average_pools(z: Tensor) -> Tensor:
    pools = [
        F.avg_pool2d(F.pad(z, (1, 1, 1, 1)), 3, 1, 1, count_include_pad=False),
        F.avg_pool2d(z, 3, 2, 1, ceil_mode=True),
        F.avg_pool2d(z, (3, 2), 2, 1, True, False),
        F.avg_pool2d(z, 3, 2, 1, ceil_mode=True, divisor_override=5),
    ]
    return torch.cat([pool.flatten(1) for pool in pools], 1)


def padded(z: Tensor) -> Tensor:
    z = F.pad(F.pad(z, (1, 2, 0, 1)), (1, 1, 1, 1), "reflect")
    return F.pad(F.pad(z, (1, 0, 2, 1), "replicate"), (1, 1, 1, 1), "circular")


def activated(z: Tensor) -> Tensor:
    soft = F.softplus(z) + F.mish(z) + F.softsign(z) + F.gelu(z, approximate="tanh")
    hard = F.relu6(z) + F.hardsigmoid(z) + F.hardtanh(z)
    return soft + hard + F.selu(z) + F.celu(z) + F.logsigmoid(z)


def computed(z: Tensor) -> Tensor:
    roots = (z * z + 1).sqrt() + z.square().add(1).rsqrt() + (z * z + 2).reciprocal()
    return roots + (z.abs() + 1).log() + z.exp().clamp(max=2) + z.pow(3) / 9 + z.sin() * z.cos()


def reduced(z: Tensor) -> Tensor:
    sizes = [z.norm(dim=(2, 3)), z.std((2, 3)), z.var(3).mean(2), z.logsumexp((2, 3))]
    return torch.cat([*sizes, z.amax((2, 3)), z.max(3).values.min(2).values], 1)


def reshaped(z: Tensor) -> Tensor:
    rolled = torch.roll(F.pixel_shuffle(z, 2), (1, -1), (2, 3)).flip(3)
    return rolled.reshape(z.shape[0], 4, -1)[:, :, ::2]


def in_pieces(z: Tensor) -> Tensor:
    products = [a * b for a, b in zip(z.chunk(2, 1), z.split(2, 1), strict=True)]
    chosen = z.masked_fill(z < 0, 0.5) + torch.where(z > 1, z, -z)
    return torch.stack(products, 1)[:, 0].repeat(1, 2, 1, 1) + chosen


def multiplied(z: Tensor) -> Tensor:
    two = torch.matmul(z[:, :, 0], z[:, :, 1].transpose(1, 2))
    return torch.einsum("bchw,bdhw->bcd", z, z) + two + F.normalize(z, dim=1).sum((2, 3))[:, None]


def joined(*functions: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.cat([function(z).flatten(1) for function in functions], 1)


def positive(z: Tensor) -> Tensor:
    return z.abs() + 0.5


COMPARED = (
    lambda z: torch.maximum(z, z.flip(1)) + torch.minimum(z, z.roll(1, 1)),
    lambda z: torch.where(z > z.flip(1), z, z.mean()) + torch.where(z <= z.flip(1), z, 0.0),
    lambda z: torch.where((z == z.flip(1)) | ~(z > 0), z, 1.0),
    lambda z: z.clamp_max(0.5) + z.clamp_min(-0.2) + z.clamp(-1, 1),
    lambda z: z.amin(1) + z.amax(1) + z.detach().aminmax(dim=1)[0] + z.max() - z.min(),
    lambda z: z * (z.argmax(1, keepdim=True) == 1),
    lambda z: z.flatten(1).topk(5)[0] + z.flatten(1).sort(1)[0][:, :5],
    lambda z: z.masked_fill(z > 0, float("-inf")).softmax(1).nan_to_num(0.0),
    lambda z: torch.where(torch.isnan(z) | torch.isinf(z), 0.0, z) + torch.isfinite(z),
    lambda z: z.norm(1, dim=1) + z.norm(float("inf"), dim=1),
)  # fmt: skip
ROUNDED = (
    lambda z: z * z.round() + z.floor() * z.ceil() * 0.1 + z * z.trunc(),
    lambda z: z.remainder(1.0) + z.fmod(0.7) + torch.div(z, 0.3, rounding_mode="floor"),
    lambda z: z * z.new_full((1,), 2.0) + torch.full_like(z, 0.5) + torch.full((4, 1, 1), 3.0),
    lambda z: z * torch.linspace(-1, 1, 8) + z.triu() + z.tril(1),
)
COMPUTED = (
    lambda z: positive(z) ** (z * 0.3) + 2**z + positive(z) ** 2.5 + positive(z) ** -1,
    lambda z: z.atan() + z.sinh() + z.cosh() + (z * 0.1).asin() + (z * 0.1).acos(),
    lambda z: z.tan() * 0.01 + z.asinh() + (z * 0.1).atanh() + z.erfc() + z.expm1() + z.exp2(),
    lambda z: positive(z).log2() + positive(z).log10() + torch.logaddexp(z, z.flip(1)),
    lambda z: z * torch.logaddexp(*[z.detach().relu().sign().log()] * 2).exp(),
    lambda z: z.cumsum(1) + torch.lerp(z, z.flip(1), 0.3),
    lambda z: torch.addcdiv(z, z, z.abs() + 1) + torch.addcmul(z, z, z),
    lambda z: torch.baddbmm(z[:, 0], z[:, 1], z[:, 2]),
    lambda z: torch.cross(z[:, :3], z[:, 1:4], dim=1) + torch.var_mean(z, 1, keepdim=True)[0],
    lambda z: torch.xlogy(z.abs(), z.abs() + 1) + torch.special.entr(positive(z)),
)  # fmt: skip
MOVED = (
    lambda z: F.unfold(z, 3, padding=1, stride=2),
    lambda z: F.fold(F.unfold(z, 2, stride=2), (8, 8), 2, stride=2),
    lambda z: F.interpolate(z, scale_factor=2, mode="bicubic"),
    lambda z: F.interpolate(z, size=(5, 6), mode="bicubic", align_corners=True),
    lambda z: F.interpolate(z, size=(5, 6), mode="nearest-exact"),
    lambda z: F.interpolate(z, size=(4, 4), mode="area"),
    lambda z: F.interpolate(z.unsqueeze(2), scale_factor=(2, 2, 2), mode="trilinear"),
    lambda z: F.adaptive_max_pool2d(z, (2, 4)),
    lambda z: F.adaptive_max_pool2d(z, 1),
)  # fmt: skip

SAMPLED = (
    *(
        lambda z, mode=mode, padding=padding, aligned=aligned: F.grid_sample(
            z, 1.4 * torch.tanh(z[:, :2, :5].permute(0, 2, 3, 1)), mode, padding, aligned
        )
        for mode, padding, aligned in (
            ("bilinear", "zeros", False), ("bilinear", "border", True),
            ("bilinear", "reflection", False), ("nearest", "border", True),
            ("bicubic", "reflection", True), ("bicubic", "zeros", False),
        )
    ),
    lambda z: F.grid_sample(z, F.affine_grid(_theta(z), z.size(), align_corners=True),
                            align_corners=True),
    lambda z: F.grid_sample(z[:, :, None], torch.tanh(z[:, :3, None, :4].permute(0, 2, 3, 4, 1)),
                            padding_mode="reflection", align_corners=True),
)  # fmt: skip
COMPOSED = (
    lambda z: z.flatten(2)[:, :, :6].prod(-1) + z.flatten(2)[:, :, :5].relu().prod(2),
    lambda z: z.flatten(2)[:, :, :7].cumprod(2) + z.flatten(2)[:, :, :7].logcumsumexp(2),
    lambda z: torch.cdist(z.flatten(2), z.flatten(2)) + torch.cdist(z[:, :, 0], z[:, :, 0], 1.0),
    lambda z: torch.cdist(z[:, :, 0], z[:, :, 1], 3.0),
    lambda z: F.adaptive_max_pool2d(z.relu(), (3, 5)),
    lambda z: F.adaptive_max_pool3d(z[:, None], (3, 5, 3)),
    lambda z: F.adaptive_max_pool1d(z.flatten(2), 7),
    lambda z: z.flatten(2).median(2).values + z.flatten(2).kthvalue(9, 2).values,
    lambda z: z.unfold(2, 3, 2).mean(-1) + z.diagonal(1, 2, 3).sum(-1)[:, :, None, None],
    lambda z: z * z.flatten(2).diagonal(-1, 1, 2).sum(-1)[:, None, None, None],
    lambda z: torch.atan2(z, z.flip(1) + z.flip(1).sign()) + torch.hypot(z, positive(z)),
    lambda z: torch.sinc(positive(z)),
    lambda z: torch.logit(z.sigmoid()) + z.frac() + z.deg2rad() + z.rad2deg() / 90,
    lambda z: F.one_hot(z.flatten(2).argmax(2), 64).to(z) + z.flatten(2) * z.nanmean(),
    lambda z: z * torch.div(torch.arange(8), 3, rounding_mode="floor") + z @ torch.eye(8).to(z),
    lambda z: z * torch.bucketize(torch.arange(8.0), torch.tensor([2.0, 5.0])),
    lambda z: z * z.isnan().logical_not().all() + torch.diag_embed(z[:, :, 0]),
)  # fmt: skip


def _theta(z: Tensor) -> Tensor:
    """The identity at first, whose positions at the borders are where PyTorch's own are."""
    return torch.eye(2, 3) + z[:, :1, :2, :3].flatten(1).reshape(-1, 2, 3) * 0


class Recurrent(nn.Module):
    """Every kind of layer, both directions, upon each other, projected, and cell by cell."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.lstm = nn.LSTM(6, 4, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 4, bias=False)
        self.projected, self.cell = nn.LSTM(4, 5, proj_size=3), nn.GRUCell(3, 4)
        self.elman, self.other = nn.RNN(4, 4, nonlinearity="relu"), nn.LSTMCell(4, 4)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, (last, _) = self.lstm(self.first(x))
        y = self.projected(self.gru(y.transpose(0, 1))[0])[0]
        hidden, state = self.cell(y[0]), None
        for step in self.elman(torch.stack([self.cell(one, hidden) for one in y]))[0]:
            state = self.other(step, state)
        assert state is not None
        return self.head(torch.cat([state[0], last[-1]], 1))  # type: ignore[no-any-return]


def logits_loss(output: dict[str, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"], y)


CASES: dict[str, Case] = {
    "conv1d": Case(
        stack(
            lambda: nn.Conv1d(2, 8, 5, 2, 2), lambda: nn.BatchNorm1d(8), nn.ReLU,
            lambda: nn.AvgPool1d(3, 2, 1), lambda: nn.Conv1d(8, 8, 3), lambda: nn.LeakyReLU(0.1),
            lambda: nn.AdaptiveAvgPool1d(1), nn.Flatten, lambda: nn.Linear(8, 4),
        ),
        lambda: torch.randn(BATCH, 2, 24),
    ),
    "conv2d": Case(
        stack(
            lambda: nn.Conv2d(4, 8, 3, 2, 1, groups=2), lambda: nn.BatchNorm2d(8), nn.Hardswish,
            lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
            lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4), nn.ELU,
            lambda: nn.MaxPool2d(3, 2, 1), nn.Flatten, lambda: nn.LazyLinear(4),
        ),
        image(4, 12),
    ),
    "conv3d": Case(
        stack(
            lambda: nn.Conv3d(2, 6, (2, 3, 3), (1, 2, 1), (1, 0, 1)), lambda: nn.BatchNorm3d(6),
            nn.ReLU, lambda: nn.MaxPool3d(2, ceil_mode=True), lambda: nn.Conv3d(6, 4, 1),
            lambda: nn.AvgPool3d(2, 1), nn.Flatten, lambda: nn.LazyLinear(4),
        ),
        lambda: torch.randn(BATCH, 2, 4, 8, 6),
    ),
    "transposed": Case(
        stack(
            lambda: nn.Conv2d(3, 4, 3, padding=1), lambda: nn.GroupNorm(2, 4), nn.SiLU,
            lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2),
            lambda: nn.InstanceNorm2d(6, affine=True), nn.Flatten, lambda: nn.LazyLinear(4),
        ),
    ),
    "many channels": Case(
        stack(
            lambda: nn.Conv2d(3, 16, 3, 1, 1), nn.Tanh,
            lambda: nn.Conv2d(16, 20, (3, 2), (2, 1), (1, 0), (1, 2)), nn.Tanh,
            lambda: nn.ConvTranspose2d(20, 16, 3, 2, 1, output_padding=1), nn.Tanh,
            lambda: nn.Conv2d(16, 17, 1), lambda: nn.Flatten(2),
            lambda: nn.Conv1d(17, 4, 5, 3, 2), nn.Flatten, lambda: nn.LazyLinear(4),
        ),
    ),
    "frozen norm": Case(frozen_norm),
    "attention": Case(Attention),
    "words": Case(Words, lambda: torch.randint(0, 9, (BATCH, 5))),
    "tied": Case(
        Twice, lambda: torch.randn(BATCH, 12), logits_loss, other=lambda: torch.randn(BATCH, 12)
    ),
    "linear, many rows": Case(
        stack(lambda: nn.Linear(5, 8), nn.Tanh, nn.Flatten, lambda: nn.LazyLinear(4)),
        lambda: torch.randn(BATCH, 7, 5),
    ),
    "linear, few rows": Case(
        stack(nn.Flatten, lambda: nn.Linear(192, 8), nn.Tanh, lambda: nn.Linear(8, 4))
    ),
    "patches, few rows": Case(
        stack(lambda: nn.Conv2d(3, 6, 8, 8), nn.Tanh, nn.Flatten, lambda: nn.Linear(6, 4))
    ),
    "adaptive pool": does(lambda z: F.adaptive_avg_pool2d(z, (3, 5))),
    "compared": does(joined(*COMPARED)),
    "rounded": does(joined(*ROUNDED)),
    "computed": does(joined(*COMPUTED)),
    "moved": does(joined(*MOVED)),
    "sampled": does(joined(*SAMPLED)),
    "composed": does(joined(*COMPOSED)),
    "recurrent": Case(Recurrent, lambda: torch.randn(BATCH, 3, 5)),
    "average pools": does(average_pools),
    "upsampled": does(upsampled),
    "padded": does(padded),
    "activations": does(activated),
    "gated": does(lambda z: F.glu(z, 1) * z[:, :2].softmax(1) * z[:, 2:].sigmoid()),
    "arithmetic": does(computed),
    "reductions": does(reduced),
    "shapes": does(reshaped),
    "pieces": does(in_pieces),
    "products": does(multiplied),
    "probabilities": Case(
        stack(nn.Flatten, lambda: nn.Linear(27, 6), nn.Tanh, lambda: nn.Linear(6, 4)),
        image(3, 3), targets=lambda: torch.rand(BATCH, 4).softmax(1),
    ),
    "learned": does(
        lambda z: z, nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.LayerNorm([6, 6]))
    ),
}  # fmt: skip
