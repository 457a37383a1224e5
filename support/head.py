"""The head in chunks: log-probabilities and sampling logits without all tokens x vocabulary in memory."""

import torch
import torch.nn as nn
import torch.nn.functional as F

HEAD_CHUNK = 256  # tokens per chunk; two copies of their logits exist: 2 x 256 x 152 k x 4 B = 0.3 GB

BANNED = -1e9  # logit of a banned token. Finite: its probability is exactly 0, and 0 * log p is 0, not NaN


def sampling_logits(logits, banned, temperature):
    """Return the logits for sampling, [N, V] in fp32, without gradient. May write into `logits`, the head's outputs."""
    logits = logits.float().index_fill_(-1, banned, BANNED)
    return logits if temperature == 1 else logits.div_(temperature)


class TokenLogp(torch.autograd.Function):
    """Return log softmax(head(h))[y] and its entropy (no gradient), with the logits [c, V] of one chunk in memory.

    Backward computes the logits of each chunk again: d logp / d logits = (1[y] - softmax) / temperature. The products
    run in `dtype`. The gradient of the head is summed over the chunks in fp32, because bf16 would round every sum.
    """

    @staticmethod
    def forward(ctx, hidden, master_weight, dtype, labels, banned, temperature):
        weight = master_weight.to(dtype)  # cast once, not once per chunk
        logp, entropy, norm = [], [], []
        for h, y in zip(hidden.split(HEAD_CHUNK), labels.split(HEAD_CHUNK)):
            x = sampling_logits(F.linear(h, weight), banned, temperature)  # [c, V]
            top = x.amax(-1, keepdim=True)
            e = (x - top).exp_()
            total = e.sum(-1)
            z = top[:, 0] + total.log()  # [c] log of the softmax's denominator
            logp.append(x.gather(-1, y[:, None])[:, 0] - z)
            entropy.append(z - e.mul_(x).sum(-1) / total)  # not vecdot: CUDA autocast runs it in bf16
            norm.append(z)
            del x, e  # free them before the next chunk
        logp, entropy, norm = map(torch.cat, (logp, entropy, norm))
        ctx.save_for_backward(hidden, weight, labels, banned, norm)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, labels, banned, norm = ctx.saved_tensors
        grad = grad / ctx.temperature
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for h, y, z, g, d_h in zip(*(x.split(HEAD_CHUNK) for x in (hidden, labels, norm, grad, d_hidden))):
            x = sampling_logits(F.linear(h, weight), banned, ctx.temperature)
            d = x.sub_(z[:, None]).exp_().mul_(-g[:, None])  # [c, V]
            d = d.scatter_add_(-1, y[:, None], g[:, None]).to(weight.dtype)
            torch.mm(d, weight, out=d_h)
            if d.dtype == d_weight.dtype:
                d_weight.addmm_(d.T, h)  # saves a second matrix of this size
            else:
                d_weight += d.T @ h
            del x, d
        return d_hidden, d_weight, None, None, None, None


def store_linear_in_bf16(embedder):
    """Store the linear layers of a frozen model in bf16, as autocast rounds them at every use. The results stay the
    same, and memory is nearly halved. Token embeddings and norms stay in fp32, because autocast uses them in fp32. A
    head that is tied to the embeddings stays too."""
    tied = embedder.backbone.get_input_embeddings().weight
    for module in embedder.modules():
        if isinstance(module, nn.Linear) and module.weight is not tied:
            module.to(torch.bfloat16)
