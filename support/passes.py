"""How the rows of a step are cut into forward passes. --pass_tokens bounds the tokens of a pass, and so its memory."""

import torch
import torch.distributed as dist

from support.distributed import all_sum

PASS_TOKENS = 16_384  # five pages of 2.4 M pixels
PASS_COST = 512  # in tokens: what the start of a pass costs; fewer passes have more padding


def padded_length(n, device):
    """Return n, on a GPU rounded up to a multiple of 16: the attention kernels need an aligned mask."""
    return -(-n // 16) * 16 if torch.device(device).type == "cuda" else n


def cut_into_passes(lengths, pass_tokens, device="cpu"):
    """Return the rows 0, 1, .. as lists of row indices, one list for each forward pass.

    A pass has at most pass_tokens tokens, which are its rows x its longest row. A longer row has a pass of its own. If
    one pass can hold all rows with at most 25 % pads, it does: SFT then needs no second forward pass. Otherwise the
    passes minimise their tokens, pads included, plus PASS_COST for each pass. The largest come first: no gradients use
    memory yet, and an out-of-memory error shows at once. lengths: tokens of each row.
    """
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    padded = [padded_length(lengths[n], device) for n in order]
    if order and len(order) * padded[0] <= min(pass_tokens, sum(lengths) / 0.75):
        return [order]
    best = [(0, 0)]  # best[i]: (cost of the first i rows of order, first row of their last pass)
    for i in range(1, len(order) + 1):
        choices = [(best[i - 1][0] + PASS_COST + padded[i - 1], i - 1)]
        for j in range(i - 2, -1, -1):  # the last pass has the rows j .. i - 1
            if (tokens := padded[j] * (i - j)) > pass_tokens:
                break
            choices.append((best[j][0] + PASS_COST + tokens, j))
        best.append(min(choices))
    passes = []
    i = len(order)
    while i > 0:
        j = best[i][1]
        passes.append(order[j:i])
        i = j
    return sorted(passes, key=lambda rows: -padded_tokens(rows, lengths, device))


def padded_tokens(rows, lengths, device):
    """Return the tokens of a pass, pads included. rows: row indices, the longest first; lengths: tokens of each row."""
    return len(rows) * padded_length(lengths[rows[0]], device)


def same_number_on_all_ranks(passes):
    """Split the smallest passes until each rank has as many as the rank with the most.

    With FSDP a pass gathers its parameters from all ranks, and DDP exchanges its buckets in a forward pass. If the
    ranks had different numbers, a rank would wait for passes that never come. All ranks have the same number of rows,
    so every pass gets a row.
    """
    most = torch.tensor(len(passes))
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    while len(passes) < most:
        i = max(i for i, rows in enumerate(passes) if len(rows) > 1)  # the first stays the largest
        half = len(passes[i]) // 2
        passes[i : i + 1] = [passes[i][:half], passes[i][half:]]
    return passes


def padding_share(lengths, passes, device):
    """Return the share of pads among the tokens of all ranks' passes. lengths: tokens of each row."""
    padded = sum(padded_tokens(rows, lengths, device) for rows in passes)
    tokens, padded = all_sum(torch.tensor([sum(lengths), padded], dtype=torch.float64)).tolist()
    return 1 - tokens / padded
