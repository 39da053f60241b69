"""Log-probabilities, entropies and exact KL at scored positions from hidden states, the vocabulary cut between ranks.

The logits exist tile by tile, some rows of hidden states times some rows of the head, forward and again backward, in
scratch memory that all tiles share: `head_logprob` needs about 60 MiB on a CPU (H 896) whatever the number of tokens,
and for its backward pass the gradient of the hidden states in float32: 4 H bytes per token, where logits have 4 V / TP.

Order of the tiles: the rows of the head outside, positions inside. Each row of the head then gets its whole gradient
in one go, summed in float32 and kept in the head's dtype, so that no float32 [V/TP, H] is ever held; and the ranks meet
twice per call (largest logit; sums), not twice per tile, because sums follow a largest logit that grows (arXiv
1805.02867) by a factor exp(old - new).

Values are float32 from float32 logits. A GPU multiplies bfloat16 with a float32 result. A CPU has no such product in
PyTorch (2.13: `aten::mm.dtype` is missing there, and one with a bfloat16 result cuts a logit of 20 to +-0.06), hence:

  forward   the operands of the tile are copied to float32; bfloat16 numbers are exact there, so oneDNN is allowed to
            multiply them as such (AMX does, the sum stays float32) and is also faster than MKL where it does not.
  backward  bfloat16 operands, with log z appended to the inner dimension in three bfloat16 parts against ones: the sum
            that is rounded is then log p itself, not a logit. p errs by p |log p| 2^-9, at most 0.4 x 2^-9: no more
            than the rounding to bfloat16 that the gradient of the logits goes through anyway.

The backward pass of the KL takes float32 logits: the difference of two rounded log-probabilities would be noise.

Nothing of a backward pass can be done ahead in the forward one: the gradient of the head mixes positions by factors
that the loss gives later. So there are 4 products where full logits, kept, need 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A tile of float32 logits. On a CPU it and its exponentials stay in the cache; a GPU wants large products.
_TILE_BYTES_CPU, _TILE_BYTES_GPU = 8 << 20, 64 << 20
_LOWEST = torch.finfo(torch.float32).min  # before the first logit; not -inf, because it is multiplied by 0


def head_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    target_R: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    group: dist.ProcessGroup | None = None,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(log softmax(hidden @ weight.T / temperature)[target], entropy), each [R] float32, in nats.

    hidden_RH    hidden states of the scored positions, equal on all ranks of `group`; the gradient is this rank's part
                 only: sum it over `group` (Megatron's copy-to-region does)
    weight_VH    this rank's rows of the head; rank r of `group` holds rows [r V, (r + 1) V)
    target_R     token ids, equal on all ranks of `group`
    vocab_size   rows of the head at or beyond it are padding and get no probability
    temperature  what the logits are divided by
    chunk_size   positions of a tile at most
    group        ranks that share the head, None: this one has all of it
    fused        the arithmetic of a tile is one Triton kernel; None: where `can_fuse` says so
    """
    fused = can_fuse(weight_VH.device) if fused is None else fused
    return _HeadLogProb.apply(hidden_RH, weight_VH, target_R, vocab_size, temperature, chunk_size, group, fused)


def head_full_kl(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    ref_hidden_RH: Tensor,
    ref_weight_VH: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    group: dist.ProcessGroup | None = None,
    fused: bool | None = None,
) -> Tensor:
    """KL(pi || ref) over the whole vocabulary at each position, [R] float32, in nats, both at `temperature`.

    The other arguments are those of `head_logprob`; `ref_hidden_RH` may have another hidden size than hidden_RH, but
    `ref_weight_VH` as many rows as weight_VH.
    Differentiable in hidden_RH (this rank's part) and weight_VH: d KL / d logit_j = p_j (log p_j - log q_j - KL) /
    temperature. The reference gets no gradient.
    """
    assert ref_weight_VH.shape[0] == weight_VH.shape[0], (ref_weight_VH.shape, weight_VH.shape)
    fused = can_fuse(weight_VH.device) if fused is None else fused
    return _HeadFullKl.apply(
        hidden_RH, weight_VH, ref_hidden_RH, ref_weight_VH, vocab_size, temperature, chunk_size, group, fused
    )


@cache
def can_fuse(device: torch.device) -> bool:
    """Whether tiles on `device` go through the Triton kernels unless the caller says otherwise."""
    return device.type == "cuda" and find_spec("triton") is not None


