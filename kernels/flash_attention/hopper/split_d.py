"""Tiles with head_dim columns, split into parts with a power of two of them, as a product has: 96 is 64 + 32.

In shared memory such a tile is one, padded to a power of two of columns, or several panels of `panel` columns (config),
of which panel i of stage s is number s · panels + i, and each is a part: [stages · panels, 1, 1, rows, panel]. Columns
beyond the parts are never read. Split, and in registers, a tile is a tuple of parts. COLUMNS has the columns of each:
`columns` of a kernel's CONFIG for Q and K, `columns_v` for V and out.
"""

# mypy: disable-error-code="assignment"
# Triton's tuples grow where Python's types do not.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .pipeline import matrix


@gluon.constexpr_function
def mma_layout(columns):
    """How the four warps of a warp group hold a product [64, columns]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def n_panels(width, columns):
    """Panels of a tile: one for each part if a panel is narrower than all parts together, else one."""
    return len(columns) if width < sum(columns) else 1


@gluon.jit
def of(tiles, stage, COLUMNS: gl.constexpr):
    """One of several tiles in shared memory, split."""
    PANELS: gl.constexpr = n_panels(tiles.shape[4], COLUMNS)
    return from_panel(tiles, stage * PANELS, COLUMNS)


@gluon.jit
def from_panel(tiles, first, COLUMNS: gl.constexpr):
    """The tile whose first panel, or only one, is this, split."""
    PANELS: gl.constexpr = n_panels(tiles.shape[4], COLUMNS)
    if PANELS > 1:
        parts = ()
        for i in gl.static_range(PANELS):
            parts += (part(matrix(tiles, first + i), 0, COLUMNS[i]),)
    else:
        parts = split(matrix(tiles, first), COLUMNS)
    return parts


@gluon.jit
def split(tile, COLUMNS: gl.constexpr):
    """The parts of a tile in shared memory. A tile that has one part may be in registers."""
    parts = ()
    for i in gl.static_range(len(COLUMNS)):
        parts += (part(tile, COLUMNS[0] * i, COLUMNS[i]),)
    return parts


@gluon.jit
def part(tile, FIRST: gl.constexpr, COLUMNS: gl.constexpr):
    if tile.shape[1] > COLUMNS:
        tile = tile.slice(FIRST, COLUMNS, 1)
    return tile


@gluon.jit
def zeros(like):
    """[64, columns], float32, with the columns of a tile that is split."""
    tile = ()
    for i in gl.static_range(len(like)):
        tile += (zero_part(like[i].shape[1]),)
    return tile


@gluon.jit
def zero_part(COLUMNS: gl.constexpr):
    return gl.zeros([64, COLUMNS], gl.float32, mma_layout(COLUMNS))


@gluon.jit
def multiply_transposed(a, b):
    """Start a · bᵀ of two tiles that are split, [64, N]; as many products as there are parts."""
    N: gl.constexpr = b[0].shape[0]
    c = gl.zeros([64, N], gl.float32, mma_layout(N))
    c = warpgroup_mma(a[0], b[0].permute((1, 0)), c, use_acc=False, is_async=True)
    for i in gl.static_range(1, len(b)):
        c = warpgroup_mma(a[i], b[i].permute((1, 0)), c, is_async=True)
    return c


@gluon.jit
def multiply(a, b, acc):
    """Start acc + a · b, where a is [64, N], in registers or not, and the tile b is split; as many products as there
    are parts."""
    products = ()
    for i in gl.static_range(len(b)):
        products += (multiply_part(a, b[i], acc[i]),)
    return products


@gluon.jit
def multiply_part(a, b, c):
    if isinstance(a, gl.tensor):
        left: gl.constexpr = gl.DotOperandLayout(0, c.type.layout, 2)
        a = gl.convert_layout(a, left)
    return warpgroup_mma(a, b, c, is_async=True)


@gluon.jit
def wait(PENDING: gl.constexpr, tile):
    """What `multiply` started, complete. Of the products that were started later, at most the last PENDING are not."""
    tile = warpgroup_mma_wait(PENDING, deps=tile)
    return tile if isinstance(tile, gl.tuple) else (tile,)


@gluon.jit
def in_thread_order(x):
    """[64, columns] as a list, in the order in which the threads hold it. Each has 2 neighbouring columns of rows r and
    r + 8: it writes 4 numbers at once, and a warp's are 512 bytes in a row."""
    return x.reshape([4, 2, 8, x.shape[1] // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([64 * x.shape[1]])


@gluon.jit
def from_thread_order(x, COLUMNS: gl.constexpr):
    """What `in_thread_order` gave, as it was."""
    return x.reshape([COLUMNS // 8, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5]).reshape([64, COLUMNS])


@gluon.jit
def scale(tile, factor):
    """The tile times a number, or each row times its own of [64]."""
    products = ()
    for i in gl.static_range(len(tile)):
        products += (tile[i] * (along_rows(factor, tile[i]) if factor.type.is_block() else factor),)
    return products


@gluon.jit
def rescale(tile, factor):
    """`scale` for factors of rows that nearly always are all 1: a warp for which they are multiplies nothing (L10)."""
    products = ()
    for i in gl.static_range(len(tile)):
        products += (rescale_part(tile[i], factor),)
    return products


@gluon.jit
def rescale_part(x, factor):
    N: gl.constexpr = x.shape[1] // 2  # numbers of a thread
    ASM: gl.constexpr = rescaling(N)
    REGISTERS: gl.constexpr = registers(N)
    factor, _ = gl.broadcast(along_rows(factor, x), x)
    return gl.inline_asm_elementwise(ASM, REGISTERS, [x, factor], dtype=gl.float32, is_pure=True, pack=N)


@gluon.constexpr_function
def rescaling(n):
    """PTX, since Gluon branches for a whole warp group and synchronises it first. A thread's n numbers are of two rows,
    whose factors come with the first four."""
    copies = " ".join(f"mov.b32 ${i}, ${n + i};" for i in range(n))
    compares = " ".join(f"setp.neu.or.f32 needed, ${2 * n + i}, 0f3F800000, needed;" for i in range(1, 4))
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    return f"""{{
        .reg .pred needed;
        {copies}
        setp.neu.f32 needed, ${2 * n}, 0f3F800000; {compares}
        vote.sync.any.pred needed, needed, 0xffffffff;
        @!needed bra.uni done;
        {products}
        done:
    }}"""


@gluon.constexpr_function
def registers(n):
    return ",".join(["=&f"] * n + ["f"] * (2 * n))


@gluon.jit
def along_rows(x, like):
    """x [64] as a factor for the rows of `like`; each thread has the rows it needs."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True), 1)


@gluon.jit
def store(tile, shared):
    """Write a tile, rounded, over one in shared memory that is split."""
    for i in gl.static_range(len(shared)):
        shared[i].store(tile[i].to(shared[i].dtype))
