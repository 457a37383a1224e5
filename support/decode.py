"""The decode step: run one new token of each live completion through the language model, with cached keys and values.

The step of transformers has 1,400 small operations at 28 layers under autocast. If few rows are decoded, launching them
takes most of the time. This step does the same arithmetic on the same weights with half of the operations and without
decisions on the host, so a GPU can replay it as one CUDA graph (a 2B on an H100: from 33 to 5 ms; docs/results.md). The
prefill passes and all passes with gradients use transformers.

Shapes: S slots, A of them decoded, R rows of a step (A, on a GPU rounded up), K keys that a step reads, D hidden size,
H query heads, H_kv heads of keys and values, N values of a head, P prompts, G completions of each, L tokens, V
vocabulary.
"""

from functools import cache

import torch
import torch.nn.functional as F

# Largest matrix, in elements, that may be copied to save time: on a GPU the layers of a 2B (1.7 GB in all in bf16), on
# a CPU its attention (0.6 GB in fp32).
COPIED = {"cuda": 2**24, "cpu": 2**23}


class SlotCache:
    """Keys and values of S left-aligned rows of different lengths, for each layer [2, S, H_kv, capacity, N].

    Slots start as zeros, because masked values are multiplied by 0, and 0 * NaN is NaN. In a prefill, the cache takes
    the place of transformers' own: every layer calls update, and the mask needs the two methods after it.
    """

    def __init__(self, config, slots, device, dtype):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (2, slots, config.num_key_value_heads, 0, head_dim)
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.key_step = 256 if device.type == "cuda" else 64  # on a GPU, each multiple has its own graphs

    @property
    def capacity(self):
        return self.kv[0].shape[3]

    @property
    def slots(self):
        return self.kv[0].shape[1]

    def grow(self, length, slots):
        """Make room for `slots` rows of `length` tokens. The length grows in large steps, so copies are rare. Layers
        are copied one at a time, to save memory."""
        more_tokens = max(0, self.rounded(length) - self.capacity)
        more_slots = max(0, slots - self.slots)
        for i, layer in enumerate(self.kv):
            self.kv[i] = F.pad(layer, (0, 0, 0, more_tokens, 0, 0, 0, more_slots))

    def rounded(self, length):
        return -(-length // self.key_step) * self.key_step

    def move(self, source, target):
        for layer in self.kv:
            layer[:, target] = layer[:, source]

    def update(self, k, v, layer, *_args, **_kwargs):
        """Copy the k, v [P, H_kv, L, N] of P prompts into `copies` slots each, from `first_slot` on. Return them as
        they are: the prompts are new, so their tokens attend to no earlier tokens."""
        P, _, L, _ = k.shape
        G = self.copies
        slots = slice(self.first_slot, self.first_slot + P * G)
        part = self.kv[layer][:, slots, :, :L].unflatten(1, (P, G))  # [2, P, G, H_kv, L, N]
        part[0] = k[:, None]
        part[1] = v[:, None]
        return k, v

    def get_query_offset(self, _layer=0):
        return 0

    def get_mask_sizes(self, query_length, _layer=0):
        return query_length, 0


class Decoder:
    """The decode step, and the weights of the language model in the layout that it needs.

    dtype: of the matrix products. The residual stream has the dtype of the token embeddings, as under autocast. Each
    generate() makes a new Decoder, because the weights change between calls.
    """

    def __init__(self, backbone, slots, dtype):
        model = backbone.model.language_model
        config = backbone.config.text_config
        self.embeddings = model.embed_tokens.weight  # [V, D]
        self.head = Projection([backbone.lm_head], dtype)  # D -> V
        self.device, self.dtype = self.embeddings.device, dtype
        self.cache = SlotCache(config, slots, self.device, dtype)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.layers = [LayerWeights(layer, self.heads, self.kv_heads, dtype) for layer in model.layers]
        self.norm, self.eps = model.norm.weight, config.rms_norm_eps
        # the rotation of (a, b) is (a cos - b sin, b cos + a sin): negative angles in the first half; cos is even
        self.frequencies = torch.cat([-model.rotary_emb.inv_freq, model.rotary_emb.inv_freq]).float()  # [N]
        self.rotary_scale = model.rotary_emb.attention_scaling
        self.slots = slots
        self.can_record = self.device.type == "cuda" and torch.cuda.is_available()
        self.attention = F.scaled_dot_product_attention
        if self.can_record and dtype in (torch.bfloat16, torch.float16):
            self.attention = attention_of_few_rows
        if self.can_record:
            torch.cuda.empty_cache()  # frees the graph memory of the previous Decoder
        self.forget_graphs()

    def make_room(self, length, slots=0):
        if length > self.cache.capacity or slots > self.cache.slots:
            self.cache.grow(length, slots)
            self.forget_graphs()  # the graphs write to the old memory

    def forget_graphs(self):
        self.graphs = {}  # (R, K) -> recorded graph, its inputs [3, R], its states [R, D]
        self.pool = None  # memory of all graphs; new each time, as torch frees a pool with its last graph
        if self.can_record:
            self.pool = torch.cuda.graph_pool_handle()

    def begin_prefill(self, first_slot, P, G, length):
        """Return the cache for a pass of transformers over P prompts, which go into G slots each."""
        self.make_room(length, first_slot + P * G)
        self.cache.first_slot, self.cache.copies = first_slot, G
        return self.cache

    def step(self, tokens, index, positions):
        """Read one token of each of the A rows in slots 0..A-1; return their states after the final norm, [A, D]. The
        next step overwrites the states.

        tokens, index, positions: lists of A token ids, indices in the row, and rotary positions (equal on all axes, as
        for text).
        """
        A, K = len(tokens), max(index) + 1
        self.make_room(K)
        inputs = torch.tensor([tokens, index, positions])  # [3, A]
        if not self.can_record:
            return self.run(inputs.to(self.device), K)
        # round rows and keys up, so that there are few graphs; the added rows write token 0 into free slots
        R = min(self.slots, 1 << (A - 1).bit_length())
        K = self.cache.rounded(K)
        inputs = F.pad(inputs, (0, R - A))
        with torch.cuda.device(self.device):  # it may differ from the current device
            if (R, K) not in self.graphs:
                self.graphs[R, K] = self.record(inputs.to(self.device), K)
            graph, graph_inputs, states = self.graphs[R, K]
            graph_inputs.copy_(inputs)
            graph.replay()
        return states[:A]

    def record(self, inputs, K):
        """Record `run` for R rows and K keys as one CUDA graph, 800 kernels in one launch. A graph needs a warm-up run,
        which writes the same keys and values as the replay. Return (graph, its inputs, its states)."""
        graph = torch.cuda.CUDAGraph()
        side = recording_stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run(inputs, K)
            try:
                # torch.cuda.graph() would empty the allocator's cache each time. thread_local: a global recording would
                # forbid the GPU queries of nccl's watchdog thread.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                states = self.run(inputs, K)  # [R, D]
            finally:  # a signal may interrupt the recording, and then a checkpoint must be saved
                if torch.cuda.is_current_stream_capturing():
                    graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        return graph, inputs, states

    def run(self, inputs, K):
        """Return the states [R, D]. inputs int [3, R] as in step(). K: number of keys; keys beyond a row are masked."""
        tokens, index, positions = inputs
        rows = torch.arange(len(tokens), device=self.device)
        angles = positions[:, None, None] * self.frequencies  # [R, 1, N]
        cos = angles.cos() * self.rotary_scale
        sin = angles.sin() * self.rotary_scale
        beyond = torch.arange(K, device=self.device) > index[:, None]  # [R, K]
        mask = torch.zeros(beyond.shape, device=self.device, dtype=self.dtype)
        mask = mask.masked_fill_(beyond, float("-inf"))[:, None, None]  # [R, 1, 1, K]
        x = F.embedding(tokens, self.embeddings)  # [R, D]
        for w, kv in zip(self.layers, self.cache.kv):
            # attention; the heads of queries and keys are rotated together
            h = self.rms_norm(x, w.attention_norm).to(self.dtype)
            qkv = w.qkv(h).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))  # [R, H + 2 H_kv, N]
            qk = qkv[:, : self.heads + self.kv_heads]
            normed = qk
            if w.qk_norm is not None:
                normed = F.rms_norm(qk.float(), qk.shape[-1:], None, self.eps) * w.qk_norm
            # in place, rounded to the dtype: k stays next to v, so one write puts both into the cache
            qk.copy_(torch.addcmul(normed * cos, normed.roll(qk.shape[-1] // 2, -1), sin))
            kv[:, rows, :, index] = qkv[:, self.heads :].unflatten(1, (2, -1))  # [R, 2, H_kv, N]
            keys, values = kv[:, : len(rows), :, :K]  # [R, H_kv, K, N] each
            q = qkv[:, : self.heads].unflatten(1, (self.kv_heads, -1))  # [R, H_kv, H / H_kv, N]: grouped by shared keys
            x = x + w.o(self.attention(q, keys, values, mask).flatten(1))
            # feed-forward
            h = self.rms_norm(x, w.mlp_norm).to(self.dtype)
            gate, up = w.gate_up(h).chunk(2, -1)
            x = x + w.down(F.silu(gate) * up)
        return self.rms_norm(x, self.norm)

    def rms_norm(self, x, weight):
        """[R, D] -> [R, D]"""
        return F.rms_norm(x, weight.shape, weight, self.eps)


class LayerWeights:
    """The weights of one decoder layer of transformers, as the step needs them."""

    def __init__(self, layer, heads, kv_heads, dtype):
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm = layer.input_layernorm.weight  # [D]
        self.qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj], dtype)  # D -> (H + 2 H_kv) N
        self.o = Projection([attention.o_proj], dtype)
        self.mlp_norm = layer.post_attention_layernorm.weight
        self.gate_up = Projection([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = Projection([mlp.down_proj], dtype)
        self.qk_norm = None
        if hasattr(attention, "q_norm"):  # Qwen3 normalises each head of queries and keys
            q, k = attention.q_norm.weight, attention.k_norm.weight  # [N] each
            self.qk_norm = torch.cat([q.expand(heads, -1), k.expand(kv_heads, -1)])  # [H + H_kv, N]


class Projection:
    """Linear layers with the same input and concatenated outputs: h [R, n] -> [R, m].

    They become one matrix if a copy is needed anyway (to round) or is small. Large matrices of this dtype are used
    without a copy, because a GPU that holds a 7B may not hold two.
    """

    def __init__(self, linears, dtype):
        self.weights = [linear.weight.to(dtype) for linear in linears]
        self.biases = [None if linear.bias is None else linear.bias.to(dtype) for linear in linears]
        copied_anyway = linears[0].weight.dtype != dtype
        small = max(map(torch.numel, self.weights)) <= COPIED["cuda" if self.weights[0].is_cuda else "cpu"]
        if len(linears) > 1 and (copied_anyway or small):
            self.weights = [torch.cat(self.weights)]
            self.biases = [None if self.biases[0] is None else torch.cat(self.biases)]

    def __call__(self, h):
        parts = [F.linear(h, weight, bias) for weight, bias in zip(self.weights, self.biases)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def attention_of_few_rows(q, keys, values, mask):
    """Return scaled_dot_product_attention, computed as two products, for bf16 on a GPU. q [R, H_kv, M, N], keys and
    values [R, H_kv, K, N], mask [R, 1, 1, K], 0 or -inf -> [R, H_kv, M, N]

    With a mask, torch's kernel reads all keys of a head in one block of the GPU. A complete step of the 2B then took
    5.4 ms for 1 row and 6.0 for 64, with the products 3.2 and 5.3 (H100). Scores and softmax are in fp32.
    """
    scores = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT, out_dtype=torch.float32)  # fp32
    scores = torch.add(mask, scores.unflatten(0, q.shape[:2]), alpha=q.shape[-1] ** -0.5)  # [R, H_kv, M, K]
    p = scores.softmax(-1).to(values.dtype)
    return torch.bmm(p.flatten(0, 1), values.flatten(0, 1)).unflatten(0, q.shape[:2])


@cache
def recording_stream(device):
    """Return one stream for all graphs, because cuBLAS reserves 32 MiB for each stream."""
    return torch.cuda.Stream(device)


def remove_ended(live, cache):
    """Remove the ended completions from the slots and return them. The last live completion moves into each free slot,
    so the live completions are always the first rows."""
    ended = []
    for slot in reversed(range(len(live))):
        completion = live[slot]
        if not completion.ended:
            continue
        ended.append(completion)
        last_live = live.pop()
        if last_live is not completion:
            cache.move(len(live), slot)
            live[slot] = last_live
    return ended
