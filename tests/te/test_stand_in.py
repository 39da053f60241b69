"""The stand-in for Transformer Engine's compiled half: each function against torch, and how it is called.

Float32, and 1e-5 of torch, unless a test says otherwise. `make test-te` runs this.
"""

from __future__ import annotations

import ast

import pytest
import torch
import torch.nn.functional as F

from tests.stand_ins.te_cpu import compiled, load

CU_SEQLENS = torch.tensor([0, 4, 5, 14], dtype=torch.int32)  # rows of 4, 1 and 9 tokens
POSITIONS = [*range(4), 0, *range(9)]

# The calls in Transformer Engine 2.19 that the stand-in answers, as they stand there: file -> expressions.
CALLS = {
    "cpp_extensions/gemm.py": (
        """(A, transa, B, transb, out, quantization_params, TE_DType[out_dtype] if out_dtype is not None else None,
            bias, bias_dtype, gelu, gelu_in, grad, workspace, workspace.shape[0], accumulate, use_split_accumulator)""",
        """{'comm_overlap': ub, 'comm_type': ub_type, 'extra_output': extra_output, 'bulk_overlap': bulk_overlap,
            'alpha': alpha, 'beta': beta}""",
        "tex.generic_gemm(*args, **kwargs)",
    ),
    "module/_common.py": (
        """normalization_func(*inputs, eps, ln_out, output_quantizer,
            TE_DType[output_dtype] if output_dtype in TE_DType else output_dtype, fwd_ln_sm_margin,
            zero_centered_gamma)""",
    ),
    "module/layernorm_linear.py": (
        "tex.rmsnorm_bwd(dgrad, inputmat, rsigma, ln_weight, ctx.bwd_ln_sm_margin, ctx.zero_centered_gamma)",
    ),
    "ops/basic/rmsnorm.py": (
        """rmsnorm_fwd(x, w, self.eps, None, next_op_input_quantizer, TE_DType[dtype], sm_margin,
            self.zero_centered_gamma)""",
        "rmsnorm_bwd(dy, x, rstdevs, w, self._sm_margins['backward'], self.zero_centered_gamma)",
    ),
    "attention/rope.py": (
        """tex.fused_rope_forward(t, freqs, start_positions, QKVFormat[tensor_format], interleaved, cu_seqlens, cp_size,
            cp_rank)""",
        """tex.fused_rope_backward(grad_output, freqs, start_positions, QKVFormat[ctx.tensor_format], ctx.interleaved,
            cu_seqlens, ctx.cp_size, ctx.cp_rank)""",
    ),
    "attention/dot_product_attention/utils.py": (
        """tex.get_fused_attn_backend(is_training, q_type, kv_type, QKVLayout[qkv_layout], AttnBiasType[bias_type],
            AttnMaskType[attn_mask_type], SoftmaxType[softmax_type], *args)""",
        "tex.convert_thd_to_bshd(thd_tensor, cu_seqlens, batch_size, max_seqlen)",
        "tex.convert_bshd_to_thd(bshd_tensor, cu_seqlens, num_tokens)",
    ),
    "cpp_extensions/fused_attn.py": (
        """tex.fused_attn_fwd(max_seqlen_q, max_seqlen_kv, is_training, attn_scale, dropout, fast_zero_fill,
            QKVLayout[qkv_layout], QKVFormat[o_format], QKVFormat[qkv_scale_inv_format], AttnBiasType[attn_bias_type],
            AttnMaskType[attn_mask_type], SoftmaxType[softmax_type], window_size, bottom_right_diagonal, cu_seqlens_q,
            cu_seqlens_kv, q, k, v, fake_dtype, cu_seqlens_q_padded, cu_seqlens_kv_padded, page_table_k, page_table_v,
            s_quantizer, o_quantizer, attn_bias, softmax_offset, rng_gen, rng_elts_per_thread, return_max_logit,
            cuda_graph)""",
        """tex.fused_attn_bwd(max_seqlen_q, max_seqlen_kv, attn_scale, dropout, fast_zero_fill, QKVLayout[qkv_layout],
            QKVFormat[o_format], QKVFormat[do_format], QKVLayout[dqkv_layout], QKVFormat[qkv_scale_inv_format],
            QKVFormat[do_scale_inv_format], AttnBiasType[attn_bias_type], AttnMaskType[attn_mask_type],
            SoftmaxType[softmax_type], window_size, bottom_right_diagonal, deterministic, cu_seqlens_q, cu_seqlens_kv,
            q, k, v, o, d_o, fake_dtype, aux_ctx_tensors, cu_seqlens_q_padded, cu_seqlens_kv_padded, s_quantizer,
            dp_quantizer, dqkv_quantizer, cuda_graph)""",
    ),
    "optimizers/multi_tensor_apply.py": ("op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)",),
    "optimizers/fused_adam.py": (
        """multi_tensor_applier(adam_func, self._dummy_overflow_buf, tensor_lists, group['lr'], beta1, beta2,
            group['eps'], group['step'], self.adam_w_mode, bias_correction, group['weight_decay'], *inv_scale_arg,
            *out_dtype_arg)""",
    ),
}