class _HeadLogProb(torch.autograd.Function):
    """The arguments are those of `head_logprob`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        target_R: Tensor,
        vocab_size: int,
        temperature: float,
        chunk_size: int,
        group: dist.ProcessGroup | None,
        fused: bool,
    ) -> tuple[Tensor, Tensor]:
        first = _first_row(weight_VH, group)
        tiles = _Tiles(hidden_RH, weight_VH, vocab_size - first, temperature, chunk_size, fused)
        # The largest logit, the sums of exp(l - peak) and exp(l - peak) (l - peak), and the target's logit.
        sums_4R = hidden_RH.new_zeros(4, *target_R.shape, dtype=torch.float32)
        peak_R, z_R, weighted_R, picked_R = sums_4R
        peak_R.fill_(_LOWEST)
        for columns, rows in tiles:
            logits = tiles.logits(columns, rows)
            if fused:
                _kernels().add_tile(logits, target_R[rows], sums_4R[:, rows], first + columns.start, temperature)
            else:
                _add_tile(logits, target_R[rows], sums_4R[:, rows], first + columns.start, tiles.scratch(logits))
        peak = peak_R.clone()
        _all_reduce(peak, dist.ReduceOp.MAX, group)
        decay = _raise_peak(peak_R, peak, z_R, weighted_R)
        sums = torch.stack([z_R, weighted_R + decay * z_R, picked_R])
        _all_reduce(sums, dist.ReduceOp.SUM, group)
        z_R, weighted_R, picked_R = sums
        entropy_R = z_R.log() - weighted_R / z_R
        ctx.save_for_backward(hidden_RH, weight_VH, target_R, peak + z_R.log(), entropy_R)
        ctx.set_materialize_grads(False)
        ctx.settings = (vocab_size, temperature, chunk_size, group, fused)
        return (picked_R - peak) - z_R.log(), entropy_R

    @staticmethod
    def backward(ctx: Any, grad_logprob_R: Tensor | None, grad_entropy_R: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_RH, weight_VH, target_R, log_z_R, entropy_R = ctx.saved_tensors
        vocab_size, temperature, chunk_size, group, fused = ctx.settings
        first = _first_row(weight_VH, group)
        tiles = _Tiles(hidden_RH, weight_VH, vocab_size - first, temperature, chunk_size, fused)
        gradients = _Gradients(tiles, ctx.needs_input_grad)
        # d logprob / d logit_j = 1[j = target] - p_j;   d entropy / d logit_j = -p_j (log p_j + entropy)
        hit_R = torch.zeros_like(log_z_R) if grad_logprob_R is None else grad_logprob_R / temperature
        slope_R = None if grad_entropy_R is None else -grad_entropy_R / temperature
        offset_R = -hit_R if slope_R is None else slope_R * entropy_R - hit_R
        if fused:
            level_R = torch.zeros_like(hit_R) if slope_R is None else slope_R
            factors_4R = torch.stack([log_z_R, level_R, offset_R, hit_R])
        for columns, rows in tiles:
            target, start = target_R[rows], first + columns.start
            if fused:
                logits = tiles.logits(columns, rows)
                grad = tiles.gradient(logits)
                _kernels().tile_gradient(logits, target, factors_4R[:, rows], start, temperature, grad)
            else:
                log_p = tiles.log_p(columns, rows, log_z_R[rows])
                grad = torch.exp(log_p, out=tiles.scratch(log_p))
                if slope_R is None:
                    grad *= offset_R[rows].unsqueeze(1)
                else:
                    grad *= log_p.mul_(slope_R[rows].unsqueeze(1)).add_(offset_R[rows].unsqueeze(1))
                mine, index = _own_targets(target, start, grad.shape[1])
                grad.scatter_add_(1, index, (mine * hit_R[rows]).unsqueeze(1))
            gradients.add(grad, columns, rows)
        return *gradients.done(), None, None, None, None, None, None


class _HeadFullKl(torch.autograd.Function):
    """The arguments are those of `head_full_kl`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        ref_hidden_RH: Tensor,
        ref_weight_VH: Tensor,
        vocab_size: int,
        temperature: float,
        chunk_size: int,
        group: dist.ProcessGroup | None,
        fused: bool,
    ) -> Tensor:
        real = vocab_size - _first_row(weight_VH, group)
        tiles = _Tiles(hidden_RH, weight_VH, real, temperature, chunk_size, fused)
        ref_tiles = _Tiles(ref_hidden_RH, ref_weight_VH, real, temperature, chunk_size, fused)
        # The largest logits and the sums of exp(l - peak) of policy and reference, and of exp(l - peak) (l - l_ref).
        sums_5R = hidden_RH.new_zeros(5, hidden_RH.shape[0], dtype=torch.float32)
        peak_2R, z_2R, weighted_R = sums_5R[:2], sums_5R[2:4], sums_5R[4]
        peak_2R.fill_(_LOWEST)
        for columns, rows in tiles:
            logits, ref_logits = tiles.logits(columns, rows), ref_tiles.logits(columns, rows)
            if fused:
                _kernels().add_kl_tile(logits, ref_logits, sums_5R[:, rows], temperature)
            else:
                _add_kl_tile(logits, ref_logits, sums_5R[:, rows], tiles.scratch(logits))
        peak = peak_2R.clone()
        _all_reduce(peak, dist.ReduceOp.MAX, group)
        decay = _raise_peak(peak_2R, peak, z_2R)
        sums = torch.stack([*z_2R, weighted_R * decay[0].exp()])
        _all_reduce(sums, dist.ReduceOp.SUM, group)
        z_R, ref_z_R, weighted_R = sums
        # In this order a policy that is the reference has a KL of exactly 0.
        kl_R = weighted_R / z_R + (peak[1] - peak[0]) + (ref_z_R.log() - z_R.log())
        log_z_2R = peak + torch.stack([z_R, ref_z_R]).log()
        ctx.save_for_backward(hidden_RH, weight_VH, ref_hidden_RH, ref_weight_VH, log_z_2R, kl_R)
        ctx.settings = (vocab_size, temperature, chunk_size, group, fused)
        return kl_R

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RH, weight_VH, ref_hidden_RH, ref_weight_VH, log_z_2R, kl_R = ctx.saved_tensors
        vocab_size, temperature, chunk_size, group, fused = ctx.settings
        real = vocab_size - _first_row(weight_VH, group)
        tiles = _Tiles(hidden_RH, weight_VH, real, temperature, chunk_size, fused)
        ref_tiles = _Tiles(ref_hidden_RH, ref_weight_VH, real, temperature, chunk_size, fused)
        gradients = _Gradients(tiles, ctx.needs_input_grad)
        shift_R = log_z_2R[1] - log_z_2R[0] - kl_R
        scale_R = grad_R / temperature
        factors_3R = torch.stack([log_z_2R[0], shift_R, scale_R])
        for columns, rows in tiles:
            logits, ref_logits = tiles.logits(columns, rows), ref_tiles.logits(columns, rows)
            if fused:
                grad = tiles.gradient(logits)
                _kernels().kl_tile_gradient(logits, ref_logits, factors_3R[:, rows], temperature, grad)
            else:
                factor = ref_logits.neg_().add_(logits).add_(shift_R[rows].unsqueeze(1))
                grad = torch.sub(logits, log_z_2R[0, rows].unsqueeze(1), out=tiles.scratch(logits)).exp_()
                grad.mul_(factor).mul_(scale_R[rows].unsqueeze(1))
            gradients.add(grad, columns, rows)
        return *gradients.done(), None, None, None, None, None, None, None


