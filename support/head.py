"""The head in chunks: log-probabilities and sampling logits without ever holding all tokens x the vocabulary."""

import torch
import torch.nn as nn
import torch.nn.functional as F

HEAD_CHUNK = 256  # tokens whose logits exist at once, in two copies: 2 x 256 x 152 k x 4 B = 0.3 GB

BANNED = -1e9  # logit of a token that cannot be sampled: its probability is exactly 0 and 0 * log p stays 0, not NaN


def sampling_logits(logits, banned, temperature):
    """The head's outputs [N, V] -> the logits of what is sampled, fp32, without gradient. May write into `logits`."""
    logits = logits.float().index_fill_(-1, banned, BANNED)
    return logits if temperature == 1 else logits.div_(temperature)


class TokenLogp(torch.autograd.Function):
    """log softmax(head(h))[y] and its entropy (no gradient), with one chunk's logits [c, V] in memory at a time.

    Backward computes a chunk's logits again: d logp / d logits = (1[y] - softmax) / temperature. The products run in
    `dtype`; the head's gradient is added up over the chunks in fp32, or every sum would be rounded to bf16 again.
    """

    @staticmethod
    def forward(ctx, hidden, master_weight, dtype, labels, banned, temperature):
        weight = master_weight.to(dtype)  # once, not once a chunk
        logp, entropy, norm = [], [], []
        for h, y in zip(hidden.split(HEAD_CHUNK), labels.split(HEAD_CHUNK)):
            x = sampling_logits(F.linear(h, weight), banned, temperature)  # [c, V]
            top = x.amax(-1, keepdim=True)
            e = (x - top).exp_()
            total = e.sum(-1)
            z = top[:, 0] + total.log()  # [c] log of the softmax's denominator
            logp.append(x.gather(-1, y[:, None])[:, 0] - z)
            entropy.append(z - e.mul_(x).sum(-1) / total)  # no vecdot: CUDA's autocast runs it in bf16
            norm.append(z)
            del x, e  # before the next chunk's logits are made
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
                d_weight.addmm_(d.T, h)  # without a second matrix of this size
            else:
                d_weight += d.T @ h
            del x, d
        return d_hidden, d_weight, None, None, None, None


def store_linear_in_bf16(embedder):
    """For a frozen model that runs under bf16 autocast: the weights and biases of its linear layers are stored as
    autocast rounds them at every use. The numbers stay the same, the memory is nearly halved. Token embeddings and
    norms, which autocast leaves in fp32, stay, and so does a head that is tied to the embeddings."""
    tied = embedder.backbone.get_input_embeddings().weight
    for module in embedder.modules():
        if isinstance(module, nn.Linear) and module.weight is not tied:
            module.to(torch.bfloat16)