@pytest.mark.parametrize("file", CALLS)
def test_transformer_engine_calls_what_the_stand_in_answers(file):
    tree = ast.parse((load.WHEEL / "transformer_engine" / "pytorch" / file).read_text())
    found = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call | ast.Tuple | ast.Dict)}
    for call in CALLS[file]:
        assert ast.unparse(ast.parse(call)) in found, f"{file} no longer says {call}"


def test_what_has_no_stand_in_says_so():
    with pytest.raises(NotImplementedError, match=r"transformer_engine_torch\.fp8_transpose has no stand-in"):
        compiled.fp8_transpose()
    with pytest.raises(NotImplementedError, match=r"generic_gemm on the CPU knows only: no FP8 no GELU no overlap"):
        gemm(torch.ones(2, 2), torch.ones(2, 2), "TN", gelu=True)
    with pytest.raises(NotImplementedError, match=r"rmsnorm_fwd on the CPU knows only: no shifted weight"):
        compiled.rmsnorm_fwd(torch.ones(2), torch.ones(2), 1e-6, None, None, compiled.DType.kFloat32, 0, True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def leaf(*shape: int) -> torch.Tensor:
    """Values that bfloat16 holds exactly."""
    return torch.randn(*shape).bfloat16().float().requires_grad_()


def close(found, expected, dtype: torch.dtype) -> None:
    """All in `dtype`, and within its rounding."""
    assert {tensor.dtype for tensor in found} == {dtype}
    within = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=within, atol=within)


def gemm(a, b, layout, *, out=None, dtype=None, bias=None, grad=False, accumulate=False, gelu=False):
    dtype = None if dtype is None else compiled.DType[f"k{dtype}"]
    first = (a, layout[0] == "T", b, layout[1] == "T", out, None, dtype, bias, None, gelu, None, grad, None, 0)
    with torch.no_grad():
        return compiled.generic_gemm(*first, accumulate, False)


def test_products_forward_and_backward():
    x, weight, bias = leaf(3, 5, 8), leaf(6, 8), leaf(6)
    y = F.linear(x, weight, bias)
    dy = torch.randn_like(y)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    torch.testing.assert_close(gemm(weight, x, "TN", bias=bias)[0], y)
    torch.testing.assert_close(gemm(weight, dy, "NN", grad=True)[0], dx)
    product, bias_grad, *_ = gemm(x, dy, "NT", bias=bias, grad=True)
    torch.testing.assert_close((product, bias_grad), (dweight, dbias))


