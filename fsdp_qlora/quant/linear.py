"""The linear layer that is trained: frozen 4-bit matrix plus LoRA, with its own forward and backward.

    y = x W^T + b + s (x A^T) B^T          W: 4-bit [out, in]    A: [r, in]    B: [out, r]    s = alpha / r

or, with DoRA, y = m / |W + s B A| * (x W^T + s (x A^T) B^T) + b, with the lengths of the rows |.| as constants.

Saved for backward are the input, s x A^T and references to the parameters, which FSDP frees and refills; the
dequantised W is made again in backward and never outlives the operation. With a gain, the products with W, x W^T and dy W,
are computed in fp8 (fp8.py); everything else, LoRA included, stays in the dtype of x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_qlora.quant.dequantize import dequantize, dequantize_fp8
from fsdp_qlora.quant.fp8 import fp8_product, gain_of
from fsdp_qlora.quant.layout import Layout

ADAPTER_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
"""Names of the parameters that are trained, where they exist."""


torch.library.define("fsdp_qlora::add_product_", "(Tensor(a!) total, Tensor left, Tensor right) -> ()")


@torch.library.impl("fsdp_qlora::add_product_", "default")
def _(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.addmm_(left, right)


@torch.library.register_fake("fsdp_qlora::add_product_")  # type: ignore[untyped-decorator]
def _(total: Tensor, left: Tensor, right: Tensor) -> None:
    return


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left @ right, in the memory of `total`; of a plain addmm torch.compile would make a copy."""
    if torch.compiler.is_compiling():
        torch.ops.fsdp_qlora.add_product_(total, left, right)
        return total
    return total.addmm_(left, right)


def _widens(rank: int, layout: Layout) -> bool:
    """Whether a matrix widened by the rank keeps the alignment (16 bytes) that fast kernels need, and is made anyway."""
    return rank % 8 == 0 and layout.dense_dtype is None


def _forward_product(
    x_TI: Tensor,
    a_TR: Tensor | None,
    packed: Tensor,
    lora_B: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    gain: Tensor | None,
) -> Tensor:
    """Return x W^T + a B^T + bias, without the second product where there is no LoRA.

    Adding the second product reads and writes the whole output. Where that is wider than the input, one product of the
    widened matrices, [x | a] [W | B]^T, is less work although it copies x.
    """
    if gain is not None:
        y_TO = fp8_product(x_TI, dequantize_fp8(packed, layout, gain, transpose=False), gain)
        y_TO = y_TO if bias is None else y_TO + bias
        return y_TO if a_TR is None or lora_B is None else _add_product(y_TO, a_TR, lora_B.to(y_TO.dtype).t())
    if a_TR is None or lora_B is None:
        return F.linear(x_TI, dequantize(packed, layout, x_TI.dtype, "forward"), bias)
    if layout.out_features > layout.in_features and _widens(a_TR.shape[1], layout):
        weight = dequantize(packed, layout, x_TI.dtype, "forward", beside=lora_B)
        return F.linear(torch.cat((x_TI, a_TR), 1), weight, bias)
    y_TO = F.linear(x_TI, dequantize(packed, layout, x_TI.dtype, "forward"), bias)
    return _add_product(y_TO, a_TR, lora_B.to(y_TO.dtype).t())


def _backward_product(
    dy_TO: Tensor, g_TR: Tensor | None, packed: Tensor, lora_A: Tensor | None, layout: Layout, gain: Tensor | None
) -> Tensor:
    """Return dy W + g A, as one product [dy | g] [W; A] where the result is wider than dy (see _forward_product)."""
    if gain is not None:
        dx_TI = fp8_product(dy_TO, dequantize_fp8(packed, layout, gain, transpose=True), gain)
        return dx_TI if g_TR is None or lora_A is None else _add_product(dx_TI, g_TR, lora_A.to(dx_TI.dtype))
    if g_TR is None or lora_A is None:
        return dy_TO @ dequantize(packed, layout, dy_TO.dtype, "backward")
    if layout.in_features > layout.out_features and _widens(g_TR.shape[1], layout):
        weight = dequantize(packed, layout, dy_TO.dtype, "backward", below=lora_A)
        return torch.cat((dy_TO, g_TR), 1) @ weight
    dx_TI = dy_TO @ dequantize(packed, layout, dy_TO.dtype, "backward")
    return _add_product(dx_TI, g_TR, lora_A.to(dx_TI.dtype))


