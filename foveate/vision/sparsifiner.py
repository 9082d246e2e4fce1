"""Sparsifiner: a low-rank guess of each head's attention map, and attention to the strongest links of every row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.core.layout import BlockLayout
from foveate.vision.backbone import Backbone
from foveate.vision.blocks import DropPath, Mlp, drop_path_rates, interpolate_map
from foveate.vision.windows import Pair, attend, pair

SCALES = ("heads", "width")


class LowRankConnectivity(nn.Module):
    """Guesses attention maps from r basis rows, and picks the keys of each query.

        q', k' = q W_q + b_q, k W_k + b_k                        d -> d / reduce_c, shared by the heads
        c = softmax_r(s q' (W_down^T k')^T)                      coefficients of every row, r = floor(n / reduce_n)
        estimate = c W_up^T                                      to fit to the attention of a dense model
        score = top_t(c) |W_up|^T,  entries of |W_up| <= threshold being 0
        S_i = the ceil(keep n) keys of largest score_i

    The class token comes first; its row is not guessed, it sees all keys. Choices carry no gradient.

    Args:
        head_dim: d.
        grid: (rows, columns) of the patches that W_down and W_up are made for; n = rows * columns, and one more with
            a class token. On another grid both are interpolated, bilinearly over the patches.
        reduce_c, reduce_n: factors that narrow the width and the tokens.
        keep: share of the keys that each row keeps, in (0, 1].
        coefficients: t, coefficients that count in a score; all where there are fewer.
        threshold: entries of |W_up| up to this are 0 in a score.
        scale: "heads": s = H^-0.5, as in the released code; "width": (d / reduce_c)^-0.5.
        class_token: whether the first token is one.

    Source: Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers (2023).

    >>> guess = LowRankConnectivity(16, (6, 6))
    >>> q, k = torch.randn(2, 3, 37, 16), torch.randn(2, 3, 37, 16)
    >>> guess.estimate(q, k).shape, guess.select(q, k).shape
    (torch.Size([2, 3, 36, 37]), torch.Size([2, 3, 36, 10]))
    """

    def __init__(
        self,
        head_dim: int,
        grid: int | Pair,
        *,
        reduce_c: int = 2,
        reduce_n: int = 6,
        keep: float = 0.25,
        coefficients: int = 8,
        threshold: float = 2e-2,
        scale: str = "heads",
        class_token: bool = True,
    ) -> None:
        super().__init__()
        name = "LowRankConnectivity"
        self.grid, self.lead = pair(name, "grid", grid), int(class_token)
        tokens = self.grid[0] * self.grid[1] + self.lead
        for what, value, most in (("reduce_c", reduce_c, head_dim), ("reduce_n", reduce_n, tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name}: {what} must be an int from 1 to {most}, got {value!r}")
        if not 0 < keep <= 1:
            raise ValueError(f"{name}: keep must be in (0, 1], got {keep}")
        if isinstance(coefficients, bool) or not isinstance(coefficients, int) or coefficients < 1:
            raise ValueError(f"{name}: coefficients must be an int >= 1, got {coefficients!r}")
        if not 0 <= threshold < math.inf:
            raise ValueError(f"{name}: threshold must be a number >= 0, got {threshold}")
        if scale not in SCALES:
            raise ValueError(f"{name}: scale must be 'heads' or 'width', got {scale!r}")
        self.keep, self.coefficients, self.threshold, self.scale = keep, coefficients, threshold, scale
        width, rank = head_dim // reduce_c, tokens // reduce_n
        self.q_proj, self.k_proj = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.down, self.up = nn.Parameter(torch.empty(tokens, rank)), nn.Parameter(torch.empty(tokens, rank))
        for part in (self.down, self.up, self.q_proj.weight, self.k_proj.weight):
            nn.init.trunc_normal_(part, std=0.02)
        for linear in (self.q_proj, self.k_proj):
            nn.init.zeros_(linear.bias)

    def budget(self, tokens: int) -> int:
        """Keys that a row of `tokens` keys keeps."""
        return min(tokens, math.ceil(self.keep * tokens))

    def weights_of_rows(
        self, q: Tensor, k: Tensor, *, grid: Pair | None = None, alive: Tensor | None = None
    ) -> Tensor:
        """c, (B, H, n', r), n' the rows that are guessed; q, k (B, H, n, d). Keys that are not alive count as 0."""
        self._check(q, k, grid)
        scale = (q.shape[1] if self.scale == "heads" else self.q_proj.out_features) ** -0.5
        narrow = self.k_proj(k)
        if alive is not None:
            narrow = narrow * alive[:, None, :, None].to(narrow.dtype)
        basis = narrow.mT @ self._sized(self.down, grid)  # (B, H, d', r)
        return ((self.q_proj(q[:, :, self.lead :]) @ basis) * scale).softmax(-1)

    def estimate(self, q: Tensor, k: Tensor, *, grid: Pair | None = None) -> Tensor:
        """The guessed attention, (B, H, n', n), signed, with gradients of the predictor, q and k."""
        return self.weights_of_rows(q, k, grid=grid) @ self._sized(self.up, grid).mT

    @torch.no_grad()
    def scores(
        self, q: Tensor, k: Tensor, *, grid: Pair | None = None, alive: Tensor | None = None
    ) -> Tensor:
        """What decides which keys are kept, (B, H, n', n)."""
        rows = self.weights_of_rows(q, k, grid=grid, alive=alive)
        if self.coefficients < rows.shape[-1]:
            best, at = rows.topk(self.coefficients, -1)
            rows = torch.zeros_like(rows).scatter_(-1, at, best)
        return rows @ F.threshold(self._sized(self.up, grid).abs(), self.threshold, 0.0).mT

    @torch.no_grad()
    def select(
        self, q: Tensor, k: Tensor, *, grid: Pair | None = None, alive: Tensor | None = None
    ) -> Tensor:
        """int64 (B, H, n', K): the kept keys of each row, K = ceil(keep n), equal scores in the order of the keys.

        Args:
            alive: bool (B, n), the tokens that are left; others are not chosen unless fewer than K are left.
        """
        scores = self.scores(q, k, grid=grid, alive=alive)
        if alive is not None:
            scores = scores.masked_fill(~alive[:, None, None], -torch.inf)
        return scores.argsort(dim=-1, descending=True, stable=True)[..., : self.budget(k.shape[2])]

    def mask(self, q: Tensor, k: Tensor, *, grid: Pair | None = None) -> Tensor:
        """bool (B, H, n, n), True where a query keeps a key; the row of the class token is full."""
        chosen = self.select(q, k, grid=grid)
        out = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
        out[:, :, self.lead :] = False
        out[:, :, self.lead :].scatter_(-1, chosen, True)
        return out

    def _sized(self, rows: Tensor, grid: Pair | None) -> Tensor:
        """(n, r) for the grid; the row of the class token is copied."""
        if grid is None or tuple(grid) == self.grid:
            return rows
        patches = rows[self.lead :].view(1, *self.grid, -1)
        return torch.cat([rows[: self.lead], interpolate_map(patches, grid, "bilinear")[0].flatten(0, 1)])

    def _check(self, q: Tensor, k: Tensor, grid: Pair | None) -> None:
        rows, columns = self.grid if grid is None else grid
        wanted = rows * columns + self.lead
        for name, t in (("q", q), ("k", k)):
            if t.ndim != 4 or t.shape[2] != wanted or t.shape[3] != self.q_proj.in_features:
                raise ValueError(
                    f"LowRankConnectivity: {name} must be (B, H, {wanted}, {self.q_proj.in_features}) for a grid of "
                    f"{rows} x {columns}, got {tuple(t.shape)}"
                )

    def extra_repr(self) -> str:
        return f"grid={self.grid}, rank={self.down.shape[1]}, keep={self.keep:g}"


class SparsifinerAttention(nn.Module):
    """Attention of every patch to the keys that a `LowRankConnectivity` keeps; the class token attends to all.

        out_i = sum_{j in S_i} softmax_{j in S_i}(q_i . k_j d^-0.5) v_j

    Args:
        dim, heads: C, and into how many heads it is cut.
        grid: (rows, columns) of the patches it is made for.
        keep, reduce_c, reduce_n, coefficients, threshold, scale, class_token: as in `LowRankConnectivity`.
        bias: of the query, key and value map.
        engine: None: the kept keys are gathered; a name as in `attention`: that engine runs with the mask as a layout.

    Shape: (B, n, C) -> (B, n, C), the class token first.

    Source: Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers (2023).

    >>> layer = SparsifinerAttention(32, 2, (6, 6))
    >>> layer(torch.randn(2, 37, 32)).shape, layer(torch.randn(2, 36, 32), grid=(5, 7)).shape
    (torch.Size([2, 37, 32]), torch.Size([2, 36, 32]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: int | Pair,
        *,
        keep: float = 0.25,
        reduce_c: int = 2,
        reduce_n: int = 6,
        coefficients: int = 8,
        threshold: float = 2e-2,
        scale: str = "heads",
        class_token: bool = True,
        bias: bool = True,
        engine: str | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"SparsifinerAttention: dim must be a multiple of heads, got {dim} and {heads}")
        self.heads, self.head_dim, self.engine = heads, dim // heads, engine
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)
        self.predictor = LowRankConnectivity(
            self.head_dim,
            grid,
            reduce_c=reduce_c,
            reduce_n=reduce_n,
            keep=keep,
            coefficients=coefficients,
            threshold=threshold,
            scale=scale,
            class_token=class_token,
        )

    def forward(self, x: Tensor, *, grid: Pair | None = None, alive: Tensor | None = None) -> Tensor:
        """out (B, n, C) of tokens on `grid`; tokens that are not `alive`, bool (B, n), are not read and give 0."""
        q, k, v = self._qkv(x)
        chosen = self.predictor.select(q, k, grid=grid, alive=alive)
        if self.engine is None:
            out = self._gathered(q, k, v, chosen, alive)
        else:
            seen = torch.ones(*q.shape[:3], q.shape[2], dtype=torch.bool, device=q.device)
            seen[:, :, self.predictor.lead :] = False
            seen[:, :, self.predictor.lead :].scatter_(-1, chosen, True)
            if alive is not None:
                seen &= alive[:, None, None]
            out = attention(q, k, v, BlockLayout.from_mask(seen), engine=self.engine)
            assert isinstance(out, Tensor)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return out if alive is None else out * alive[..., None].to(out.dtype)

    def dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(out, weights (B, H, n, n)) of full attention: the teacher, and what the predictor is fitted beside."""
        q, k, v = self._qkv(x)
        weights = (q @ k.mT * self.head_dim**-0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2)), weights

    def class_weights(self, x: Tensor, alive: Tensor | None = None) -> Tensor:
        """(B, n - 1): attention of the class token to the patches, averaged over heads; -inf where not alive."""
        if not self.predictor.lead:
            raise ValueError("SparsifinerAttention: class_weights needs class_token=True")
        q, k, _ = self._qkv(x)
        logits = q[:, :, :1] @ k.mT * self.head_dim**-0.5  # (B, H, 1, n)
        if alive is not None:
            logits = logits.masked_fill(~alive[:, None, None], -torch.inf)
        found = logits.softmax(-1)[:, :, 0, 1:].mean(1)
        return found if alive is None else found.masked_fill(~alive[:, 1:], -torch.inf)

    def reconstruction(self, x: Tensor, weights: Tensor, *, grid: Pair | None = None) -> Tensor:
        """Summed squared error between the estimate on x (B, n, C) and a teacher's weights (B, H, n, n), a scalar."""
        q, k, _ = self._qkv(x)
        return F.mse_loss(
            self.predictor.estimate(q, k, grid=grid),
            weights[:, :, self.predictor.lead :].detach(),
            reduction="sum",
        )

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.ndim != 3 or x.shape[2] != self.heads * self.head_dim:
            raise ValueError(
                f"SparsifinerAttention: x must be (B, n, {self.heads * self.head_dim}), got {tuple(x.shape)}"
            )
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, n, d)
        return q, k, v

    def _gathered(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, alive: Tensor | None) -> Tensor:
        lead, (batch, heads, n, _) = self.predictor.lead, q.shape
        first = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * n
        flat = (chosen + first).flatten()  # (B H n' K,)
        keys, values = (t.flatten(0, 2)[flat].view(-1, 1, chosen.shape[3], t.shape[3]) for t in (k, v))
        mask = None
        if alive is not None:  # fewer may be left than a row keeps
            mask = (
                alive[:, None, None].expand(-1, heads, n - lead, -1).gather(3, chosen).flatten(0, 2)[:, None]
            )
        out = attend(q[:, :, lead:].reshape(-1, 1, 1, q.shape[3]), keys, values, mask=mask)
        out = out.view(batch, heads, n - lead, -1)
        if not lead:
            return out
        seen = None if alive is None else alive[:, None]  # (B, 1, n)
        return torch.cat([attend(q[:, :, :1], k, v, mask=seen), out], 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class SparsifinerBlock(nn.Module):
    """x += SparsifinerAttention(LN x); x += MLP(LN x), on (B, n, C); tokens that are not alive stay 0.

    Args:
        dim, heads, grid: as in `SparsifinerAttention`.
        keep, reduce_n: as there.
        mlp_ratio: hidden width of the MLP over dim.
        drop_path: rate of stochastic depth.
        engine: as in `SparsifinerAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: int | Pair,
        *,
        keep: float = 0.25,
        reduce_n: int = 6,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        engine: str | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = SparsifinerAttention(dim, heads, grid, keep=keep, reduce_n=reduce_n, engine=engine)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, *, grid: Pair | None = None, alive: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), grid=grid, alive=alive))
        return self.mixed(x, alive)

    def dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(out, weights) with full attention."""
        out, weights = self.attn.dense(self.norm1(x))
        return self.mixed(x + self.drop_path(out), None), weights

    def mixed(self, x: Tensor, alive: Tensor | None) -> Tensor:
        """The second half of the block."""
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x if alive is None else x * alive[..., None].to(x.dtype)


class Sparsifiner(Backbone):
    """A vision transformer with a class token (DeiT) whose layers choose their links.

    Args:
        dim, depth, heads: of the transformer.
        image: side of the images that positions and predictors are made for; on others they are interpolated.
        patch: side of a patch; sides that it does not divide are padded with zeros.
        keep, reduce_n: as in `LowRankConnectivity`.
        prune: {layer: rate}: after this layer (from 0) only the ceil(rate * patches) patches stay that the class token
            attends to most; rates fall from layer to layer. Others are zero and no keys.
        mlp_ratio, engine: as in `SparsifinerBlock`.
        num_classes, in_channels, drop_path, features_only: as in every backbone.

    Shape: images (B, in_channels, H, W) -> (B, num_classes), or one map of the patches.

    Source: Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers (2023), on
    Training data-efficient image transformers & distillation through attention (2020).

    >>> model = Sparsifiner(dim=32, depth=2, heads=2, image=64, num_classes=10)
    >>> model(torch.randn(1, 3, 64, 64)).shape, model(torch.randn(1, 3, 48, 90)).shape
    (torch.Size([1, 10]), torch.Size([1, 10]))
    """

    def __init__(
        self,
        *,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        image: int | Pair = 224,
        patch: int = 16,
        keep: float = 0.25,
        reduce_n: int = 6,
        prune: Mapping[int, float] | None = None,
        mlp_ratio: float = 4.0,
        engine: str | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.0,
        features_only: bool = False,
    ) -> None:
        super().__init__(
            channels=(dim,),
            strides=(patch,),
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        height, width = pair("Sparsifiner", "image", image)
        self.grid = -(-height // patch), -(-width // patch)
        self.prune = _rates(prune, depth)
        self.patch = nn.Conv2d(in_channels, dim, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], dim))
        self.blocks = nn.ModuleList(
            SparsifinerBlock(
                dim,
                heads,
                self.grid,
                keep=keep,
                reduce_n=reduce_n,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                engine=engine,
            )
            for rate in drop_path_rates(drop_path, (depth,))[0]
        )
        self.make_head(nn.LayerNorm(dim, eps=1e-6))
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for tokens in (self.class_token, self.positions):
            nn.init.trunc_normal_(tokens, std=0.02)

    def embed(self, images: Tensor) -> tuple[Tensor, Pair]:
        """(tokens (B, 1 + h w, C), (h, w)) before the first block."""
        self.check(images)
        side = self.patch.stride[0]
        x = self.patch(F.pad(images, (0, -images.shape[3] % side, 0, -images.shape[2] % side)))
        grid = x.shape[2], x.shape[3]
        own = self.positions[:, 1:].view(1, *self.grid, -1)
        places = torch.cat([self.positions[:, :1], interpolate_map(own, grid).flatten(1, 2)], 1)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x.flatten(2).mT], 1)
        return x + places, grid

    def tokens(self, images: Tensor) -> tuple[Tensor, Pair]:
        """(tokens (B, 1 + h w, C), (h, w)) after the last block."""
        x, grid = self.embed(images)
        alive = None
        for number, block in enumerate(self.blocks):
            assert isinstance(block, SparsifinerBlock)
            left = None
            if number in self.prune:
                scores = block.attn.class_weights(block.norm1(x), alive)
                count = math.ceil(self.prune[number] * scores.shape[1])
                best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
                left = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
                left = F.pad(left, (1, 0), value=True)  # (B, n), the class token stays
            x = block(x, grid=grid, alive=alive)
            if left is not None:
                alive = left
                x = x * alive[..., None].to(x.dtype)
        return x, grid

    def forward_features(self, images: Tensor) -> list[Tensor]:
        x, grid = self.tokens(images)
        return [x[:, 1:].mT.unflatten(2, grid)]

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        if self.features_only:
            return self.forward_features(images)
        return self._classified(self.tokens(images)[0])

    def dense(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(scores, the weights (B, H, n, n) of each layer) with full attention everywhere: the model as a teacher."""
        x, found = self.embed(images)[0], []
        for block in self.blocks:
            assert isinstance(block, SparsifinerBlock)
            x, weights = block.dense(x)
            found.append(weights)
        return self._classified(x), found

    def reconstruction(self, images: Tensor, teacher: Sequence[Tensor] | None = None) -> Tensor:
        """The loss that fits the predictors: `SparsifinerAttention.reconstruction`, averaged over layers.

        All layers use full attention.

        Args:
            teacher: weights (B, H, n, n) of each layer of a frozen model (`dense`); None: this model's own.
        """
        x, grid = self.embed(images)
        losses = []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, SparsifinerBlock)
            before = block.norm1(x)
            x, weights = block.dense(x)
            wanted = weights if teacher is None else teacher[number]
            losses.append(block.attn.reconstruction(before, wanted, grid=grid))
        return torch.stack(losses).mean()

    def _classified(self, x: Tensor) -> Tensor:
        x = x[:, 0] if self.norm is None else self.norm(x[:, 0])
        return x if self.head is None else self.head(x)


def reconstruct_attention(
    model: Sparsifiner,
    images: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float = 3e-4,
    teacher: Sparsifiner | None = None,
) -> list[float]:
    """Fit the predictors of a model to its own dense attention, or a teacher's, and nothing else; the losses.

    Args:
        images: step -> (B, in_channels, H, W).
        steps, lr: of Adam on the parameters of the predictors.
        teacher: a model of the same shape, in eval mode.

    >>> model = Sparsifiner(dim=16, depth=1, heads=2, image=16, patch=4, num_classes=3)
    >>> x = torch.randn(2, 3, 16, 16)
    >>> losses = reconstruct_attention(model, lambda step: x, steps=5, lr=1e-2)
    >>> losses[-1] < losses[0]
    True
    """
    fitted = [p for m in model.modules() if isinstance(m, LowRankConnectivity) for p in m.parameters()]
    optimizer, losses = torch.optim.Adam(fitted, lr=lr), []
    for step in range(steps):
        batch, maps = images(step), None
        if teacher is not None:
            with torch.no_grad():
                maps = teacher.dense(batch)[1]
        loss = model.reconstruction(batch, maps)
        for p, gradient in zip(fitted, torch.autograd.grad(loss, fitted), strict=True):
            p.grad = gradient
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def sparsifiner_small(
    *,
    keep: float = 0.25,
    prune: Mapping[int, float] | None = None,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> Sparsifiner:
    """On DeiT-S at 224 pixels: 22,251,880 parameters, 201,216 of them in the predictors."""
    return Sparsifiner(
        keep=keep,
        prune=prune,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def _rates(prune: Mapping[int, float] | None, depth: int) -> dict[int, float]:
    found = dict(sorted((prune or {}).items()))
    last = 1.0
    for layer, rate in found.items():
        if not 0 <= layer < depth or not 0 < rate <= last:
            raise ValueError(
                f"Sparsifiner: prune must map layers below {depth} to rates in (0, 1] that fall, got {prune}"
            )
        last = rate
    return found
