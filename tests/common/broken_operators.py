"""Operators, layers, maps, backbones and gates: good ones, and ones with a single flaw each."""

from __future__ import annotations

import torch
from torch import nn

from foveate.vision import Backbone


# ------------------------------------------------------------------------------------------------ operators
def softmax(q, k, v, *, causal=False):
    """Good: attention with grouped heads."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = q @ k.mT * q.shape[3] ** -0.5
    if causal:
        s = s.masked_fill(
            torch.ones(s.shape[2:], dtype=torch.bool).triu(1 + s.shape[3] - s.shape[2]), -torch.inf
        )
    return torch.softmax(s, -1) @ v


class Linear:
    """Good: causal linear attention with a state."""

    def initial_state(self, q, k, v):
        shape = (*k.shape[:2], k.shape[3])
        return torch.zeros(*shape, v.shape[3]).to(v), torch.zeros(shape).to(v)

    def features(self, x):
        return torch.nn.functional.elu(x) + 1

    def __call__(self, q, k, v, state=None):
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"as many key heads as query heads are needed, got {k.shape[1]} and {q.shape[1]}"
            )
        s, z = self.initial_state(q, k, v) if state is None else state
        f, g = self.features(q), self.features(k)
        memory = s.unsqueeze(2) + torch.einsum("bhnd,bhne->bhnde", g, v).cumsum(2)
        total = z.unsqueeze(2) + g.cumsum(2)
        out = torch.einsum("bhnd,bhnde->bhne", f, memory) / torch.einsum(
            "bhnd,bhnd->bhn", f, total
        ).unsqueeze(-1)
        return out if state is None else (out, (memory[:, :, -1], total[:, :, -1]))


def turned(q, k, v):
    return softmax(q, k, v).mT


def widened(q, k, v):
    return softmax(q, k, v).float()


def coarse(q, k, v):
    if q.dtype != torch.float32:
        return softmax(q, k, v)
    return softmax(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()


def stopped(q, k, v):
    return softmax(q, k.detach(), v)


def mixing(q, k, v):
    return softmax(q, k - k.mean(0, keepdim=True), v)


def raw(q, k, v):
    steps = (k[0].numel(), k[0, 0].numel(), k.shape[3], 1)
    return softmax(q, torch.as_strided(k, k.shape, steps, k.storage_offset()), v)


def interleaved(q, k, v):
    return softmax(
        q, k.repeat(1, q.shape[1] // k.shape[1], 1, 1), v.repeat(1, q.shape[1] // k.shape[1], 1, 1)
    )


def curt(q, k, v):
    if q.shape[1] != k.shape[1]:
        raise ValueError("no")
    return softmax(q, k, v)


def overflowing(q, k, v):
    p = (q @ k.mT * q.shape[3] ** -0.5).exp()
    return p @ v / p.sum(-1, keepdim=True)


def noisy(q, k, v):
    return softmax(q, k, v) + 1e-6 * torch.randn(())


def scribbling(q, k, v):
    q *= q.shape[3] ** -0.5
    return softmax(q, k, v)


def length_scaled(q, k, v):
    return softmax(q * q.shape[2] ** 0.5, k, v, causal=True)


def squared(q, k, v):
    return softmax(q + k.mean(2, keepdim=True), k, v + q)


class Forgetful(Linear):
    """Starts anew at every segment."""

    def __call__(self, q, k, v, state=None):
        out = super().__call__(q, k, v, None if state is None else self.initial_state(q, k, v))
        return out


class Overwriting(Linear):
    """Writes the next state over the one it was given."""

    def __call__(self, q, k, v, state=None):
        out = super().__call__(q, k, v, state)
        if state is not None:
            for old, new in zip(state, out[1], strict=True):
                old.copy_(new)
        return out


# --------------------------------------------------------------------------------------------------- layers
class Mixer(nn.Module):
    """Good: causal linear attention between two projections, with dropout."""

    def __init__(self, dim=32, causal=True):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.drop, self.causal = nn.Dropout(0.2), causal

    def initial_state(self, x):
        q = x[:, None, :0]
        return Linear().initial_state(q, q, q)

    def mix(self, x, state):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)  # one head
        if not self.causal:
            return softmax(q, k, v).squeeze(1), None
        state = Linear().initial_state(q, k, v) if state is None else state
        out, state = Linear()(q, k, v, state=state)
        return out.squeeze(1), state

    def forward(self, x, state=None):
        mixed, after = self.mix(x, state)
        out = self.out(self.drop(mixed))
        return out if state is None else (out, after)


class Shrinking(Mixer):
    def forward(self, x, state=None):
        return super().forward(x)[:, :-1]


class Centred(Mixer):
    def forward(self, x, state=None):
        return super().forward(x - x.mean(0, keepdim=True))


class Secretive(Mixer):
    """Holds a tensor that no state_dict knows."""

    def __init__(self, dim=32):
        super().__init__(dim)
        self.hidden = torch.randn(dim)

    def forward(self, x, state=None):
        return super().forward(x) * self.hidden.to(x)


class Idle(Mixer):
    """Has a parameter that it does not use."""

    def __init__(self, dim=32):
        super().__init__(dim)
        self.spare = nn.Parameter(torch.ones(dim))


class Dead(Mixer):
    """Has a parameter whose gradient is always 0."""

    def __init__(self, dim=32):
        super().__init__(dim)
        self.spare = nn.Parameter(torch.ones(dim))

    def forward(self, x, state=None):
        return super().forward(x) + 0 * self.spare


class Unseeded(Mixer):
    """Draws its weights without torch's generator."""

    def __init__(self, dim=32):
        super().__init__(dim)
        g = torch.Generator()
        g.seed()
        with torch.no_grad():
            self.out.bias.copy_(torch.randn(dim, generator=g))