class _Tiles:
    """The tiles of hidden_RH @ weight_VH.T / temperature, without the rows of the head from `real` on.

    Iterates over (columns, rows), slices of V and R: all rows of the first columns, then of the next. A tile has
    `chunk_size` rows at most; with `fused` the kernels divide by the temperature. A tile that a method returns lies in
    memory that the next call of that method takes again.
    """

    def __init__(
        self, hidden_RH: Tensor, weight_VH: Tensor, real: int, temperature: float, chunk_size: int, fused: bool
    ) -> None:
        self.hidden_RH, self.weight_VH, self.fused = hidden_RH, weight_VH, fused
        self.temperature = 1.0 if fused else temperature  # the kernels divide by it themselves
        on_cpu = weight_VH.device.type == "cpu"
        self.real = min(max(real, 0), weight_VH.shape[0])
        height = max(1, min(chunk_size, hidden_RH.shape[0]))
        self.width = (_TILE_BYTES_CPU if on_cpu else _TILE_BYTES_GPU) // (4 * max(height, 1024))
        self.width = min(max(self.width, 128), max(self.real, 1))  # products of fewer than 128 columns are slow
        self.rows = _slices(hidden_RH.shape[0], height)
        self.columns = _slices(self.real, self.width)
        self.bfloat16_on_cpu = on_cpu and weight_VH.dtype == hidden_RH.dtype == torch.bfloat16
        self.float32 = weight_VH.dtype == torch.float32 or on_cpu  # the type of the operands of `logits`
        self.memory = weight_VH.new_empty(1 if fused else 2, height * self.width, dtype=torch.float32)
        self.operand: tuple[str, slice, Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for columns in self.columns:
            for rows in self.rows:
                yield columns, rows

    def logits(self, columns: slice, rows: slice) -> Tensor:
        """float32, from float32 sums of exact products."""
        logits = self._tile(0, rows, columns)
        if not self.float32:
            torch.mm(self.hidden_RH[rows], self.weight_VH[columns].T, out_dtype=torch.float32, out=logits)
        else:
            head = self._head("float32", columns)
            with _bfloat16_products() if self.bfloat16_on_cpu else nullcontext():
                torch.mm(self.hidden_RH[rows].float(), head.T, out=logits)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def log_p(self, columns: slice, rows: slice, log_z: Tensor) -> Tensor:
        """logits - log_z, float32; rounded to bfloat16 in between where the docstring of this file says so."""
        if not self.bfloat16_on_cpu:
            return self.logits(columns, rows).sub_(log_z.unsqueeze(1))
        rest, parts = log_z * -self.temperature, []
        for _ in range(3):
            parts.append(rest.bfloat16())
            rest = rest - parts[-1]
        hidden = torch.cat([self.hidden_RH[rows], torch.stack(parts, dim=1)], dim=1)
        log_p = self._tile(0, rows, columns)
        rounded = _as_bfloat16(self._tile(1, rows, columns))
        log_p.copy_(torch.mm(hidden, self._head("with ones", columns).T, out=rounded))
        return log_p if self.temperature == 1.0 else log_p.div_(self.temperature)

    def scratch(self, tile: Tensor) -> Tensor:
        """Memory beside the tile that `logits` or `log_p` gave, of its shape."""
        return self.memory[1, : tile.numel()].view_as(tile)

    def gradient(self, tile: Tensor) -> Tensor:
        """Memory for the gradient of a tile that `logits` gave, in the dtype of the head."""
        return self._gradient[: tile.numel()].view_as(tile)

    @cached_property
    def _gradient(self) -> Tensor:
        return self.weight_VH.new_empty(self.memory.shape[1])

    def rounded(self, tile: Tensor) -> Tensor:
        """What was written into `scratch` or `gradient`, in the dtype of the head; the first tile is lost."""
        if tile.dtype == self.weight_VH.dtype:
            return tile
        if self.bfloat16_on_cpu:
            return _as_bfloat16(self.memory[0, : tile.numel()].view_as(tile)).copy_(tile)
        return tile.to(self.weight_VH.dtype)

    def _tile(self, which: int, rows: slice, columns: slice) -> Tensor:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        return self.memory[which, : shape[0] * shape[1]].view(shape)

    def _head(self, kind: str, columns: slice) -> Tensor:
        """These rows of the head as an operand, made once for all positions."""
        if self.operand is None or self.operand[:2] != (kind, columns):
            head = self.weight_VH[columns]
            made = head.float() if kind == "float32" else torch.cat([head, head.new_ones(head.shape[0], 3)], dim=1)
            self.operand = (kind, columns, made)
        return self.operand[2]


class _Gradients:
    """Gradients of the hidden states and the head from those of the logits, given tile by tile in the tiles' order."""

    def __init__(self, tiles: _Tiles, needed: tuple[bool, ...]) -> None:
        self.tiles = tiles
        hidden_RH, weight_VH = tiles.hidden_RH, tiles.weight_VH
        self.hidden_RH = torch.zeros_like(hidden_RH, dtype=torch.float32) if needed[0] else None
        self.weight_VH = torch.zeros_like(weight_VH) if needed[1] else None
        self.block = weight_VH.new_zeros(tiles.width, weight_VH.shape[1], dtype=torch.float32)

    def add(self, grad: Tensor, columns: slice, rows: slice) -> None:
        grad = self.tiles.rounded(grad)
        add_product = _kernels().add_product if self.tiles.fused else _add_product
        if self.hidden_RH is not None:
            add_product(self.hidden_RH[rows], grad, self.tiles.weight_VH[columns])
        if self.weight_VH is not None:
            block = self.block[: columns.stop - columns.start]
            add_product(block, grad.T, self.tiles.hidden_RH[rows])
            if rows.stop == self.tiles.hidden_RH.shape[0]:
                self.weight_VH[columns] = block
                block.zero_()

    def done(self) -> tuple[Tensor | None, Tensor | None]:
        hidden_RH = None if self.hidden_RH is None else self.hidden_RH.to(self.tiles.hidden_RH.dtype)
        return hidden_RH, self.weight_VH


def _add_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    wide = a_MK.is_cuda and a_MK.dtype != torch.float32
    sum_MN.add_(torch.mm(a_MK, b_KN, out_dtype=torch.float32) if wide else a_MK @ b_KN)


def _as_bfloat16(tile: Tensor) -> Tensor:
    """The first half of the memory of a float32 tile as a bfloat16 tile of its shape."""
    return tile.view(-1)[: (tile.numel() + 1) // 2].view(torch.bfloat16)[: tile.numel()].view_as(tile)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let oneDNN multiply float32 operands as bfloat16, with float32 sums: exact when they were bfloat16 before."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _add_tile(logits_RV: Tensor, target_R: Tensor, sums_4R: Tensor, first: int, scratch_RV: Tensor) -> None:
    """What `logprob_triton.add_tile` does, of logits that are divided by the temperature and are lost."""
    peak_R, z_R, weighted_R, picked_R = sums_4R
    mine, index = _own_targets(target_R, first, logits_RV.shape[1])
    picked_R.add_(torch.where(mine, logits_RV.gather(1, index).squeeze(1), 0.0))
    higher_R = torch.maximum(peak_R, logits_RV.amax(dim=-1))
    fall_R = _raise_peak(peak_R, higher_R, z_R, weighted_R)
    weighted_R.add_(fall_R * z_R)
    exp = torch.exp(logits_RV.sub_(higher_R.unsqueeze(1)), out=scratch_RV)
    z_R.add_(exp.sum(dim=-1))
    weighted_R.add_(logits_RV.mul_(exp).sum(dim=-1))


def _add_kl_tile(logits_RV: Tensor, ref_logits_RV: Tensor, sums_5R: Tensor, scratch_RV: Tensor) -> None:
    """What `logprob_triton.add_kl_tile` does, of logits that are divided by the temperature and are lost."""
    peak_2R, z_2R, weighted_R = sums_5R[:2], sums_5R[2:4], sums_5R[4]
    higher_2R = torch.maximum(peak_2R, torch.stack([logits_RV.amax(dim=-1), ref_logits_RV.amax(dim=-1)]))
    fall_2R = _raise_peak(peak_2R, higher_2R, z_2R)
    ref_exp = torch.sub(ref_logits_RV, higher_2R[1].unsqueeze(1), out=scratch_RV).exp_()
    z_2R[1].add_(ref_exp.sum(dim=-1))
    difference = ref_logits_RV.neg_().add_(logits_RV)
    exp = logits_RV.sub_(higher_2R[0].unsqueeze(1)).exp_()
    z_2R[0].add_(exp.sum(dim=-1))
    weighted_R.mul_(fall_2R[0].exp()).add_(difference.mul_(exp).sum(dim=-1))


def _kernels() -> Any:
    """The module of the Triton kernels, which not every machine can import."""
    from remax_megatron.algorithm import logprob_triton

    return logprob_triton


def _raise_peak(peak_R: Tensor, new_R: Tensor, *sums: Tensor) -> Tensor:
    """Refer sums of exp(l - peak_R) to new_R, all in place; returns peak_R - new_R as they were."""
    fall_R = peak_R - new_R
    for values_R in sums:
        values_R *= fall_R.exp()
    peak_R.copy_(new_R)
    return fall_R


def _own_targets(target_R: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in the `width` columns from `first` on [R], and their index there [R, 1], 0 for the others."""
    index = target_R - first
    mine = (index >= 0) & (index < width)
    return mine, torch.where(mine, index, 0).unsqueeze(1)


def _first_row(weight_VH: Tensor, group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group) * weight_VH.shape[0]


def _slices(num: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, num)) for i in range(0, num, size)]


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    if tensor.numel() > 0 and group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
