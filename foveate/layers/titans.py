"""Titans: a memory that learns while it reads, as a layer, and joined with short-range attention in three ways."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.core.merge import merge
from foveate.core.patterns import Causal, Sinks, SlidingWindow
from foveate.core.rotary import Rotary
from foveate.layers.norms import RMSNorm
from foveate.layers.short_conv import ShortConv
from foveate.linear.neural_memory import MemoryState, memorise, memory_read

MODES = ("mac", "mag", "mal", "lmm")


@dataclass(frozen=True, eq=False)
class NeuralMemoryState:
    """A `MemoryState` and the last conv - 1 projected tokens (B, conv - 1, 3 dim), which the convolution needs."""

    memory: MemoryState
    tail: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the memory and of the tail."""
        return self.memory.nbytes + self.tail.nbytes


@dataclass(frozen=True, eq=False)
class TitansState:
    """What a `TitansBlock` carries; immutable.

    Attributes:
        memory: of the neural memory.
        k, v: keys (rotated) and values that later queries still see, (B, H, L, D); None in lmm. In mac: of the tokens
            of the unfinished segment.
        read: mac: weights of the memory at the start of the segment.
        read_k, read_v: mac: keys and values of the persistent tokens and of what was read for the segment's tokens.
        position: tokens seen.
    """

    memory: NeuralMemoryState
    k: Tensor | None
    v: Tensor | None
    read: tuple[Tensor, ...]
    read_k: Tensor | None
    read_v: Tensor | None
    position: int

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, and of keys, values and weights that are held."""
        held = (self.k, self.v, self.read_k, self.read_v, *self.read)
        return self.memory.nbytes + sum(t.nbytes for t in held if t is not None)


class NeuralMemory(nn.Module):
    """A memory per head that learns key -> value while it reads (`foveate.linear.memorise`), and its projections.

        q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v));   q, k scaled to norm 1 per head
        eta = sigmoid(x w_eta + b),  theta = max_step sigmoid(x w_theta + b),  alpha = sigmoid(x w_alpha + b)
        y_t = M_{Theta_t}(q_t) after the step at t,   Theta_0 learned

    Args:
        dim: width of the tokens; heads: memories side by side, each of width dim / heads.
        depth: linear layers of the memory; 1 is a matrix. expansion: width of its hidden layers over its input's.
        chunk: tokens whose inner gradients are taken at the same weights.
        momentum, forget: False fixes eta, or alpha, to 0.
        conv: kernel of the causal convolution of every channel; 0: none.
        max_step: bound of theta; 0 never writes. The loss is a sum over features; of a mean it would be `dim / heads`
            times as much.
        clip: largest norm of a token's inner gradient, or None.
        activation: "silu" or "gelu", inside the memory.

    Shape: (B, N, dim) -> (B, N, dim), what was read: neither normalised nor projected.

    Source: Titans: Learning to Memorize at Test Time (2024). Forgetting starts at 0.0025 a token.

    >>> memory = NeuralMemory(32, heads=2, depth=2, chunk=16)
    >>> x = torch.randn(1, 50, 32)
    >>> y, state = memory(x[:, :37], state=memory.initial_state(x))
    >>> rest, state = memory(x[:, 37:], state=state)
    >>> torch.allclose(memory(x)[:, 37:], rest, atol=1e-5), state.memory.position
    (True, 50)
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        depth: int = 2,
        expansion: int = 2,
        chunk: int = 64,
        momentum: bool = True,
        forget: bool = True,
        conv: int = 4,
        max_step: float = 0.1,
        clip: float | None = 10.0,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        counts = {"heads": heads, "depth": depth, "expansion": expansion, "chunk": chunk, "conv": conv}
        for name, value in counts.items():
            least = 0 if name == "conv" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"NeuralMemory: {name} must be an int >= {least}, got {value!r}")
        if dim % heads:
            raise ValueError(f"NeuralMemory: dim must be a multiple of heads, got {dim} and {heads}")
        if not max_step >= 0:
            raise ValueError(f"NeuralMemory: max_step must be >= 0, got {max_step!r}")
        self.heads, self.depth, self.chunk = heads, depth, chunk
        self.momentum, self.forget, self.max_step = momentum, forget, max_step
        self.clip, self.activation = clip, activation
        d = dim // heads
        widths = [d, *[expansion * d] * (depth - 1), d]
        self.theta_0 = nn.ParameterList(
            torch.randn(heads, out, into) * into**-0.5 for into, out in itertools.pairwise(widths)
        )
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConv(3 * dim, conv, activation="silu") if conv else None
        self.rates = nn.Linear(dim, heads * (1 + momentum + forget))
        nn.init.zeros_(self.rates.bias)
        if forget:
            nn.init.constant_(self.rates.bias[-heads:], -6.0)

    def forward(
        self, x: Tensor, *, state: NeuralMemoryState | None = None
    ) -> Tensor | tuple[Tensor, NeuralMemoryState]:
        """y (B, N, dim); with the state of the tokens before, (y, state after these)."""
        before = self.initial_state(x) if state is None else state
        mixed, tail = self.qkv_proj(x), before.tail
        if self.conv is None:
            mixed = F.silu(mixed)
        else:
            mixed, tail = self.conv(mixed, state=tail)
        q, k, v = (self._heads(t) for t in mixed.chunk(3, -1))  # (B, H, N, D)
        eta, theta, alpha = self._rates(x)
        y, memory = memorise(
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            eta,
            theta,
            alpha,
            before.memory,
            chunk=self.chunk,
            activation=self.activation,
            clip=self.clip,
        )
        y = y.transpose(1, 2).flatten(2)
        return y if state is None else (y, NeuralMemoryState(memory, tail))

    def read(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """What a memory with these weights (`MemoryState.weights`) holds for x (B, N, dim); without convolution."""
        q = self._heads(F.silu(F.linear(x, self.qkv_proj.weight[: x.shape[-1]])))
        return (
            memory_read(weights, F.normalize(q, dim=-1), activation=self.activation)
            .transpose(1, 2)
            .flatten(2)
        )

    def initial_state(self, x: Tensor) -> NeuralMemoryState:
        """The state before the first token, for inputs like x (B, N, dim)."""
        kernel = 1 if self.conv is None else self.conv.kernel
        tail = x.new_zeros(x.shape[0], kernel - 1, 3 * x.shape[-1])
        return NeuralMemoryState(MemoryState.start(list(self.theta_0), x.shape[0]), tail)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _rates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """eta, theta, alpha, (B, H, N) each."""
        found = self.rates(x).sigmoid().transpose(1, 2).split(self.heads, 1)
        theta, none = self.max_step * found[0], torch.zeros_like(found[0])
        return found[1] if self.momentum else none, theta, found[-1] if self.forget else none

    def extra_repr(self) -> str:
        return f"heads={self.heads}, depth={self.depth}, chunk={self.chunk}, max_step={self.max_step}"


class TitansBlock(nn.Module):
    """Short-range attention and a neural memory for the rest; P are `persistent` learned tokens before the text.

        lmm   o = norm(memory(x)) W_o
        mag   y = window attention of [P; x];           o = (norm(y) * sigmoid(norm(memory(x)))) W_o
        mal   y = norm(memory([P; x]));                 o = (window attention of y) W_o
        mac   segment by segment: h = norm(read(Theta before the segment, s));  y = attention of [P; h; s], rows of s;
              o = (y * norm(memory(y))) W_o, the memory being written with y

    In mac, row t of a segment sees P, what was read for the rows up to t, and the rows up to t; its gate is read from
    Theta_t, the weights after the rows up to t and not those at the end of the segment, which know later tokens.

    Args:
        dim: width of the tokens; heads: of the attention.
        mode: "mac", "mag", "mal" or "lmm".
        segment: tokens of a segment of mac. window: keys that a query of mag and mal sees, including its own (in mag
            besides P).
        persistent: learned tokens, >= 0; lmm has none.
        memory: the neural memory, with the same dim; None: `NeuralMemory(dim, heads)`.
        rotary: rotate queries and keys by their positions (base 10,000), the tokens after P; what was read for a token
            of mac stands at its place.

    Shape: (B, N, dim) -> (B, N, dim), causal; a mixer of `TransformerLM`.

    Source: Titans: Learning to Memorize at Test Time (2024). Differs: what the memory gives is normalised before it
    gates, and mag gates by its sigmoid (there: a product, without saying which non-linearity); in mac a row does not
    see what was read for later rows of its segment.

    >>> block = TitansBlock(32, 4, "mac", segment=16)
    >>> x = torch.randn(1, 50, 32)
    >>> out, state = block(x[:, :37], state=block.initial_state(x))
    >>> rest, state = block(x[:, 37:], state=state)
    >>> torch.allclose(block(x)[:, 37:], rest, atol=1e-5)
    True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mode: str = "mag",
        *,
        segment: int = 128,
        window: int = 128,
        persistent: int = 4,
        memory: NeuralMemory | None = None,
        rotary: bool = True,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"TitansBlock: mode must be one of {', '.join(MODES)}, got {mode!r}")
        if heads < 1 or dim % heads:
            raise ValueError(f"TitansBlock: dim must be a multiple of heads, got {dim} and {heads}")
        for name, value, least in (
            ("segment", segment, 1),
            ("window", window, 1),
            ("persistent", persistent, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"TitansBlock: {name} must be an int >= {least}, got {value!r}")
        memory = NeuralMemory(dim, heads) if memory is None else memory
        if memory.qkv_proj.in_features != dim:
            raise ValueError(
                f"TitansBlock: memory must have dim {dim}, got one with {memory.qkv_proj.in_features}"
            )
        self.heads, self.mode, self.segment, self.window = heads, mode, segment, window
        self.memory, self.memory_norm = memory, RMSNorm(dim)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.persistent = None
        if mode == "lmm":
            return
        if persistent:
            self.persistent = nn.Parameter(0.02 * torch.randn(persistent, dim))
        self.rotary = Rotary() if rotary else None
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.pattern = Causal() & SlidingWindow(window)
        if mode == "mag":
            self.attention_norm = RMSNorm(dim)
            if persistent:
                self.pattern = Causal() & (SlidingWindow(window) | Sinks(persistent))
        if mode == "mac":
            self.read_norm = RMSNorm(dim)

    def forward(self, x: Tensor, *, state: TitansState | None = None) -> Tensor | tuple[Tensor, TitansState]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        before = self.initial_state(x) if state is None else state
        mix = {"lmm": self._lmm, "mag": self._mag, "mal": self._mal, "mac": self._mac}[self.mode]
        y, after = mix(x, before)
        out = self.o_proj(y)
        return out if state is None else (out, after)

    def initial_state(self, x: Tensor) -> TitansState:
        """The state before the first token, for inputs like x (B, N, dim); persistent tokens have been read."""
        x = x[:, :0]
        memory = self.memory.initial_state(x)
        if self.mode == "lmm":
            return TitansState(memory, None, None, (), None, None, 0)
        p = x if self.persistent is None else self.persistent.to(x.dtype).expand(x.shape[0], -1, -1)
        if self.mode == "mal" and p.shape[1]:
            p, memory = self._written(p, memory)
            p = self.memory_norm(p)
        _, k, v = self._qkv(p, 0)
        if self.mode == "mac":
            _, none, _ = self._qkv(x, 0)
            return TitansState(memory, none, none, memory.memory.weights, k, v, 0)
        return self._kept(memory, k, v, 0)

    # ------------------------------------------------------------------------------------------------- the modes
    def _lmm(self, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        y, memory = self._written(x, state.memory)
        return self.memory_norm(y), TitansState(
            memory, None, None, (), None, None, state.position + x.shape[1]
        )

    def _mag(self, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        y, state = self._windowed(x, state)
        m, memory = self._written(x, state.memory)
        gate = self.memory_norm(m).sigmoid()
        return self.attention_norm(y) * gate, self._with_memory(state, memory)

    def _mal(self, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        y, memory = self._written(x, state.memory)
        out, state = self._windowed(self.memory_norm(y), state)
        return out, self._with_memory(state, memory)

    def _mac(self, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        start, parts, first = 0, [], None
        while start < x.shape[1]:
            into = state.position % self.segment
            if into == 0:
                first = self.initial_state(x) if first is None else first
                state = TitansState(
                    state.memory,
                    first.k,
                    first.v,
                    state.memory.memory.weights,
                    first.read_k,
                    first.read_v,
                    state.position,
                )
            end = min(x.shape[1], start + self.segment - into)
            y, state = self._of_segment(x[:, start:end], state)
            parts.append(y)
            start = end
        return torch.cat(parts, 1) if parts else x, state

    def _of_segment(self, s: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        """Tokens of one segment (or a part of it) of mac."""
        assert state.k is not None
        assert state.v is not None
        assert state.read_k is not None
        assert state.read_v is not None
        at = self._prefix + state.position % self.segment
        q, k, v = self._qkv(s, at)
        _, read_k, read_v = self._qkv(self.read_norm(self.memory.read(s, state.read)), at)
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        read_k, read_v = torch.cat([state.read_k, read_k], 2), torch.cat([state.read_v, read_v], 2)
        tokens = attention(q, k, v, is_causal=True, return_lse=True)
        reads = attention(q, read_k, read_v, is_causal=True, return_lse=True)  # P, then reads up to the own
        assert isinstance(tokens, tuple)
        assert isinstance(reads, tuple)
        y = merge([tokens, reads])[0].transpose(1, 2).flatten(2)
        m, memory = self._written(y, state.memory)
        return y * self.memory_norm(m), TitansState(
            memory, k, v, state.read, read_k, read_v, state.position + s.shape[1]
        )

    # ------------------------------------------------------------------------------------------------- their parts
    @property
    def _prefix(self) -> int:
        """Persistent tokens."""
        return 0 if self.persistent is None else self.persistent.shape[0]

    def _written(self, x: Tensor, state: NeuralMemoryState) -> tuple[Tensor, NeuralMemoryState]:
        found = self.memory(x, state=state)
        assert isinstance(found, tuple)
        return found

    def _qkv(self, x: Tensor, at: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, N, D) each; queries and keys rotated, the first token standing at `at`."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv_proj(x).chunk(3, -1))
        if self.rotary is not None:
            places = torch.arange(at, at + x.shape[1], device=x.device)
            q, k = self.rotary(q, places), self.rotary(k, places)
        return q, k, v

    def _windowed(self, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        """Attention of the next tokens over what is held and themselves."""
        assert state.k is not None
        assert state.v is not None
        q, k, v = self._qkv(x, self._prefix + state.position)
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        out = attention(q, k, v, self.pattern)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).flatten(2), self._kept(state.memory, k, v, state.position + x.shape[1])

    def _kept(self, memory: NeuralMemoryState, k: Tensor, v: Tensor, position: int) -> TitansState:
        """Of keys and values, those that a later query sees: the last window - 1, and in mag P."""
        pinned = self._prefix if self.mode == "mag" else 0
        cut = max(pinned, k.shape[2] - (self.window - 1))
        k, v = (torch.cat([t[:, :, :pinned], t[:, :, cut:]], 2) for t in (k, v))
        return TitansState(memory, k, v, (), None, None, position)

    @staticmethod
    def _with_memory(state: TitansState, memory: NeuralMemoryState) -> TitansState:
        return TitansState(memory, state.k, state.v, (), None, None, state.position)

    def extra_repr(self) -> str:
        return f"mode={self.mode}, heads={self.heads}, segment={self.segment}, window={self.window}"
