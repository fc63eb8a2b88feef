"""A Llama-like causal language model small enough to commit, big enough to learn.

Everything a real decoder has that matters to weight patching is here: RMSNorm,
rotary positions, a causal mask, a SiLU-gated MLP, no biases, and an output head
that *is* the embedding matrix.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

VOCAB = 256  # bytes
CONTEXT = 128
HIDDEN = 128
INTERMEDIATE = 288  # not a multiple of HIDDEN, so a transposed MLP weight shows in its shape
LAYERS = 2
HEADS = 4
HEAD_DIM = HIDDEN // HEADS
ROPE_THETA = 10_000.0

# The exported graph holds these as float32. Rounding them here too means that the float64
# reference computes the same function as the graph, only without the rounding on the way.
RMS_EPS = float(np.float32(1e-5))
ATTENTION_SCALE = float(np.float32(1.0 / math.sqrt(HEAD_DIM)))


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + RMS_EPS) * self.weight


def rope_tables():
    """cos and sin [CONTEXT, HEAD_DIM], computed in float64 and rounded once to float32."""
    inverse = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    angles = torch.outer(torch.arange(CONTEXT, dtype=torch.float64), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate_half(x):
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.v_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x, cos, sin, future):
        batch, seq, _ = x.shape

        def heads(projected):
            return projected.view(batch, seq, HEADS, HEAD_DIM).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        scores = (q @ k.transpose(2, 3)) * ATTENTION_SCALE
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, seq, HIDDEN))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = RMSNorm()
        self.self_attn = Attention()
        self.post_attention_layernorm = RMSNorm()
        self.mlp = MLP()

    def forward(self, x, cos, sin, future):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, future)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = RMSNorm()
        cos, sin = rope_tables()
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, tokens):
        seq = tokens.shape[1]
        position = torch.arange(seq, device=tokens.device)
        future = position[None, :] > position[:, None]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.rope_cos[:seq], self.rope_sin[:seq], future)
        return self.norm(x)


class TinyLM(nn.Module):
    """tokens int64 [batch, seq] -> logits [batch, seq, VOCAB]."""

    def __init__(self):
        super().__init__()
        self.model = Decoder()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight  # tied: one tensor, two uses

    def forward(self, tokens):
        return self.lm_head(self.model(tokens))


def initialise(model):
    """GPT-2's scheme: small normal weights, residual outputs scaled down with depth."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=0.05 / (math.sqrt(2 * LAYERS) if residual else 1.0))


def checkpoint_of(model):
    """name -> float32 numpy array; the tied head appears once, under the embedding's name."""
    return {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}


def load(checkpoint, dtype=torch.float32):
    """A model holding `checkpoint`; in float64 the constants stay float32-valued."""
    model = TinyLM()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.from_numpy(checkpoint[name]))
    return model.to(dtype).eval()