def test_a_fused_weight_gradient_is_added_in_float32():
    x, dy = torch.randn(300, 8).bfloat16(), torch.randn(300, 6).bfloat16()
    main_grad = torch.full((6, 8), 2.0)
    (out, *_) = gemm(x, dy, "NT", out=main_grad, dtype="Float32", grad=True, accumulate=True)
    expected = dy.float().T @ x.float()
    assert out is main_grad
    torch.testing.assert_close(main_grad, expected + 2.0)
    gemm(x, dy, "NT", out=main_grad, dtype="Float32", grad=True)
    torch.testing.assert_close(main_grad, expected)  # overwritten
    rounded = gemm(x, dy, "NT", grad=True)[0]
    assert torch.equal(rounded, expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype):
    x, weight = leaf(7, 16), leaf(16)
    y = F.rms_norm(x, (16,), weight, 1e-6)
    dy = torch.randn_like(y).bfloat16().float()
    expected = y, *torch.autograd.grad(y, (x, weight), dy)
    otype = compiled.DType.kFloat32 if dtype == torch.float32 else compiled.DType.kBFloat16
    with torch.no_grad():
        x, weight, dy = (tensor.to(dtype) for tensor in (x, weight, dy))
        out, mean, rsigma = compiled.rmsnorm_fwd(x, weight, 1e-6, None, None, otype, 0, False)
        found = out, *compiled.rmsnorm_bwd(dy, x, rsigma, weight, 0, False)
    assert mean is None and rsigma.shape == (7,)
    close(found, expected, dtype)


def turn(function, x, freqs, format):
    return function(x, freqs, None, compiled.NVTE_QKV_Format[f"NVTE_{format}"], False, CU_SEQLENS, 1, 0)


def test_rotation_is_that_of_complex_numbers():
    """6 of 8 values turn: pairs (0, 3), (1, 4), (2, 5) as complex numbers times e^(i angle)."""
    x, angles = torch.randn(14, 4, 8), torch.rand(9, 1, 1, 3)
    expected = torch.complex(x[..., :3], x[..., 3:6]) * torch.polar(torch.ones(()), angles[POSITIONS, 0])
    expected = torch.cat([expected.real, expected.imag, x[..., 6:]], dim=-1)
    freqs = torch.cat([angles, angles], dim=-1)
    torch.testing.assert_close(turn(compiled.fused_rope_forward, x, freqs, "THD"), expected)
    per_token = freqs[POSITIONS]  # [14, 1, 1, 6]
    torch.testing.assert_close(
        turn(compiled.fused_rope_forward, x.unsqueeze(1), per_token, "SBHD").squeeze(1), expected
    )


@pytest.mark.parametrize("format", ["THD", "SBHD"])
def test_gradient_of_the_rotation(format):
    x, freqs = leaf(*((14, 4, 8) if format == "THD" else (9, 2, 4, 8))), torch.rand(9, 1, 1, 6)  # halves that differ
    turned = turn(compiled.fused_rope_forward, x, freqs, format)
    grad = torch.randn_like(turned)
    (expected,) = torch.autograd.grad(turned, x, grad)
    torch.testing.assert_close(turn(compiled.fused_rope_backward, grad, freqs, format), expected)


def attend(q, k, v, max_seqlen=9, *, forward=None):
    """`fused_attn_fwd`; given its result and the gradient of the output, `fused_attn_bwd`."""
    names = ["NVTE_QKV_Layout.NVTE_THD_THD_THD", "NVTE_Bias_Type.NVTE_NO_BIAS"]
    names += ["NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK", "NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX"]
    layout, bias, mask, softmax = names
    rows, tail = (CU_SEQLENS, CU_SEQLENS), (0.3, 0.0, True)
    with torch.no_grad():
        if forward is None:
            kind = (layout, None, None, bias, mask, softmax, (-1, 0), None)
            rest = (q.dtype, *rows, None, None, None, None, None, None, None, 0, False, False)
            return compiled.fused_attn_fwd(max_seqlen, max_seqlen, True, *tail, *kind, *rows, q, k, v, *rest)
        (out, *aux), d_out = forward
        kind = (layout, None, None, layout, None, None, bias, mask, softmax, (-1, 0), None, False)
        rest = (out, d_out, q.dtype, aux, *rows, None, None, None, False)
        return compiled.fused_attn_bwd(max_seqlen, max_seqlen, *tail, *kind, *rows, q, k, v, *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_causal_in_every_row_and_shares_keys_among_query_heads(dtype):
    q, k, v = leaf(16, 4, 8), leaf(16, 2, 8), leaf(16, 2, 8)  # two tokens behind the last row
    outs = []
    for start, stop in ((0, 4), (4, 5), (5, 14)):
        row = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*row, is_causal=True, scale=0.3, enable_gqa=True)
        outs.append(out.squeeze(0).transpose(0, 1))
    expected = F.pad(torch.cat(outs), (0, 0, 0, 0, 0, 2))
    d_out = torch.randn_like(expected).bfloat16().float()
    expected = expected, *torch.autograd.grad(expected, (q, k, v), d_out)
    q, k, v, d_out = (tensor.detach().to(dtype) for tensor in (q, k, v, d_out))
    forward = attend(q, k, v)
    found = forward[0], *attend(q, k, v, forward=(forward, d_out))[:3]
    close(found, expected, dtype)


