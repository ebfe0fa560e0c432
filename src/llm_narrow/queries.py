"""Query heads inside the groups that share a key and a value: the same number stays in each.

With grouped queries a unit of the kind `heads` is a key/value head with all of its query heads.
Here some of the query heads of every one of them go, the same number in every layer, since configs
count query heads and key/value heads and every one of the latter serves equally many. The keys and
values stay, and with them the cache. It is done before anything else is scored, as the trimming of
the vocabulary is, so that all that follows sees a model of fewer query heads.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .errors import BadInput
from .families import find_groups, refused_kinds
from .families_slices import head_size
from .progress import Track, silent
from .refit import RefitFacts, refit_and_remove
from .units import Group, Keep, Scores, Slice, remove


def groups_of(model: Any) -> list[Group]:
    """A group of single query heads for every layer, in the order of the weights.

    Those of one key/value head lie side by side. Raises BadInput for a model that has none to
    spare, and for one whose query heads cannot be told apart or counted in its config.
    """
    kind, c = model.config.model_type, model.config
    heads = [g for g in find_groups(model) if g.kind == "heads"]
    if not heads:
        why = refused_kinds(model).get("heads", "none are declared")
        raise BadInput(f"No query heads of a {kind} can go: {why}. Leave prune.query_heads out.")
    each = per_head(c)
    if each < 2:
        raise BadInput(
            f"This {kind} has one query head for each key/value head: they go together, as heads. "
            "Leave prune.query_heads out, and name heads in prune.kinds."
        )
    return [_single(model, g, each) for g in heads if g.size]


def per_head(config: Any) -> int:
    """Query heads of one key/value head."""
    names = ("num_key_value_heads", "num_kv_heads", "num_attention_heads")
    shared = next(n for name in names if (n := getattr(config, name, None)))
    return int(config.num_attention_heads // shared)


def chosen(scores: Scores, groups: Sequence[Group], stay: int, each: int) -> Keep:
    """The best-scored `stay` of each `each` that lie side by side, in every group."""
    keep: Keep = {}
    for g in groups:
        own = scores[g.name].view(-1, each)
        best = own.argsort(dim=1, descending=True, stable=True)[:, :stay]
        keep[g.name] = torch.zeros(own.shape, dtype=torch.bool).scatter_(1, best, True).flatten()
    return keep


@torch.no_grad()
def thin(
    model: Any,
    keep: Keep,
    batches: Sequence[Tensor] = (),
    *,
    damping: float = 0.01,
    sequential: bool = True,
    dtype: torch.dtype | None = None,
    track: Track = silent,
) -> RefitFacts | None:
    """Take the other query heads out, in place, config included; refit what read them.

    `keep` has one mask for each of `groups_of`, with equally many in every run of query heads that
    share a key and a value. `batches`, (batch, length) token ids, are refitted on in `dtype`; none
    is without a refit. Raises BadInput for a mask that keeps more here and fewer there.
    """
    groups, each = groups_of(model), per_head(model.config)
    counts = {int(n) for g in groups for n in keep[g.name].view(-1, each).sum(1)}
    if len(counts) != 1 or 0 in counts:
        raise BadInput(
            "Every key/value head must keep equally many query heads, and one at least; got "
            f"{', '.join(map(str, sorted(counts)))}."
        )
    fitted = None
    if batches:
        fitted = refit_and_remove(
            model, groups, keep, batches, damping=damping, sequential=sequential, dtype=dtype,
            track=track,
        )  # fmt: skip
    else:
        remove(model, groups, keep)
    _count(model.config, counts.pop(), each)
    return fitted


def _count(config: Any, stay: int, each: int) -> None:
    """Have the config say how many query heads there are, and that they are as large as before."""
    channels = head_size(config)
    config.num_attention_heads = config.num_attention_heads // each * stay
    config.head_dim = channels


def _single(model: Any, g: Group, each: int) -> Group:
    """The query heads of a group of key/value heads, each for itself."""
    (read,) = g.reads
    own = [s for s in g.writes if s.block in (read.block, each)]  # rows, and norms for each head
    if g.config is None or not own or read.block % each:
        raise BadInput(
            f"No query heads of a {model.config.model_type} can go one by one: its layout does not "
            "keep them apart, or its config cannot count them. Leave prune.query_heads out."
        )
    attention = read.module.rpartition(".")[0]
    sizes: list[tuple[str, int | Fraction]] = [(path, 1) for path, n in g.sizes if n == each]
    if hasattr(model.get_submodule(attention), "num_key_value_groups"):
        sizes.append((f"{attention}.num_key_value_groups", Fraction(1, g.size)))
    return replace(
        g, name=f"{g.name}.queries", size=g.size * each, least=0, config=None, sizes=tuple(sizes),
        writes=tuple(_part(s, each) for s in own), reads=(_part(read, each),),
    )  # fmt: skip


def _part(s: Slice, each: int) -> Slice:
    return replace(s, block=s.block // each)