class LoRALinearFunction(torch.autograd.Function):
    """Forward and backward of the layer; gradients for the input and the two LoRA matrices, never for the base."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_lora: Tensor | None,
        packed: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        layout: Layout,
        scaling: float,
        skip_product: bool = False,
        gain: Tensor | None = None,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        ctx.layout, ctx.scaling, ctx.has_dropout = layout, scaling, x_lora is not None
        a_TR = None
        if lora_A is None or lora_B is None:
            ctx.save_for_backward(packed, gain)
        else:
            u_TI = x_TI if x_lora is None else x_lora.reshape(-1, x.shape[-1])
            a_TR = u_TI @ (lora_A * scaling).to(x.dtype).t()  # one pass of the small matrix, not one of the result
            ctx.save_for_backward(packed, gain, u_TI, a_TR, lora_A, lora_B)
        if skip_product:
            y_TO = x.new_empty(x_TI.shape[0], layout.out_features)
        else:
            y_TO = _forward_product(x_TI, a_TR, packed, lora_B, bias, layout, gain)
        return y_TO.view(*x.shape[:-1], layout.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        packed, gain, *saved = ctx.saved_tensors
        layout: Layout = ctx.layout
        dy_TO = dy.reshape(-1, layout.out_features)
        x_shape = (*dy.shape[:-1], layout.in_features)
        dx_TI = du_TI = dA_RI = dB_OR = None
        g_TR = lora_A = None
        if saved:
            u_TI, a_TR, lora_A, lora_B = saved
            g_TR = dy_TO @ (lora_B * ctx.scaling).to(dy.dtype)
            dA_RI = (g_TR.t() @ u_TI).to(lora_A.dtype)
            dB_OR = (dy_TO.t() @ a_TR).to(lora_B.dtype)
            if ctx.has_dropout and ctx.needs_input_grad[1]:
                du_TI = g_TR @ lora_A.to(dy.dtype)
        if ctx.needs_input_grad[0]:
            branch = (None, None) if ctx.has_dropout else (g_TR, lora_A)
            dx_TI = _backward_product(dy_TO, branch[0], packed, branch[1], layout, gain)
        dx = None if dx_TI is None else dx_TI.view(x_shape)
        du = None if du_TI is None else du_TI.view(x_shape)
        return dx, du, None, None, dA_RI, dB_OR, None, None, None, None


@torch.no_grad()
def row_norms(
    packed: Tensor, lora_A: Tensor, lora_B: Tensor, layout: Layout, scaling: float, dtype: torch.dtype
) -> Tensor:
    """Return the lengths of the rows of W + s B A, fp32 [out], without making B A.

    |w + s A^T b|^2 = |w|^2 + 2 s b . (A w) + s^2 b . (A A^T) b for a row w of W and the same row b of B.

    Args:
        dtype: in which W is dequantised, as in the product it is for.
    """
    weight = dequantize(packed, layout, dtype, "norms")
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    cross_OR = (weight @ lora_A.to(dtype).t()).float()
    squares += ((2 * scaling * cross_OR + scaling**2 * (lora_B @ (lora_A @ lora_A.t()))) * lora_B).sum(1)
    # a row of zeros has no direction: its output stays 0 instead of becoming NaN
    norms: Tensor = squares.clamp_(min=torch.finfo(torch.float32).tiny).sqrt()
    return norms


class LoRALinear(nn.Module):
    """Frozen 4-bit linear layer with an optional LoRA branch.

    Parameters: `packed` (flat 4-bit parameter, frozen), `bias` (frozen, optional), `lora_A` [r, in] and `lora_B` [out, r]
    in float32 (trained; absent with rank 0), `lora_magnitude_vector` [out] in float32 (trained; with DoRA only). Buffer:
    `gain` [1] in float32, of the matrix in fp8; None where its products are not in fp8, and until `begin_fp8`.

    Args:
        name: name of the layer in the model it replaces, such as model.layers.0.self_attn.q_proj.
        layout: byte layout of the 4-bit matrix.
        bias: whether the layer has a bias [out].
        dtype: dtype of the computation and of the bias.
        rank: LoRA rank r; 0 for no LoRA branch.
        scaling: factor s of the LoRA branch.
        dropout: probability with which elements of the LoRA branch's input are zeroed in training.
        use_dora: train the lengths of the rows of W + s B A apart from their directions.
        fp8: compute the products with W in fp8; the layout must suit it (fp8.suits_fp8).

    Attributes:
        skip_product: return an unset output, for a second run of which only the gradients are wanted.
    """

    packed: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    gain: Tensor | None

    def __init__(
        self,
        name: str,
        layout: Layout,
        *,
        bias: bool,
        dtype: torch.dtype,
        rank: int = 0,
        scaling: float = 1.0,
        dropout: float = 0.0,
        use_dora: bool = False,
        fp8: bool = False,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.name, self.layout, self.rank, self.scaling = name, layout, rank, scaling
        self.in_features, self.out_features = layout.in_features, layout.out_features
        packed = torch.empty(layout.numel, dtype=layout.storage_dtype, device=device)
        self.packed = nn.Parameter(packed, requires_grad=False)
        empty_bias = torch.empty(layout.out_features, dtype=dtype, device=device) if bias else None
        self.bias = nn.Parameter(empty_bias, requires_grad=False) if empty_bias is not None else None
        self.lora_A = self.lora_B = self.lora_magnitude_vector = None
        if rank > 0:
            self.lora_A = nn.Parameter(torch.empty(rank, layout.in_features, dtype=torch.float32, device=device))
            self.lora_B = nn.Parameter(torch.empty(layout.out_features, rank, dtype=torch.float32, device=device))
            if use_dora:
                magnitudes = torch.empty(layout.out_features, dtype=torch.float32, device=device)
                self.lora_magnitude_vector = nn.Parameter(magnitudes)
        self.dropout, self.fp8 = dropout, fp8
        self.register_buffer("gain", None, persistent=False)
        self.skip_product = False

    def adapter(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and parameter of what is trained."""
        for name in ADAPTER_PARTS:
            parameter = getattr(self, name)
            if parameter is not None:
                yield name, parameter

    def adapter_shape(self, name: str) -> tuple[int, ...]:
        """Return the whole shape of one of them, of which FSDP may hold a part."""
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (self.rank, self.in_features),
            "lora_B": (self.out_features, self.rank),
            "lora_magnitude_vector": (self.out_features,),
        }
        return shapes[name]

    def row_norms(self, dtype: torch.dtype) -> Tensor:
        """Return the lengths of the rows of W + s B A, fp32 [out]; the parameters must be whole."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        return row_norms(self.packed, self.lora_A, self.lora_B, self.layout, self.scaling, dtype)

    def begin_fp8(self) -> None:
        """Find the gain of the matrix, once its weights are loaded; the parameters must be whole."""
        self.gain = torch.tensor([gain_of(self.packed, self.layout)], device=self.packed.device)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out] in the dtype of x."""
        assert self.gain is not None or not self.fp8
        x_lora = None
        if self.dropout > 0 and self.training and self.lora_A is not None:
            x_lora = F.dropout(x, self.dropout)
        if self.lora_magnitude_vector is not None:
            return self._decomposed(x, x_lora, self.lora_magnitude_vector)
        matrices = self.packed, self.bias, self.lora_A, self.lora_B
        y: Tensor = LoRALinearFunction.apply(  # type: ignore[no-untyped-call]
            x, x_lora, *matrices, self.layout, self.scaling, self.skip_product, self.gain
        )
        return y

    def _decomposed(self, x: Tensor, x_lora: Tensor | None, magnitudes: Tensor) -> Tensor:
        """Return DoRA's output: that of LoRA without bias, times the wanted lengths of the rows by the present ones.

        PEFT's dropout (x_lora given) is on the input of all that DoRA adds to x W^T, which makes
        (x - x_lora) W^T + m / |.| * (x_lora W^T + s (x_lora A^T) B^T) + b.

        Source: arXiv 2402.09353, section 4.3, where the lengths are constants for the gradient.
        """
        apply = LoRALinearFunction.apply
        branch = x if x_lora is None else x_lora
        y: Tensor = apply(  # type: ignore[no-untyped-call]
            branch, None, self.packed, None, self.lora_A, self.lora_B, self.layout, self.scaling, False, self.gain
        )
        y = (y * (magnitudes / self.row_norms(x.dtype))).to(x.dtype)
        if x_lora is not None:
            rest: Tensor = apply(  # type: ignore[no-untyped-call]
                x - x_lora, None, self.packed, self.bias, None, None, self.layout, self.scaling, False, self.gain
            )
            return y + rest
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.layout.quant_type}, rank {self.rank}"


def initial_lora_A(shape: tuple[int, ...], rank: int, generator: torch.Generator, kind: str = "default") -> Tensor:
    """Return PEFT's initial lora_A [rows, in], fp32; lora_B starts at zero.

    Args:
        kind: 'default', Kaiming-uniform with a = sqrt(5), or 'gaussian', of deviation 1 / rank.
    """
    weight = torch.empty(shape, dtype=torch.float32)
    if kind == "gaussian":
        return nn.init.normal_(weight, std=1 / rank, generator=generator)
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
