"""Which op costs what: names of ATen / prims ops, grouped by the rule that prices them.

Counting conventions (docs/inspect.md): a multiply-add is 2 FLOPs; an elementary function of one
element (exp, tanh, sqrt, a division, a comparison) is 1; a composite is the sum of its parts.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


# Moves no data: the result aliases its input, or is only metadata.
VIEWS = frozenset(
    _words(
        """
        alias as_strided chunk detach diagonal expand expand_as flatten lift_fresh movedim
        narrow permute real select slice split split_with_sizes squeeze swapaxes t transpose
        unbind unfold unsqueeze view view_as view_as_real view_as_complex reshape _reshape_alias
        _unsafe_view unsafe_split unsafe_chunk broadcast_in_dim squeeze_ _assert_scalar
        _assert_tensor_metadata _assert_async sym_constrain_range_for_size sym_constrain_range
        lift device cut cut_backward stop_grad error_tap
        """
    )
)

# Copies or rearranges: bytes, no arithmetic.
COPIES = frozenset(
    _words(
        """
        clone contiguous _to_copy to copy copy_ fill cat stack concat constant_pad_nd pad
        reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d flip roll repeat tile select_scatter slice_scatter diagonal_scatter
        as_strided_scatter convert_element_type device_put lift_fresh_copy resize
        channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle col2im im2col
        select_backward slice_backward view_copy expand_copy permute_copy tril triu masked_fill
        masked_scatter where_copy unfold_backward reflection_pad2d_backward
        reflection_pad1d_backward replication_pad2d_backward diagonal_backward trace
        _conj_physical repeat_interleave unfold_copy alias_copy transpose_copy _pin_memory
        empty_strided_copy
        """
    )
)

# Makes a tensor from nothing: bytes written only, and no data dependency on its arguments.
FACTORIES = frozenset(
    _words(
        """
        empty empty_like empty_strided empty_permuted new_empty new_empty_strided zeros
        zeros_like new_zeros ones ones_like new_ones full full_like new_full arange
        scalar_tensor iota eye linspace tril_indices triu_indices
        """
    )
)

# Random numbers: one a written element.
RANDOM = frozenset(
    _words(
        """
        rand rand_like randn randn_like randint randint_like randperm bernoulli normal uniform
        normal_functional exponential inductor_random inductor_randint philox_rand rademacher
        rademacher_like
        """
    )
)

# Operations an output element.
POINTWISE = {
    **dict.fromkeys(
        _words(
            """
            abs add neg sub rsub mul div true_divide reciprocal sqrt rsqrt exp exp2 expm1 log
            log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh atan2
            erf erfc erfinv pow square floor ceil round trunc frac sign sgn signbit relu relu6
            threshold clamp clamp_min clamp_max clip minimum maximum fmin fmax fmod remainder
            floor_divide eq ne lt le gt ge logical_and logical_or logical_not logical_xor
            bitwise_and bitwise_or bitwise_not bitwise_xor bitwise_left_shift
            bitwise_right_shift isnan isinf isfinite where hypot lgamma digamma copysign
            nextafter heaviside threshold_backward hardtanh hardtanh_backward leaky_relu
            leaky_relu_backward isposinf isneginf nan_to_num imag __and__ __or__ __xor__ ldexp
            xlogy polygamma conj_physical isclose
            """
        ),
        1,
    ),
    **dict.fromkeys(
        _words(
            """
            addcmul addcdiv lerp native_dropout native_dropout_backward prelu dropout
            _prelu_kernel fma masked_scale
            """
        ),
        2,
    ),
    "sigmoid": 4,  # negate, exp, add, divide
    "logit": 3,
    "sigmoid_backward": 3,
    "tanh_backward": 3,
    "softplus": 3,
    "softplus_backward": 4,
    "hardsigmoid": 4,
    "hardsigmoid_backward": 2,
    "hardswish": 5,
    "hardswish_backward": 5,
    "elu": 3,
    "elu_backward": 4,
    "celu": 3,
    "selu": 4,
    "gelu": 5,  # the erf form: 0.5 x (1 + erf(x / sqrt 2))
    "gelu_backward": 11,
    "silu": 5,
    "silu_backward": 9,
    "mish": 5,
    "mish_backward": 12,
    "log_sigmoid_forward": 4,
    "log_sigmoid_backward": 5,
    "sinc": 3,
    "_prelu_kernel_backward": 4,
    "huber_loss": 5,
    "huber_loss_backward": 5,
    "smooth_l1_loss": 5,
    "smooth_l1_loss_backward": 5,
    "mse_loss_backward": 3,
    "binary_cross_entropy_backward": 5,
    "soft_margin_loss_backward": 5,
    "fake_quantize_per_tensor_affine": 5,
}

# Operations an *input* element.
REDUCTIONS = {
    **dict.fromkeys(
        _words(
            """
            sum nansum prod amax amin max min aminmax argmax argmin any all mean cumsum cumprod
            cummax cummin logcumsumexp count_nonzero sum_to_size median nanmedian kthvalue mode
            xor_sum nonzero bincount dist_sum
            """
        ),
        1,
    ),
    **dict.fromkeys(
        _words(
            """
    linalg_vector_norm norm linalg_norm frobenius_norm
    """
        ),
        2,
    ),
    **dict.fromkeys(
        _words(
            """
    var std var_mean std_mean
    """
        ),
        4,
    ),  # mean, then centre, square, add
    "logsumexp": 4,  # max, subtract, exp, add
    "mse_loss": 3,
    "l1_loss": 3,
    "binary_cross_entropy": 6,
    "binary_cross_entropy_with_logits": 7,
    "kl_div": 4,
    "cosine_similarity": 6,
    "renorm": 4,
    "_weight_norm_interface": 4,
    "_weight_norm_interface_backward": 8,
}

# Operations an element of the first argument: softmax, norms and their backwards.
PER_INPUT = {
    "_softmax": 5,  # max, subtract, exp, add, divide
    "softmax": 5,
    "_log_softmax": 5,
    "log_softmax": 5,
    "_safe_softmax": 5,
    "_softmax_backward_data": 4,
    "_log_softmax_backward_data": 4,
    "native_layer_norm": 8,  # mean 1, variance 3, normalise 2, scale and shift 2
    "layer_norm": 8,
    "native_group_norm": 8,
    "group_norm": 8,
    "native_batch_norm": 8,
    "batch_norm": 8,
    "_native_batch_norm_legit": 8,
    "_native_batch_norm_legit_functional": 8,
    "_native_batch_norm_legit_no_training": 4,  # no statistics
    "_batch_norm_with_update": 8,
    "_batch_norm_with_update_functional": 8,
    "_batch_norm_no_update": 8,
    "cudnn_batch_norm": 8,
    "instance_norm": 8,
    "rms_norm": 4,
    "_fused_rms_norm": 4,
    "native_layer_norm_backward": 13,  # normalise 2, two sums 4, input gradient 4, affine 3
    "native_group_norm_backward": 13,
    "native_batch_norm_backward": 13,
    "batch_norm_backward": 13,
    "cudnn_batch_norm_backward": 13,
    "_fused_rms_norm_backward": 9,
    "nll_loss_forward": 1,
    "nll_loss2d_forward": 1,
    "cross_entropy_loss": 7,
    "local_response_norm": 8,
}

# Reads only what it picks: the result's bytes and the index.
GATHERS = frozenset(
    _words(
        """
        embedding index gather index_select take take_along_dim grid_sampler_2d_nearest
        _unsafe_index _unsafe_masked_index repeat_interleave_indexed one_hot bucketize
        searchsorted _embedding_bag _embedding_bag_forward_only
        """
    )
)

# Writes a whole result of the destination's size; one addition a source element.
SCATTERS = frozenset(
    _words(
        """
        index_put _index_put_impl index_add index_copy index_fill scatter scatter_add
        scatter_reduce embedding_dense_backward embedding_backward nll_loss_backward
        nll_loss2d_backward _unsafe_index_put put index_reduce gather_backward
        _unsafe_masked_index_put_accumulate value_selecting_reduction_backward
        masked_select_backward max_unpool2d segment_reduce
        """
    )
)

# Interpolations: operations an output element (forward) or a gradient element (backward).
RESAMPLES = {
    "upsample_nearest1d": 0,
    "upsample_nearest2d": 0,
    "upsample_nearest3d": 0,
    "_upsample_nearest_exact2d": 0,
    "upsample_linear1d": 3,
    "upsample_bilinear2d": 7,
    "_upsample_bilinear2d_aa": 7,
    "upsample_bicubic2d": 31,
    "_upsample_bicubic2d_aa": 31,
    "upsample_trilinear3d": 15,
    "grid_sampler_2d": 7,
    "grid_sampler_3d": 15,
}
