"""What the code does for the compiler's sake, in one place; the ids are those of docs/lab.

Functions here:

- `opaque_zero`, in the address of a tile that stays in place: ptxas would compute the descriptors of all its products
  once, some forty numbers, and spill them (L3).
- `new_value`: Gluon makes one loop variable of two names for one value (L8).
- `wait_for_products`: Gluon's wait returns the product, and a product that comes out of a branch is copied there (L8).

Code elsewhere that must stay where it is, or as it is:

- Forward, `keys.wait` and `values.wait` between the row maximum and the wait for P·V: their branch ends straight-line
  code, to whose front ptxas moves a wait for products (L7).
- Forward, the producer's second pass is in its one loop: behind a loop around it, ptxas takes the branches of the last
  consumer, whose code has nothing to do with it, for divergent: 100 instructions more a step (L11).
- Forward, "tile read" is signalled at named barriers: `mbarrier.arrive` synchronises the warp group first, 40 to 60
  cycles (L7).
- `tile_of` divides once: a division takes 100 cycles while all warps of a program wait for its next work tile (L9).
- Backward, the fence between stores to shared memory and their reading by TMA or a product stands at the reader: at the
  writer it waits for the writer's own stores. Head_dim 128, causal, 4k: 576 TFLOP/s instead of 561 (L3).
- Backward, masks compare positions (`sees`): the ends of intervals cost 208 bytes of stack (L3).
- Backward, the semaphore is polled by a volatile load: an atomic's result is awaited where it is asked for (L4).
- `previous = tile - 1` in `add`, not `tile`: of two names for one value Gluon would make one loop variable.
- PTX in softmax.py, softcap.py and split_d.py: Gluon's branches are a warp group's, these are a warp's (L10, L11,
  L14), and a mask takes 161 instructions instead of 453 (L7).
- Products in parts of head_dim (split_d.py): a product has a power of two of columns (L2, L3).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def opaque_zero(x, BITS: gl.constexpr):
    """0, for 0 ≤ x < 2 ** BITS, which the compiler does not know. K and V in place, D 128, causal, 16k: 615 → 640
    TFLOP/s (L3)."""
    return x >> BITS


@gluon.jit
def new_value(x):
    """x, as a value of its own."""
    return x + 0


@gluon.jit
def wait_for_products():
    """Wait for all products of the warp group, without naming them."""
    WAIT: gl.constexpr = "wgmma.wait_group.sync.aligned 0; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(WAIT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
