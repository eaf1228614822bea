"""The same weights in the formats of other projects."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from springtide.errors import SpringtideError
from springtide.files import replacing

ATTENTION = "springtide_export"
EXPORTED = {"llama": "Llama", "qwen3": "Qwen3"}


def check_exported(model: PreTrainedModel, peer: str) -> None:
    """Raise SpringtideError unless the model's architecture can be written for ``peer``."""
    if model.config.model_type not in EXPORTED:
        raise SpringtideError(
            f"--against {peer} takes {' and '.join(EXPORTED.values())} models only, not '{model.config.model_type}'; "
            "leave it out."
        )


def once(target: Path, write: Callable[[Path], None]) -> Path:
    """``target``, written before if it was not there, whole or not at all."""
    if not target.exists():
        with replacing(target, "choose another place with --cache", make=True) as temporary:
            write(temporary)
    return target


# -- OpenVINO -------------------------------------------------------------------------------------------------------


def write_openvino(model: PreTrainedModel, folder: Path) -> None:
    """Write a stateful OpenVINO model, weights in the model's dtype, as `optimum-cli export openvino` would.

    optimum-intel itself pins older versions of transformers.
    """
    openvino: Any = import_module("openvino")
    layers = model.config.num_hidden_layers
    heads, head_dim = model.config.num_key_value_heads, model.config.head_dim
    inputs = ["input_ids", "attention_mask", "position_ids", "beam_idx", *(f"past.{i}" for i in range(2 * layers))]
    outputs = ["logits", *(f"present.{i}" for i in range(2 * layers))]
    example = (
        torch.ones(1, 3, dtype=torch.long),
        torch.ones(1, 5, dtype=torch.long),
        torch.arange(2, 5)[None],
        torch.zeros(1, dtype=torch.int32),
        *(torch.zeros(1, heads, 2, head_dim) for _ in range(2 * layers)),
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of attributes that tracing looks at, and of shapes that are fixed here
        graph = openvino.convert_model(_Stateless(_traceable(model)), example_input=example)
    for ports, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    shapes = {name: [-1, heads, -1, head_dim] for name in inputs[4:]}
    graph.reshape({**{name: [-1, -1] for name in inputs[:3]}, "beam_idx": [-1], **shapes})
    _make_stateful(graph, heads, head_dim, layers)
    folder.mkdir()
    openvino.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=False)
    model.config.save_pretrained(folder)


def _traceable(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the weights and may be patched for tracing."""
    shared: dict[int, Any] = {id(x): nn.Parameter(x.data, requires_grad=False) for x in model.parameters()}
    twin = copy.deepcopy(model, shared)
    twin.config._attn_implementation = ATTENTION
    if model.dtype != torch.float32:
        # Computes in fp32 on paper, with the weights kept as they are; the device then computes in their precision.
        import_module("openvino.frontend.pytorch.patch_model").__dict__["__make_16bit_traceable"](twin)
    return twin


class _Stateless(nn.Module):
    """A model as a function of tokens and past keys and values, to logits and present keys and values."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        stack = self.model.model
        cache = [x.index_select(0, beam_idx) for x in past]
        slots = torch.arange(attention_mask.shape[1])
        seen = (slots <= position_ids[:, None, :, None]) & attention_mask.bool()[:, None, None, :]
        hidden = stack.embed_tokens(input_ids)
        rotary = stack.rotary_emb(hidden, position_ids)
        for layer in stack.layers:
            hidden = layer(hidden, attention_mask=seen, position_embeddings=rotary, springtide_cache=cache)
        return (self.model.lm_head(stack.norm(hidden)), *cache)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    springtide_cache: list[Tensor],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that OpenVINO knows how to turn into its paged attention."""
    place = 2 * module.layer_idx
    for offset, new in enumerate((key, value)):
        springtide_cache[place + offset] = torch.cat([springtide_cache[place + offset], new], dim=2)
    group = query.shape[1] // key.shape[1]
    keys, values = (
        x[:, :, None].expand(-1, -1, group, -1, -1).reshape(x.shape[0], -1, x.shape[2], x.shape[3])
        for x in springtide_cache[place : place + 2]
    )
    output = nn.functional.scaled_dot_product_attention(query, keys, values, attention_mask, scale=scaling)
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)


def _make_stateful(graph: Any, heads: int, head_dim: int, layers: int) -> None:
    """Turn past and present into state, empty at first, without which OpenVINO does not page the attention."""
    ops: Any = import_module("openvino.opset13")
    names = {f"past.{i}": f"present.{i}" for i in range(2 * layers)}
    import_module("openvino._offline_transformations").apply_make_stateful_transformation(graph, names)
    batch = ops.gather(ops.shape_of(graph.input("input_ids"), "i64"), ops.constant([0]), ops.constant(0))
    empty = ops.concat([batch, ops.constant([heads, 0, head_dim])], axis=0)
    for op in graph.get_ops():
        if op.get_type_name() == "ReadValue":
            op.set_arguments([ops.broadcast(ops.constant(0.0, dtype=op.get_output_element_type(0)), empty)])
    graph.validate_nodes_and_infer_types()


# -- llama.cpp ------------------------------------------------------------------------------------------------------


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Write a GGUF file without a vocabulary: matrices in the model's dtype, norms in fp32."""
    gguf: Any = import_module("gguf")
    config = model.config
    kind = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[model.dtype]
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    for name, weight in model.named_parameters():
        data = weight.detach().cpu()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            data = _interleaved(data, config.head_dim)
        if data.ndim == 1:
            kept, data = "F32", data.float()
        else:
            kept = kind
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)),
            data.contiguous().view(torch.uint8).numpy(),
            raw_dtype=gguf.GGMLQuantizationType[kept],
        )
    if config.model_type == "llama":
        writer.add_tensor("rope_freqs.weight", _rotary_factors(model).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order, where a rotary pair is two neighbours."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _rotary_factors(model: PreTrainedModel) -> Tensor:
    """What each rotary frequency is divided by, ``[head_dim / 2]``, fp32: how GGUF holds Llama 3's long context."""
    rotary = model.model.rotary_emb
    plain, _ = rotary.compute_default_rope_parameters(model.config)
    factors: Tensor = plain.float().cpu() / rotary.original_inv_freq.float().cpu()
    return factors
