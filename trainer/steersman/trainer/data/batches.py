"""How a batch is cut into micro-batches: padded ones, or packs without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch


def worthwhile_padding(device: torch.device) -> int | None:
    """Padding that a forward and backward pass of a micro-batch is worth, in tokens; None is any.

    On a CPU a pass of its own costs a small model about as much as so many tokens (3.4M parameters, from the times of
    an update at several micro-batch sizes); on an accelerator launching the kernels costs more than the padding.
    """
    return 200 if device.type == "cpu" else None


def micro_batches(
    lengths: Sequence[int],
    *,
    token_budget: int,
    rows: Sequence[int] | None = None,
    max_padding: int | None = None,
) -> list[list[int]]:
    """Groups of item numbers whose padded size, rows times the longest, stays within ``token_budget`` tokens.

    Items are taken longest first, so that those of one group are of like length and little is padding; the order
    depends on the lengths alone. An item is ``rows[i]`` sequences (one unless given) of at most ``lengths[i]`` tokens
    and is never split: one that exceeds the budget by itself makes a group of its own. Each item is in exactly one
    group. A group is closed before its padding exceeds ``max_padding`` tokens, if that is given.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}, must be at least 1 token")
    groups: list[list[int]] = []
    longest = num_rows = padding = 0
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        more = 1 if rows is None else rows[item]
        padding += more * (longest - lengths[item])
        too_much = max_padding is not None and padding > max_padding
        if not groups or too_much or (num_rows + more) * longest > token_budget:
            groups.append([])
            longest, num_rows, padding = lengths[item], 0, 0
        groups[-1].append(item)
        num_rows += more
    return groups


def packs(lengths: Sequence[int], *, token_budget: int) -> list[list[int]]:
    """Groups of item numbers of together at most ``token_budget`` tokens, none of which is padding.

    Longest first, as in :func:`micro_batches`, so that items of one group are of like length. An item of more tokens
    than the budget makes a group of its own.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}, must be at least 1 token")
    groups: list[list[int]] = []
    num_tokens = 0
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        num_tokens += lengths[item]
        if not groups or num_tokens > token_budget:
            groups.append([])
            num_tokens = lengths[item]
        groups[-1].append(item)
    return groups


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One micro-batch of a rank.

    Attributes:
        items: what it holds.
        counts: False where the rank had nothing left: what is computed then only keeps the others company.
        num_tokens: what each rank computes in this pass, padding included.
    """

    items: list[int]
    counts: bool
    num_tokens: tuple[int, ...]


def passes(
    lengths: Sequence[int],
    *,
    token_budget: int,
    rows: Sequence[int] | None = None,
    max_padding: int | None = None,
    packed: bool = False,
    rank: int = 0,
    num_ranks: int = 1,
) -> list[Pass]:
    """The :func:`micro_batches` of one rank, of at least one item that is shared out over the ranks; with ``packed``
    its :func:`packs`, of items of ``lengths`` tokens whatever their rows.

    Every rank makes as many, since each pass through a sharded model needs them all. On one rank they are simply the
    micro-batches.
    """
    counts = [1] * len(lengths) if rows is None or packed else rows
    groups_of_ranks = []
    for share in share_out([length * count for length, count in zip(lengths, counts, strict=True)], num_ranks):
        of_share = [lengths[item] for item in share]
        if packed:
            groups = packs(of_share, token_budget=token_budget)
        else:
            groups = micro_batches(
                of_share,
                token_budget=token_budget,
                rows=[counts[item] for item in share],
                max_padding=max_padding,
            )
        groups_of_ranks.append([[share[number] for number in group] for group in groups])
    idle = [min(range(len(lengths)), key=lambda item: lengths[item] * counts[item])]

    def computed(group: list[int]) -> int:
        if packed:
            return sum(lengths[item] for item in group)
        return sum(counts[item] for item in group) * max(lengths[item] for item in group)

    made = []
    for groups_of_pass in zip_longest(*groups_of_ranks, fillvalue=idle):
        mine = groups_of_pass[rank]
        num_tokens = tuple(computed(group) for group in groups_of_pass)
        made.append(Pass(items=mine, counts=mine is not idle, num_tokens=num_tokens))
    return made


def share_out(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """Item numbers in ``num_shares`` shares of like cost, each in ascending order; an item is in exactly one.

    The dearest item first, each to the share that has cost least so far; a share may stay empty.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0] * num_shares
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = totals.index(min(totals))
        shares[least].append(item)
        totals[least] += costs[item]
    return [sorted(share) for share in shares]