def test_a_row_beyond_max_seqlen_is_an_error():
    q = torch.randn(14, 2, 8)
    with pytest.raises(AssertionError, match="max_seqlen 8, but a row has 9 tokens"):
        attend(q, q, q, max_seqlen=8)
    with pytest.raises(AssertionError, match="max_seqlen 8, but a row has 9 tokens"):
        compiled.convert_thd_to_bshd(q, CU_SEQLENS, 3, 8)


def test_padding_of_rows_and_back():
    packed = torch.randn(14, 4, 8)
    padded = compiled.convert_thd_to_bshd(packed, CU_SEQLENS, 3, 10)
    assert padded.shape == (3, 10, 4, 8)
    assert torch.equal(padded[0, :4], packed[:4]) and torch.equal(padded[2, :9], packed[5:14])
    assert not padded[0, 4:].any() and not padded[1, 1:].any()
    assert torch.equal(compiled.convert_bshd_to_thd(padded, CU_SEQLENS, 14), packed)
    assert not compiled.convert_bshd_to_thd(padded, CU_SEQLENS, 16)[14:].any()


@pytest.mark.parametrize("masters", [False, True])
def test_adam(masters):
    parameter = torch.nn.Parameter(torch.randn(5, 3))
    master, first, second = parameter.detach().clone(), torch.zeros(5, 3), torch.zeros(5, 3)
    weight = master.bfloat16() if masters else master
    adam = torch.optim.AdamW([parameter], lr=0.1, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.2)
    for step in (1, 2, 3):
        parameter.grad = torch.randn(5, 3)
        adam.step()
        lists = [[parameter.grad], [weight], [first], [second], *([[master]] if masters else [])]
        compiled.multi_tensor_adam(0, None, lists, 0.1, 0.8, 0.9, 1e-5, step, True, 1, 0.2)
    torch.testing.assert_close(master, parameter.detach())
    torch.testing.assert_close((first, second), (adam.state[parameter]["exp_avg"], adam.state[parameter]["exp_avg_sq"]))
    assert torch.equal(weight.float(), master.bfloat16().float() if masters else master)


def test_norm_and_scale_of_lists():
    tensors = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0], [12.0]])]
    norm, each = compiled.multi_tensor_l2norm(0, None, [tensors], True)
    assert norm.tolist() == [13.0] and each.tolist() == pytest.approx([3.0, 160**0.5])
    halves = [tensor.bfloat16() for tensor in tensors]
    for scale, function in (
        (0.5, compiled.multi_tensor_scale),
        (torch.tensor(0.5), compiled.multi_tensor_scale_tensor),
    ):
        function(0, None, [tensors, halves], scale)
        assert halves[0].tolist() == [1.5, 0.0] and halves[1].tolist() == [[2.0], [6.0]]


def test_only_half_precision_has_a_fused_attention():
    dtypes = (compiled.DType.kBFloat16, compiled.DType.kFloat16, compiled.DType.kFloat32)
    found = [int(compiled.get_fused_attn_backend(True, dtype, dtype, *[None] * 4)) for dtype in dtypes]
    assert found == [1, 1, -1]
