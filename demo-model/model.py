"""The demo model as plain PyTorch: Qwen3 with the names of its checkpoints, and the optimiser for its matrices."""

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD = 1024, 256, 704, 6, 4, 2, 64
CONTEXT, THETA, EPS = 2048, 10000.0, 1e-6


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, EPS)


def rotate(x, cos, sin):
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD, HIDDEN, bias=False)
        self.q_norm, self.k_norm = Norm(HEAD), Norm(HEAD)

    def forward(self, x, cos, sin, mask):
        rows, length, _ = x.shape
        weights = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        heads = F.linear(x, weights).view(rows, length, HEADS + 2 * KV_HEADS, HEAD).transpose(1, 2)
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), 1)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        repeat = HEADS // KV_HEADS
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, HEADS * HEAD))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(HIDDEN), Norm(HIDDEN)
        self.self_attn, self.mlp = Attention(), FeedForward()

    def forward(self, x, cos, sin, mask):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = Norm(HIDDEN)


class Model(nn.Module):
    """Logits for rows of tokens; `segments` numbers the conversations of a row, which do not see each other."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.model = Body()
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        angles = torch.outer(torch.arange(CONTEXT).float(), THETA ** (-torch.arange(0, HEAD, 2).float() / HEAD))
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids, segments):
        length = ids.shape[1]
        before = torch.ones(length, length, dtype=torch.bool).tril()
        mask = ((segments[:, :, None] == segments[:, None, :]) & before)[:, None]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, self.cos[:length], self.sin[:length], mask)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


class Muon:
    """Momentum made orthogonal by Newton-Schulz, in `kind` and a batch per shape: `torch.optim.Muon` does it in
    bfloat16 always, which takes ten seconds a step on a processor without instructions for that."""

    def __init__(self, parameters, kind, momentum=0.95, decay=0.01):
        self.kind, self.momentum, self.decay, self.groups = kind, momentum, decay, {}
        for parameter in parameters:
            self.groups.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
        self.state = [torch.zeros(len(group), *shape) for shape, group in self.groups.items()]

    @torch.no_grad()
    def step(self, rate):
        for (shape, group), momentum in zip(self.groups.items(), self.state):
            wide = [p.shape[0] > p.shape[1] for p in group]
            gradient = torch.stack([p.grad.T if turned else p.grad for p, turned in zip(group, wide)])
            momentum.lerp_(gradient, 1 - self.momentum)
            x = gradient.lerp(momentum, self.momentum)
            x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(self.kind)
            for _ in range(5):
                a = x @ x.mT
                b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
                x = torch.baddbmm(x, b, x, beta=3.4445)
            scale = rate * 0.2 * max(shape) ** 0.5
            for p, turned, update in zip(group, wide, x.float()):
                p.mul_(1 - rate * self.decay).sub_(update.T if turned else update, alpha=scale)
