"""DependencyViT: a vision transformer of reversed attention (Ding et al., CVPR 2023, arXiv 2304.03282).

Beside reversed attention a layer has a **head selector**, by which a child chooses the kind of dependency that it uses,
and a **message controller**, by which it sends less and less once its message has arrived. The Lite form drops tokens
that hardly send any more (dynamic pooling). ``docs/dependency-vit.md`` tells what the paper states from what is a
reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from springtide.errors import SpringtideError
from springtide.vision.reversed_attention import dependency_mask, forward_attention, reversed_attention

GATE_BIAS = 4.0  # at first: gates of one half would silence every token within a few layers
SCORES = ("controller", "received", "norm", "random")  # by which tokens are kept


class DependencyViTConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes and parts of a DependencyViT.

    ``attention="forward"`` with ``head_selector=False`` and ``controller=False`` is a plain ViT without class token.

    Args:
        image_size, patch_size: pixels of a side.
        attention: ``"reversed"``, or ``"forward"`` as a control.
        head_selector: children choose among heads by a softmax; without it they use every head alike.
        controller: children send less and less; without it they always send 1.
        selector_temperature: tau, of the head selector.
        keep: share of the tokens that is left at the end.
        prune_after: blocks, counted from 1, after whose attention the same number of tokens is dropped; the
            block's MLP runs without them (a reading that the published operations of the Lite models agree with).
        prune_by: what tokens are kept for: ``"controller"`` (those that still send), ``"received"`` (mass received in
            this block), ``"norm"`` (of the features) or ``"random"``, a control.
        chunk: tokens at a time, see :func:`springtide.vision.reversed_attention.reversed_attention`.

    Raises SpringtideError for values that do not fit together.
    """

    model_type = "dependency_vit"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        hidden_size: int = 192,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        attention: Literal["reversed", "forward"] = "reversed",
        head_selector: bool = True,
        controller: bool = True,
        selector_temperature: float = 0.1,
        keep: float = 1.0,
        prune_after: Sequence[int] = (2, 5, 8, 11),
        prune_by: Literal["controller", "received", "norm", "random"] = "controller",
        chunk: int | None = None,
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_ratio = mlp_ratio
        self.attention = attention
        self.head_selector = head_selector
        self.controller = controller
        self.selector_temperature = selector_temperature
        self.keep = keep
        self.prune_after = list(prune_after)
        self.prune_by = prune_by
        self.chunk = chunk
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        if image := self.image_size % self.patch_size:
            raise SpringtideError(
                f"Images of {self.image_size} pixels leave {image} over when cut into patches of {self.patch_size}; "
                "choose an image_size that is a multiple of patch_size."
            )
        if self.hidden_size % self.num_attention_heads:
            raise SpringtideError(
                f"A hidden_size of {self.hidden_size} cannot be shared by {self.num_attention_heads} heads; "
                "choose a multiple of num_attention_heads."
            )
        if self.attention not in ("reversed", "forward"):
            raise SpringtideError(f"Unknown attention '{self.attention}': choose reversed or forward.")
        if self.prune_by not in SCORES:
            raise SpringtideError(f"Unknown prune_by '{self.prune_by}': choose one of {', '.join(SCORES)}.")
        if getattr(self, "is_causal", False) or getattr(self, "is_decoder", False):
            raise SpringtideError("Reversed attention has no order of tokens: is_causal and is_decoder must be False.")
        if any(not 1 <= block <= self.num_hidden_layers for block in self.prune_after):
            raise SpringtideError(
                f"prune_after names blocks {self.prune_after}, but there are {self.num_hidden_layers}, counted from 1."
            )
        if self.selector_temperature <= 0:
            raise SpringtideError(
                f"A selector_temperature of {self.selector_temperature} cannot be divided by; choose one above 0."
            )
        check_keep(self.keep)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image of ``image_size``."""
        return int((self.image_size // self.patch_size) ** 2)


def check_keep(keep: float) -> None:
    """Raise SpringtideError unless ``keep`` is a share of tokens."""
    if not 0 < keep <= 1:
        raise SpringtideError(f"A share of {keep} of the tokens cannot be kept; give one above 0, up to 1.")


def counts(tokens: int, keep: float, stages: int) -> list[int]:
    """Tokens left after each stage of pruning: as many are dropped at each, down to the share ``keep``, 1 at least.

    196 tokens and a share of 69 / 196 give the paper's 164, 132, 100 and 69.
    """
    return [max(1, int(tokens - tokens * (1 - keep) * stage / stages + 1e-6)) for stage in range(1, stages + 1)]


@dataclass
class DependencyViTOutput(ModelOutput):  # type: ignore[misc]
    """Features of ``B`` images, of whose ``N`` tokens ``n`` were left at the end.

    Attributes:
        last_hidden_state: ``[B, n, C]``, normed.
        pooler_output: ``[B, C]``, their mean, weighted by ``messages``.
        messages: ``[B, n]``, fp32: how much the tokens that are left still send.
        indices: ``[B, n]``, int64, ascending: which of the N tokens they are.
        kept: for each layer the indices ``[B, n_l]`` of the tokens that it ran on.
        layer_messages: for each layer how much they sent, ``[B, n_l]``.
        received: for each layer how much they received, ``[B, n_l]``; over tokens it sums to ``layer_messages``' sum.
        attentions: for each layer the dependency mask ``A^M [B, n_l, n_l]`` (parent, child), if asked for.
        hidden_states: the input of each layer, ``[B, n_l, C]``, and the output of the last, if asked for.
        logits: ``[B, labels]`` of a classifier.
        loss: a scalar, of a model that was given what to learn.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    messages: Tensor | None = None
    indices: Tensor | None = None
    kept: tuple[Tensor, ...] | None = None
    layer_messages: tuple[Tensor, ...] | None = None
    received: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MessageController(nn.Module):
    """``sigmoid(W2 GELU(W1 x))``: the share of its message that a child goes on sending, ``[B, N]`` in fp32."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, hidden_size // 2)
        self.gate = nn.Linear(hidden_size // 2, 1, bias=False)
        self.bias = nn.Parameter(torch.full((1,), GATE_BIAS))

    def forward(self, x: Tensor) -> Tensor:
        return _wide(self.gate(F.gelu(self.hidden(x))) + self.bias).squeeze(-1).sigmoid()


class HeadSelector(nn.Module):
    """``softmax over heads(x W / tau)``: how a child shares its message among heads, ``[B, H, N]`` in fp32."""

    def __init__(self, hidden_size: int, heads: int, temperature: float) -> None:
        super().__init__()
        self.choice = nn.Linear(hidden_size, heads, bias=False)
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        # In fp32, since a small temperature makes large exponents.
        return (F.linear(_wide(x), _wide(self.choice.weight)) / self.temperature).softmax(-1).mT


def _wide(x: Tensor) -> Tensor:
    """``x`` in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class DependencyViTAttention(nn.Module):
    """One layer's messages: who gets how much of whose (section 3)."""

    def __init__(self, config: DependencyViTConfig) -> None:
        super().__init__()
        size, self.heads = config.hidden_size, config.num_attention_heads
        self.reverse, self.chunk = config.attention == "reversed", config.chunk
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)
        self.selector = HeadSelector(size, self.heads, config.selector_temperature) if config.head_selector else None
        self.controller = MessageController(size) if config.controller else None

    def forward(self, x: Tensor, messages: Tensor, need_mask: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of ``x [B, N, C]`` and ``messages [B, N]``, those that children sent in the layer before.

        Returns what tokens receive ``[B, N, C]``, the messages that they send now, the mass received ``[B, N]``, and
        the dependency mask ``[B, N, N]`` if ``need_mask``.
        """
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.controller is not None:
            messages = messages * self.controller(x)
        weights = messages[:, None].expand(-1, self.heads, -1)
        # Without a selector every head carries the whole message, as in a plain ViT, but counts for one H-th of it.
        share = 1.0 if self.selector is not None else 1 / self.heads
        if self.selector is not None:
            weights = weights * self.selector(x)
        if self.reverse:
            out, mass = reversed_attention(query, key, value, weights, self.chunk)
        else:
            out, mass = forward_attention(query, key, value, weights)
        mask = share * dependency_mask(query, key, weights, self.reverse) if need_mask else None
        return self.proj(out.transpose(1, 2).flatten(2)), messages, share * mass.sum(1), mask


class DependencyViTLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Attention, then a two-layer MLP, each on normed input and added to it; between them tokens may be dropped."""

    def __init__(self, config: DependencyViTConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, int(config.mlp_ratio * config.hidden_size)
        self.norm1 = nn.LayerNorm(size, config.layer_norm_eps)
        self.attention = DependencyViTAttention(config)
        self.norm2 = nn.LayerNorm(size, config.layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size))
        self.prune_by = config.prune_by

    def forward(
        self, x: Tensor, messages: Tensor, left: int, need_mask: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Of ``x [B, N, C]`` and ``messages [B, N]``, those that children sent in the layer before.

        Returns the features of the ``left`` tokens that are kept, the messages that all N send now, the mass that they
        received ``[B, N]``, the dependency mask ``[B, N, N]`` if ``need_mask``, and which tokens are kept,
        ``[B, left]``, None for all.
        """
        out, messages, mass, mask = self.attention(self.norm1(x), messages, need_mask)
        x, chosen = x + out, None
        if left < x.shape[1]:
            chosen = self._score(x, messages, mass).topk(left).indices.sort().values
            x = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
        return x + self.mlp(self.norm2(x)), messages, mass, mask, chosen

    def _score(self, x: Tensor, messages: Tensor, mass: Tensor) -> Tensor:
        """What tokens are kept for, ``[B, N]``."""
        match self.prune_by:
            case "controller":
                return messages
            case "received":
                return mass
            case "norm":
                length: Tensor = torch.linalg.vector_norm(_wide(x), dim=-1)
                return length
            case _:
                return torch.rand_like(messages)


class DependencyViTPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Initial weights, and what transformers wants to know."""

    config_class = DependencyViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ("DependencyViTLayer",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            init.trunc_normal_(module.weight, std=fan_in**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, MessageController):
            init.constant_(module.bias, GATE_BIAS)
        elif isinstance(module, DependencyViTModel):
            init.trunc_normal_(module.positions, std=std)
        elif isinstance(module, DependencyViTForMaskedImageModeling):
            init.trunc_normal_(module.mask_token, std=std)


class DependencyViTModel(DependencyViTPreTrainedModel):
    """Patches, learned positions, layers, norm."""

    def __init__(self, config: DependencyViTConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.positions = nn.Parameter(torch.zeros(1, config.num_tokens, config.hidden_size))
        self.layers = nn.ModuleList([DependencyViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_init()

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Tokens ``[B, N, C]`` of images ``[B, channels, height, width]``, row by row, without positions."""
        self._check(pixel_values)
        tokens: Tensor = self.patches(pixel_values.to(self.dtype)).flatten(2).mT
        return tokens

    def positions_of(self, pixel_values: Tensor) -> Tensor:
        """Positions ``[1, N, C]``, interpolated where images have another size than those of the training."""
        rows, columns = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) == (side, side):
            return self.positions
        grid = self.positions.mT.reshape(1, -1, side, side)
        grown: Tensor = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
        return grown.flatten(2).mT

    def _check(self, pixel_values: Tensor) -> None:
        channels, patch = self.config.num_channels, self.config.patch_size
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise SpringtideError(
                f"Images must be [batch, {channels}, height, width], but these are {list(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[-2:]
        if height % patch or width % patch or not height * width:
            raise SpringtideError(
                f"Images of {height} x {width} pixels cannot be cut into patches of {patch}; "
                f"resize them to multiples of {patch}, as DependencyViTImageProcessor does."
            )

    def forward_features(
        self,
        pixel_values: Tensor,
        keep: float | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        embedded: Tensor | None = None,
    ) -> DependencyViTOutput:
        """Features of images ``[B, channels, height, width]``.

        Args:
            keep: share of the tokens that is left at the end (default: the configuration's).
            embedded: tokens ``[B, N, C]`` in place of those that :meth:`embed` makes of the images.

        Raises SpringtideError for images that cannot be cut into patches, and for a ``keep`` that is no share.
        """
        keep = self.config.keep if keep is None else keep
        check_keep(keep)
        x = (self.embed(pixel_values) if embedded is None else embedded) + self.positions_of(pixel_values)
        tokens = x.shape[1]
        stages = self.config.prune_after
        left = dict(zip(stages, counts(tokens, keep, len(stages)), strict=True))
        indices = torch.arange(tokens, device=x.device).expand(len(x), -1)
        messages = _wide(x.new_ones(x.shape[:2]))
        kept, sent, received, masks, states = [], [], [], [], [x]
        for number, layer in enumerate(self.layers, start=1):
            x, messages, mass, mask, chosen = layer(x, messages, left.get(number, tokens), output_attentions)
            kept.append(indices)
            sent.append(messages)
            received.append(mass)
            masks.append(mask)
            states.append(x)
            if chosen is not None:
                messages, indices = messages.gather(1, chosen), indices.gather(1, chosen)
        x = self.norm(x)
        share = (messages / messages.sum(1, keepdim=True)).to(x.dtype)
        return DependencyViTOutput(
            last_hidden_state=x,
            pooler_output=(share[..., None] * x).sum(1),
            messages=messages,
            indices=indices,
            kept=tuple(kept),
            layer_messages=tuple(sent),
            received=tuple(received),
            attentions=tuple(masks) if output_attentions else None,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def forward(
        self,
        pixel_values: Tensor,
        keep: float | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """See :meth:`forward_features`; raises SpringtideError for an attention mask or a cache."""
        refuse_order(attention_mask, past_key_values, use_cache)
        found = self.forward_features(pixel_values, keep, output_attentions, output_hidden_states)
        return found if return_dict else found.to_tuple()


def refuse_order(attention_mask: Any, past_key_values: Any, use_cache: bool) -> None:
    """Raise SpringtideError for what only attention in an order of tokens can have."""
    if attention_mask is not None:
        raise SpringtideError(
            "Reversed attention is bidirectional and takes no attention mask, causal or other; leave it out."
        )
    if past_key_values is not None or use_cache:
        raise SpringtideError(
            "Reversed attention cannot use a KV cache, since each token changes what all others have received; "
            "give whole images, without past_key_values and use_cache."
        )


class DependencyViTForImageClassification(DependencyViTPreTrainedModel):
    """A linear classifier of the pooled features."""

    def __init__(self, config: DependencyViTConfig) -> None:
        super().__init__(config)
        self.vit = DependencyViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward_features(self, pixel_values: Tensor, **options: Any) -> DependencyViTOutput:
        """See :meth:`DependencyViTModel.forward_features`."""
        return self.vit.forward_features(pixel_values, **options)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool = True, **options: Any
    ) -> Any:
        """Logits ``[B, labels]``, and the cross-entropy with ``labels [B]`` if given; options as of the model's."""
        found = self.vit(pixel_values, **options)
        found["logits"] = self.classifier(found.pooler_output)
        if labels is not None:
            found["loss"] = F.cross_entropy(found.logits, labels)
        return found if return_dict else found.to_tuple()


class DependencyViTForMaskedImageModeling(DependencyViTPreTrainedModel):
    """Learns from images alone: patches that are hidden are painted from the others, by one linear layer."""

    def __init__(self, config: DependencyViTConfig) -> None:
        super().__init__(config)
        self.vit = DependencyViTModel(config)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.painter = nn.Linear(config.hidden_size, config.num_channels * config.patch_size**2)
        self.post_init()

    def forward(self, pixel_values: Tensor, masked: Tensor, return_dict: bool = True) -> Any:
        """``logits [B, N, channels * patch * patch]`` paint all patches of images; the loss is over hidden ones.

        ``masked [B, N]`` (bool) are those that are hidden. The loss is the mean absolute difference of pixels.
        """
        embedded = torch.where(masked[..., None], self.mask_token.to(self.dtype), self.vit.embed(pixel_values))
        found = self.vit.forward_features(pixel_values, keep=1.0, embedded=embedded)
        found["logits"] = self.painter(found.last_hidden_state)
        wanted = F.unfold(pixel_values, self.config.patch_size, stride=self.config.patch_size).mT
        found["loss"] = (found["logits"] - wanted)[masked].abs().mean()
        return found if return_dict else found.to_tuple()


_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny_patch16_224": {"hidden_size": 192, "num_labels": 1000},
    "small_patch16_224": {"hidden_size": 384, "num_labels": 1000},
    "pocket_patch8_64": {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "prune_after": (2, 3, 4, 5),
        "num_labels": 9,
    },
}
LITE = {"keep": 69 / 196}
MODELS = {
    **{f"dependency_vit_{size}": options for size, options in _SIZES.items()},
    **{f"dependency_vit_lite_{size}": {**options, **LITE} for size, options in _SIZES.items()},
}
"""Configurations by name; ``lite`` ones drop tokens."""


def create_model(name: str, **options: Any) -> DependencyViTForImageClassification:
    """A classifier with random weights, one of ``MODELS``; options replace those of its configuration.

    Raises SpringtideError for a name that is unknown.
    """
    if name not in MODELS:
        raise SpringtideError(f"Unknown model '{name}': choose one of {', '.join(MODELS)}.")
    return DependencyViTForImageClassification(DependencyViTConfig(**{**MODELS[name], **options}))
