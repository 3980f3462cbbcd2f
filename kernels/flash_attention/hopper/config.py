"""How the Hopper kernels cut their work: measured on an H100. No torch, no Triton here.

Figures are TFLOP/s (bf16, causal unless another mask is named, heads · head_dim = 2048, 16k tokens unless a length of
rows is named); docs/lab has the runs that they are from (L2, L3, L9, L12).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial

QUERIES = 64
"""Queries in a tile: of a consumer in the forward; in the backward, where more would need more registers than there
are."""
SPLIT_KEYS = 64
"""Keys in a tile of the backward above head_dim 128."""
PRODUCER_REGISTERS = 24
"""Per thread: the least that a warp can have, and enough to issue TMA."""
CONSUMER_REGISTERS = {2: 240, 3: 160}
"""Per thread, by the number of consumers: with the producer's, what an SM has for one program."""
SPLIT_REGISTERS = [CONSUMER_REGISTERS[2], PRODUCER_REGISTERS]
BACKWARD_REGISTERS = 504
"""Per thread, of three times four warps: two consumers, and the four warps of producer, reducer and finisher."""


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for, beside its tiles."""

    heads: int
    group: int
    """Query heads that share a key/value head."""
    causal: bool
    window: bool
    starts: bool
    softcap: bool


@dataclass(frozen=True)
class ForwardTiles:
    consumers: int
    """Warp groups with 64 queries each."""
    n: int
    """Keys in a block."""
    query_stages: int
    """Tiles of each consumer's queries in shared memory, which its outputs replace. With two, the next work tile's
    first scores run under the end of this one; with one, its queries wait for the outputs to leave."""
    key_stages: int
    value_stages: int
    """Blocks of keys, and of values, in shared memory. Values are read a step after the keys of their block."""
    panel: int | None = field(default=None, kw_only=True)
    """Columns of a panel, where tiles lie in shared memory in several (split_d.py)."""

    @property
    def registers(self) -> list[int]:
        """Per thread: of the consumers but the first, which has the rest, and of the producer."""
        return [CONSUMER_REGISTERS[self.consumers]] * (self.consumers - 1) + [PRODUCER_REGISTERS]


# Head_dim up to 64: three consumers hide more of the softmax, which sets the limit there.
FORWARD_64 = ForwardTiles(consumers=3, n=128, query_stages=2, key_stages=4, value_stages=4)  # 641; two consumers: 553
# Rows up to 2,048: tiles of 192 queries leave too much of themselves unused. A soft cap: three consumers have too few
# registers for it.
FORWARD_64_TWO = ForwardTiles(2, 128, 2, 4, 4)  # 1k: 350; three: 320. On an H200, a cap of 50: 330; three: 220
# Documents, and windows up to 2,048: blocks of 64 keys waste less at the ends, and masked blocks are half as much code,
# which passes through the instruction cache.
FORWARD_64_LOCAL = ForwardTiles(3, 64, 2, 4, 4)  # window of 1k: 372; 128 keys: 317. Documents of 1k: 377; 128 keys: 284
FORWARD_128 = ForwardTiles(2, 128, 2, 2, 3)  # 711; three consumers and 64 keys: 629
FORWARD_192 = ForwardTiles(2, 64, 2, 2, 3, panel=64)  # on an H200 778; in one panel, one stage: 700
FORWARD_256 = ForwardTiles(2, 64, 1, 2, 3)  # 762: two stages of 128 keys do not fit


@dataclass(frozen=True)
class BackwardTiles:
    n: int
    """Keys in a tile."""
    stages: int
    """Tiles of queries in shared memory."""
    key_stages: int
    """Tiles of keys in shared memory: with two, where they fit, the next work tile's arrive under this one's end."""
    chunk_stages: int
    """Chunks of complete dQ sums in shared memory, 4 KiB each, on their way to dQ."""
    keys_in_registers: bool
    """K and V are read from registers, where head_dim leaves room, since shared memory is what limits the kernel."""
    persistent: bool
    """Programs take work tile after work tile from a queue, so that one's loads run under the end of the one before."""
    reducer_registers: int
    """Per thread, for producer, reducer and finisher; the consumers have the rest."""

    @property
    def registers(self) -> list[int]:
        """Per thread: of the second consumer, the producer, the reducer and the finisher. The first has the rest."""
        few = self.reducer_registers
        return [(BACKWARD_REGISTERS - few) // 2, few, few, few]


# Up to 64: 514 with K and V in registers, 499 without; persistent 541. The consumers can spare registers, which the
# finisher uses: 506 and 345 instead of 499 and 339 at 4k and 1k.
BACKWARD_64 = BackwardTiles(
    n=128, stages=2, key_stages=2, chunk_stages=4, keys_in_registers=True, persistent=True, reducer_registers=40
)
# There is no room for two tiles of keys, and persistent programs are slower: 602, not 630.
BACKWARD_128 = BackwardTiles(128, 2, 1, 3, False, False, 24)


@dataclass(frozen=True)
class SplitTiles:
    """The two kernels above head_dim 128 (backward_split.py): tiles of 64 keys, whose dK and dV fill the registers."""

    query_stages: int
    dout_stages: int
    """Tiles of Q and of dO in shared memory, for dK and dV."""
    key_stages: int
    value_stages: int
    """Tiles of K and of V in shared memory, for dQ. K is read again a step after its scores."""
    panel: int
    """Columns of a panel: a tile that has more lies in shared memory in several (split_d.py). With 64, tiles of 192
    columns take no room for 256."""


SPLIT_192 = SplitTiles(3, 2, 3, 2, 64)
SPLIT_256 = SplitTiles(2, 2, 2, 1, 256)


@dataclass(frozen=True)
class Forward(ForwardTiles, Kind):
    """The constants of `forward_kernel`."""

    columns: tuple[int, ...]
    columns_v: tuple[int, ...]
    """The parts of head_dim, of Q and K and of V: see split_d.py."""


@dataclass(frozen=True)
class Backward(BackwardTiles, Kind):
    """The constants of the backward's kernels."""

    columns: tuple[int, ...]
    """The parts of head_dim: see split_d.py."""
    width: int
    """Columns of a tile in shared memory: head_dim, padded."""
    deterministic: bool
    """Programs add to a tile of dQ in a fixed order."""
    staggered: bool
    """Each tile of keys begins with other queries, so that programs that run at once do not all add to the same tile of
    dQ. Without a mask, 4k and 16k: 523 and 543 instead of 504 and 530 at head_dim 64, 586 and 616 instead of 584 and
    606 at 128. Under a causal mask the diagonal does that."""

    @property
    def dq_columns(self) -> tuple[int, int]:
        """Columns of dQ that each consumer computes: a part of head_dim, or half of the only one."""
        return (*self.columns,) if len(self.columns) == 2 else (self.width // 2, self.width // 2)

    @property
    def row_stats(self) -> int:
        return row_stats_of(self)


@dataclass(frozen=True)
class Split(SplitTiles, Kind):
    """The constants of the split backward's kernels."""

    columns: tuple[int, ...]
    columns_v: tuple[int, ...]
    """Of each panel of Q and K, and of V; products have a power of two of columns."""
    n: int = SPLIT_KEYS
    """Keys in a tile."""
    deterministic: bool = False
    """The order of all sums is fixed anyway."""

    @property
    def row_stats(self) -> int:
        return row_stats_of(self)


def row_stats_of(kind: Kind) -> int:
    """float32 numbers that `preprocess_kernel` writes for a tile of queries: two per query, or with documents three and
    one unused."""
    return (4 if kind.starts else 2) * QUERIES


def forward_config(kind: Kind, head_dim: int, head_dim_v: int, S_k: int, window: int | None) -> Forward:
    if head_dim > 64:
        tiles = FORWARD_128 if head_dim <= 128 else FORWARD_192 if head_dim <= 192 else FORWARD_256
    elif S_k <= 2048:
        tiles = FORWARD_64_TWO
    elif kind.starts or (window is not None and window <= 2048):
        tiles = FORWARD_64_LOCAL
    else:
        tiles = FORWARD_64_TWO if kind.softcap else FORWARD_64
    return _forward(kind, tiles, head_dim, head_dim_v)


@cache
def _forward(kind: Kind, tiles: ForwardTiles, head_dim: int, head_dim_v: int) -> Forward:
    split = columns_of if tiles.panel is None else partial(panels_of, panel=tiles.panel)
    columns, columns_v = split(head_dim), split(head_dim_v)
    return Forward(**vars(kind), **vars(tiles), columns=columns, columns_v=columns_v)


@cache
def backward_config(kind: Kind, head_dim: int, deterministic: bool) -> Backward:
    """Up to head_dim 128."""
    tiles = BACKWARD_128 if head_dim > 64 else BACKWARD_64
    return Backward(
        **vars(kind), **vars(tiles), columns=columns_of(head_dim), width=padded(head_dim), deterministic=deterministic,
        staggered=not (kind.causal or deterministic),
    )  # fmt: skip


@cache
def split_config(kind: Kind, head_dim: int, head_dim_v: int) -> Split:
    """Above head_dim 128: the backward is deterministic whatever is asked for."""
    tiles = SPLIT_192 if head_dim <= 192 else SPLIT_256
    columns, columns_v = (panels_of(D, tiles.panel) for D in (head_dim, head_dim_v))
    return Split(**vars(kind), **vars(tiles), columns=columns, columns_v=columns_v)


def panels_of(head_dim: int, panel: int) -> tuple[int, ...]:
    """The columns of each panel: 192 is three times 64, 136 twice and 8, padded to 16."""
    rest = head_dim % panel
    return (panel,) * (head_dim // panel) + ((max(16, power_of_2(rest)),) if rest else ())


def padded(D: int) -> int:
    """D as tiles have it: 64, 128 or 256."""
    return max(64, power_of_2(D))


def power_of_2(n: int) -> int:
    """The next one."""
    return 1 << (n - 1).bit_length()


def columns_of(head_dim: int) -> tuple[int, ...]:
    """The parts of head_dim in powers of two: 96 is 64 and 32, 80 is 64 and 16, 128 is one part."""
    whole = padded(head_dim)
    rest = max(whole // 8, power_of_2(head_dim - whole // 2)) if head_dim > 64 else whole
    return (whole // 2, rest) if rest < whole // 2 else (whole,)


def log_interleaved(kind: Kind, n_groups: int, tiles_per_group: int, work_tiles: int) -> int:
    """How many of the last groups of heads `TileScheduler` interleaves, as a power of two: those with about so many
    work tiles. One, which changes nothing, where all tiles are equally long."""
    groups = min(work_tiles // tiles_per_group, n_groups) if kind.causal and not kind.window else 1
    return max(groups, 1).bit_length() - 1


FORWARD_WAVES = 1.5
"""Waves of work tiles (one for each SM) that are interleaved; with documents, which make tiles long and short in any
order, more. Head_dim 64, documents of 1k: 387 with 6, 377 with 1.5."""
FORWARD_WAVES_DOCUMENTS = 6
SPLIT_WAVES = 4
"""Nothing is accumulated in memory there, so there is room to interleave more."""
SPLIT_WAVES_DOCUMENTS = 16


def accumulator_plan(kind: Kind, n_heads: int, n_tiles: int, programs: int) -> tuple[int, int, int]:
    """(lag, count, log_interleaved) of `DqAccumulators` and `TileScheduler`, for so many key heads with so many tiles
    of keys each.

    A head's dQ is complete about one wave after its last work tile was issued; causal heads need 1.3 waves, since their
    first tiles are the longest, and document masks 2.5, since any of them may be. Interleaved heads are in flight
    together: each needs its own accumulator, and the lag must be at least their number, or a tile would wait for a head
    that is interleaved with its own.
    """
    interleaved = log_interleaved(kind, n_heads, n_tiles, 2 * programs if kind.starts else programs)
    # At 1k and 4k, head_dim 128: 312 and 560 with 1.6, 320 and 550 with 1.2. With 1, head_dim 64, 1k: 305, not 335.
    # Documents of 1k, rows of 16k and 64k: 374 and 326 with 1.3, 419 and 377 with 2, 420 and 377 with 2.5.
    waves = 2.5 if kind.starts else 1.3 if kind.causal else 1
    work_tiles = int(waves * programs)
    lag = min(max(1 + (work_tiles + n_tiles // 2) // n_tiles, 2**interleaved), n_heads)
    return lag, min(lag + 2**interleaved + programs // n_tiles, n_heads), interleaved