class Dropping(Mixer):
    """Drops weights in eval mode, too."""

    def forward(self, x, state=None):
        return torch.nn.functional.dropout(super().forward(x), 0.2, training=True)


class Scribbler(Mixer):
    def forward(self, x, state=None):
        x.mul_(0.5)
        return super().forward(x)


class Viewing(Mixer):
    """Asks for contiguous inputs by the way."""

    def forward(self, x, state=None):
        return super().forward(x.view(-1).view(x.shape))


class Looking(Mixer):
    """Not causal."""

    def forward(self, x, state=None):
        return super().forward(x + x.mean(1, keepdim=True))


class Restarting(Mixer):
    """Forgets its state."""

    def mix(self, x, state):
        return super().mix(x, None)


# ---------------------------------------------------------------------------------------------------- gates
class Gate(nn.Module):
    """Good: one weight per channel, from the mean over the map."""

    weight_range = (0.0, 1.0)

    def __init__(self, channels=32):
        super().__init__()
        self.fc = nn.Linear(channels, channels)
        self.norm = nn.BatchNorm1d(channels)

    def weights(self, x):
        return torch.sigmoid(self.norm(self.fc(x.mean((2, 3)))))[:, :, None, None]

    def forward(self, x):
        return x * self.weights(x)


class FlatGate(Gate):
    def forward(self, x):
        return super().forward(x).flatten(2)


class BatchGate(Gate):
    def weights(self, x):
        return super().weights(x.mean(0, keepdim=True))


class SecretGate(Gate):
    def __init__(self, channels=32):
        super().__init__(channels)
        self.hidden = torch.rand(channels)

    def forward(self, x):
        return super().forward(x) * self.hidden.to(x)[:, None, None]


class IdleGate(Gate):
    def __init__(self, channels=32):
        super().__init__(channels)
        self.spare = nn.Parameter(torch.ones(channels))


class UnseededGate(Gate):
    def __init__(self, channels=32):
        super().__init__(channels)
        g = torch.Generator()
        g.seed()
        with torch.no_grad():
            self.fc.bias.copy_(torch.randn(channels, generator=g))


class NoisyGate(Gate):
    def forward(self, x):
        return super().forward(x) + torch.rand(())


class ScribbleGate(Gate):
    def forward(self, x):
        return x.mul_(self.weights(x))


class RawGate(Gate):
    def forward(self, x):
        return super().forward(x.view(-1).view(x.shape))


class WideGate(Gate):
    def weights(self, x):
        return 2 * super().weights(x)


class VagueGate(nn.Module):
    """Declares a range, and has no weights to look at."""

    weight_range = (0.0, 1.0)

    def __init__(self, channels=32):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return x * self.scale


# ------------------------------------------------------------------------------------------------ maps, backbones
class Local(nn.Module):
    """Good: a depthwise convolution on (batch, height, width, dim)."""

    def __init__(self, dim=32):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x):
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class FlatMap(Local):
    def forward(self, x):
        return super().forward(x).flatten(1, 2)


class BatchMap(Local):
    def forward(self, x):
        return super().forward(x - x.mean(0, keepdim=True))


class Pyramid(Backbone):
    """Good: two convolutions."""

    def __init__(self, num_classes=5, features_only=False):
        super().__init__(
            channels=(4, 6), strides=(2, 4), num_classes=num_classes, features_only=features_only
        )
        self.one, self.two = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.make_head(nn.LayerNorm(6))

    def forward_features(self, images):
        self.check(images)
        fine = torch.relu(self.one(images))
        return [fine, self.two(fine)]


class WrongStride(Pyramid):
    def forward_features(self, images):
        return [m[:, :, ::2] for m in super().forward_features(images)]


class ScoresOnly(Pyramid):
    def forward(self, images):
        return (
            self.forward_head(self.forward_features(images))
            if self.features_only
            else super().forward(images)
        )


class Fixed(Pyramid):
    def forward_features(self, images):
        if images.shape[2] % 4:
            raise ValueError("this size does not fit")
        return super().forward_features(images)


class FlatScores(Pyramid):
    def forward(self, images):
        return super().forward(images).flatten()


class BatchPyramid(Pyramid):
    def forward_features(self, images):
        return super().forward_features(images - images.mean(0, keepdim=True))


def flawed(base, flaw):
    """A class of modules like `base`, with one flaw."""

    class Flawed(base):
        def __init__(self, **options):
            super().__init__(**options)
            if flaw == "idle":
                self.spare = nn.Parameter(torch.ones(2))
            if flaw == "secret":
                self.hidden = torch.rand(())
            if flaw == "unseeded":
                g = torch.Generator()
                g.seed()
                with torch.no_grad():
                    next(self.parameters()).copy_(torch.randn(next(self.parameters()).shape, generator=g))

        def forward(self, x):
            if flaw == "scribbling":
                x.mul_(2)
            if flaw == "raw":
                x = x.view(-1).view(x.shape)
            out = super().forward(x)
            if isinstance(out, list):
                return out
            if flaw == "noisy":
                out = out + torch.rand(())
            return out * self.hidden.to(out) if flaw == "secret" else out

    return Flawed
