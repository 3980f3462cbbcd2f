"""What is kept on the host comes back as it was, in time, and its memory is used again."""

from __future__ import annotations

import ctypes
import gc
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from model import activations, offload
from model.activations_config import FullConfig, OffloadConfig
from model.attention import ATTENTIONS, AttentionSpec, build_attention
from model.config import ModelConfig
from model.gpt import GPT
from model.kept import Store
from model.memory import Workload, kept_bytes, moments
from model.offload import HostBuffers, HostStore, HostTicket

ON = pytest.mark.parametrize("device", ["cpu", "late", pytest.param("cuda", marks=pytest.mark.gpu)])
"""late: on a CPU, with copies as late as a GPU's may be."""
SHAPES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((2, 3, 4), torch.float32),
    ((2, 3, 8), torch.bfloat16),
    ((5,), torch.int32),
]


class Late(HostBuffers):
    """Copies in their order, but only when somebody waits. Like a GPU's they hold no memory that they read or write: it
    is missed where it was freed before."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.copies: list[list[tuple[weakref.ref[Tensor], weakref.ref[Tensor]]]] = []
        self.done = 0

    def copy(self, to: Sequence[Tensor], source: Sequence[Tensor], after: object) -> Callable[[], None]:
        self.copies.append([(weakref.ref(x), weakref.ref(y)) for x, y in zip(to, source, strict=True)])
        return partial(self.run, len(self.copies))

    def run(self, number: int) -> None:
        for copy in self.copies[self.done : number]:
            for there, here in copy:
                to, source = there(), here()
                assert to is not None, "written after it was freed"
                assert source is not None, "read after it was freed"
                to.copy_(source)
        self.done = max(self.done, number)


def store_on(device: str) -> HostStore:
    store = HostStore()
    if device == "late":
        store.buffers = Late()
    return store


def tensors(number: int, device: str = "cpu") -> list[Tensor]:
    """What layer `number` keeps: one of each of SHAPES, filled with numbers of its own."""
    made, device = [], device.replace("late", "cpu")
    for place, (shape, dtype) in enumerate(SHAPES):
        first = 10 * number + place
        made.append(torch.arange(first, first + torch.Size(shape).numel(), device=device).reshape(shape).to(dtype))
    return made


def forward(store: HostStore, layers: int, device: str = "cpu", first: int = 0) -> list[HostTicket]:
    return [store.keep(tensors(number, device)) for number in range(first, first + layers)]


def assert_taken(tickets: Sequence[HostTicket], first: int = 0) -> None:
    """Backward: each ticket gives what its layer kept."""
    for number, ticket in reversed(list(enumerate(tickets, first))):
        taken, expected = ticket.take(), tensors(number)
        assert [tensor.dtype for tensor in taken] == [tensor.dtype for tensor in expected]
        assert all(torch.equal(here.cpu(), there) for here, there in zip(taken, expected, strict=True))


def on_device(tickets: Sequence[HostTicket]) -> list[bool]:
    return [ticket._device is not None for ticket in tickets]


def free(store: HostStore) -> int:
    """Bytes of host memory that wait for the next step."""
    assert store.buffers is not None
    return sum(size * len(unused) for size, unused in store.buffers._unused.items())


@ON
@pytest.mark.parametrize("layers", [1, 2, 3, 8])
def test_every_layer_gets_back_what_it_kept(device: str, layers: int) -> None:
    store = store_on(device)
    for _ in range(3):
        assert_taken(forward(store, layers, device))


@ON
def test_the_layout_of_a_tensor_comes_back_and_the_gaps_of_a_view_do_not(device: str) -> None:
    store, place = store_on(device), device.replace("late", "cpu")
    transposed = torch.arange(24.0, device=place).reshape(2, 3, 4).transpose(1, 2)
    columns = torch.arange(24.0, device=place).reshape(4, 6)[:, 1:3]
    tickets = [store.keep([transposed, columns]), *forward(store, 3, device)]
    assert_taken(tickets[1:])
    back, cut = tickets[0].take()
    assert back.device == transposed.device
    assert torch.equal(back, transposed)
    assert torch.equal(cut, columns)
    assert back.stride() == transposed.stride()
    assert cut.is_contiguous()
    assert store.buffers is not None
    assert 2 * 24 * 4 > back.numel() * 4 + cut.numel() * 4 == 24 * 4 + 8 * 4


def test_the_last_two_layers_stay_on_the_device_and_the_others_leave_it() -> None:
    store = HostStore()
    tickets = []
    for number in range(5):
        tickets.append(store.keep(tensors(number)))
        assert on_device(tickets) == [age < 2 for age in reversed(range(number + 1))]
    assert tickets[-1]._host is None, "needed at once, it is not copied"


def test_what_has_left_holds_no_memory_of_the_device() -> None:
    alive = []
    store, tickets = HostStore(), []
    for number in range(5):
        kept = tensors(number)
        alive.append(weakref.ref(kept[0].untyped_storage()))
        tickets.append(store.keep(kept))
        del kept
    assert [storage() is not None for storage in alive] == [False, False, False, True, True]


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_taking_a_layer_loads_the_ones_before_it_and_no_more(ahead: int) -> None:
    store = HostStore(ahead)
    tickets = forward(store, 7)
    for number in reversed(range(7)):
        loaded = on_device(tickets[: number + 1])
        assert loaded.count(True) <= max(ahead + 1, 2)
        tickets[number].take()
        expected = [earlier >= number - ahead for earlier in range(number)]
        still_there = number == 6 and ahead == 0  # the last but one had not left yet
        assert on_device(tickets[:number]) == ([False] * 5 + [True] if still_there else expected)


def test_a_layer_is_loaded_before_the_one_that_is_taken_next(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    load = HostTicket.load
    monkeypatch.setattr(
        HostTicket, "load", lambda self: (loads.append(self.number) if self._device is None else None, load(self))[1]
    )
    store = HostStore()
    tickets = forward(store, 5)
    for number in reversed(range(5)):
        tickets[number].take()
        loads.append(-number)
    assert loads == [-4, 2, -3, 1, -2, 0, -1, 0], "a number: loaded; its negative: taken"


@ON
def test_host_memory_is_used_again_in_the_next_step(device: str) -> None:
    store = store_on(device)
    sizes = []
    for _ in range(3):
        assert_taken(forward(store, 6, device))
        assert store.buffers is not None
        sizes.append(store.buffers.bytes)
    assert sizes == [5 * sum(tensor.numel() * tensor.element_size() for tensor in tensors(0))] * 3
    assert free(store) == sizes[0]


@ON
@pytest.mark.parametrize("kept", range(1, 6))
def test_tickets_that_are_dropped_free_what_they_held(device: str, kept: int) -> None:
    store = store_on(device)
    tickets = forward(store, 5, device)
    assert_taken(tickets[kept:], first=kept)  # the backward pass ends in the middle
    del tickets
    gc.collect()
    assert store.latest() == []
    assert store.buffers is not None
    assert free(store) == store.buffers.bytes
    assert_taken(forward(store, 5, device))


@ON
def test_several_forward_passes_may_come_before_a_backward_pass(device: str) -> None:
    store = store_on(device)
    first, second = forward(store, 4, device), forward(store, 4, device, first=4)
    assert_taken(second, first=4)
    third = forward(store, 4, device, first=8)
    there = on_device(third)
    assert_taken(first[3:], first=3)
    assert on_device(first[:3]) == [False, False, True], "the one before is loaded"
    assert on_device(third) == there, "and none of a later pass"
    assert_taken(first[:3])
    assert_taken(third, first=8)
    assert store.latest() == []


@ON
def test_a_forward_pass_after_a_backward_pass_that_stopped(device: str) -> None:
    store = store_on(device)
    stopped = forward(store, 4, device)
    stopped[3].take()
    following = forward(store, 4, device, first=4)
    assert on_device(stopped[:3]) == [False] * 3, "loaded ahead, it went back"
    assert_taken(following, first=4)
    assert_taken(stopped[:3])


def test_a_ticket_is_taken_once() -> None:
    (ticket,) = forward(HostStore(), 1)
    ticket.take()
    with pytest.raises(RuntimeError, match="a second backward pass"):
        ticket.take()


def test_no_gradient_goes_through_what_is_kept() -> None:
    store = HostStore()
    kept = torch.ones(3, requires_grad=True) * 2
    (taken,) = store.keep([kept]).take()
    assert not taken.requires_grad


def test_memory_that_cannot_be_pinned_is_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nbytes: int) -> Tensor:
        raise RuntimeError("out of memory (2)\nand more")

    monkeypatch.setattr(offload, "pinned", refuse)
    buffers = HostBuffers(torch.device("cpu"))
    buffers.bytes = 2**31
    buffers._stream = object()  # type: ignore[assignment]  # as on a GPU
    line = r"memory\.host: 2\.0 GiB .* pinned, and 1\.0 GiB more .*out of memory \(2\)\); use a smaller memory\.host"
    with pytest.raises(MemoryError, match=line) as raised:
        buffers.like(torch.empty(2**28, device="meta"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("host", [0.0, -1.0, 1.5, float("nan")])
def test_a_fraction_that_is_none_is_refused_with_what_to_use(host: float) -> None:
    with pytest.raises(ValueError, match=r"memory\.host=.* use memory=full"):
        OffloadConfig(host=host)


def test_the_last_layer_is_on_no_host() -> None:
    assert [OffloadConfig(host=host).on_host(16) for host in (0.01, 0.5, 0.9, 1.0)] == [1, 8, 15, 15]
    assert OffloadConfig(layers=0.5).on_host(16) == 7
    assert OffloadConfig().on_host(1) == 0


# In a model


LLAMA = ModelConfig(name="llama", n_layers=5, n_heads=4, n_kv_heads=2, dim=64, ffn_dim=96, vocab_size=101)
S, B = 48, 2


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets."""
    tokens, targets = torch.randint(LLAMA.vocab_size, (2, B, S))
    return tokens, targets


def pair(build: Callable[..., GPT], policy: OffloadConfig) -> tuple[GPT, GPT]:
    """A model that keeps on the device, and one of the same weights that keeps on the host."""
    on_device = {name: value for name, value in asdict(policy).items() if name not in ("name", "host")}
    models = [build(LLAMA, "sdpa", seq_len=S).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, each in zip(models, (FullConfig(**on_device), policy), strict=True):
        activations.apply(model, each)
    return models[0], models[1]


def store_of(model: GPT) -> HostStore:
    store = model.blocks[0].store
    assert isinstance(store, HostStore)
    return store


@pytest.mark.parametrize(
    "policy",
    [
        OffloadConfig(tile=20),
        OffloadConfig(tile=20, host=0.5, keep_attention=0.5, head_groups=2),
        OffloadConfig(layers=0.6, tile=0),
    ],
    ids=["all", "half", "some layers"],
)
def test_a_model_computes_the_same_bits(build_lively: Callable[..., GPT], policy: OffloadConfig) -> None:
    """Of two forward passes, then a backward pass through both, the last one first; and of the next step."""
    full, offloaded = pair(build_lively, policy)
    for _ in range(2):
        first, second = batch(), batch()
        losses = [(model(*first), model(*second)) for model in (full, offloaded)]
        for ours, theirs in zip(*losses, strict=True):
            assert torch.equal(ours, theirs)
        for earlier, later in losses:
            later.backward()
            earlier.backward()
        for expected, found in zip(full.parameters(), offloaded.parameters(), strict=True):
            assert expected.grad is not None
            assert found.grad is not None
            assert torch.equal(found.grad, expected.grad)
    assert store_of(offloaded).latest() == []


@pytest.mark.parametrize(("host", "copied"), [(0.4, 2), (0.6, 3), (1.0, 4)])
def test_so_many_layers_keep_on_the_host(build_lively: Callable[..., GPT], host: float, copied: int) -> None:
    _, model = pair(build_lively, OffloadConfig(host=host))
    model(*batch()).backward()
    H, D, E = 4, 16, 64
    buffers = store_of(model).buffers
    assert buffers is not None
    assert buffers.bytes == copied * B * S * (4 * E + 4 * H * D + 4 * H), "input, attention's output and LSE"


def test_an_evaluation_keeps_nothing(build_lively: Callable[..., GPT]) -> None:
    _, model = pair(build_lively, OffloadConfig())
    with torch.no_grad():
        model(*batch())
    assert store_of(model).buffers is None


def test_an_error_in_a_backward_pass_leaves_nothing_behind(build_lively: Callable[..., GPT]) -> None:
    full, model = pair(build_lively, OffloadConfig())

    def fail(block: nn.Module, gradients: object) -> None:
        raise ArithmeticError("in the middle")

    hook = model.blocks[2].register_full_backward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="in the middle"):
        model(*batch()).backward()
    gc.collect()
    store = store_of(model)
    assert store.latest() == []
    assert store.buffers is not None
    assert free(store) == store.buffers.bytes
    hook.remove()
    model.zero_grad()
    tokens = batch()
    for each in (full, model):
        each(*tokens).backward()
    grads = [[parameter.grad for parameter in each.parameters()] for each in (full, model)]
    assert all(torch.equal(*two) for two in zip(*grads, strict=True))


@pytest.mark.parametrize("host", [0.2, 0.5, 1.0])
def test_so_many_layers_are_on_the_device_as_are_predicted(host: float) -> None:
    policy, L = OffloadConfig(host=host), LLAMA.n_layers
    predicted = [plan for plan in moments(Workload(LLAMA, policy, B, S)) if "backward pass of" in plan.moment]
    of_one_layer = kept_bytes(Workload(LLAMA, policy, B, S), 0)
    store, elsewhere = HostStore(), Store()
    tickets = [(store if layer <= policy.on_host(L) else elsewhere).keep(tensors(layer)) for layer in range(L)]
    for layer, plan in zip(reversed(range(L)), predicted, strict=True):
        tickets.pop().take()
        others = sum(not isinstance(ticket, HostTicket) or ticket._device is not None for ticket in tickets)
        assert plan.kept == (1 + others) * of_one_layer, layer


# On a GPU


@pytest.mark.gpu
def test_memory_is_pinned_while_there_is_a_store() -> None:
    store = HostStore()
    tickets = forward(store, 3, "cuda")
    host = tickets[0]._host
    assert host is not None
    assert all(is_registered(tensor) for tensor in host)
    del tickets, store
    gc.collect()
    assert not any(is_registered(tensor) for tensor in host)


def is_registered(tensor: Tensor) -> bool:
    """Whether CUDA pinned the memory. `Tensor.is_pinned` is False of what cudaHostRegister took; the runtime's calls
    would leave their error for the next kernel to find, the driver's do not."""
    flags = ctypes.c_uint()
    code: int = ctypes.CDLL("libcuda.so.1").cuMemHostGetFlags(ctypes.byref(flags), ctypes.c_void_p(tensor.data_ptr()))
    return code == 0


N = 2**26
"""float32 numbers of a tensor whose copy takes milliseconds, and filling it a tenth of that."""


def junk() -> Tensor:
    """In whatever memory of the device is free."""
    return torch.full((N,), -1.0, device="cuda")


@pytest.mark.gpu
def test_memory_is_used_again_only_after_its_copies() -> None:
    store, right = HostStore(), []
    for _ in range(2):
        tickets = []
        for number in range(6):
            tickets.append(store.keep([torch.full((N,), float(number), device="cuda")]))
            junk()
        for number in reversed(range(6)):
            right.append((tickets[number].take()[0] == number).all())
            junk()
    assert all(bool(found) for found in right)


@pytest.mark.gpu
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_memory_of_a_dropped_ticket_is_used_again_only_after_its_copies(taken: int) -> None:
    store = HostStore()
    tickets = [store.keep([torch.full((N,), float(number), device="cuda")]) for number in range(5)]
    for _ in range(taken):
        tickets.pop().take()
    tickets.clear()  # while the next one is loaded, or the last but one stored
    ours = [junk() for _ in range(3)]
    assert all(bool((tensor == -1).all()) for tensor in ours)
    following = [store.keep([torch.full((N,), float(number), device="cuda")]) for number in range(5)]
    assert all(bool((following[number].take()[0] == number).all()) for number in reversed(range(5)))


LARGE = ModelConfig(name="large", n_layers=8, n_heads=16, n_kv_heads=4, dim=1024, ffn_dim=4096, vocab_size=512)
LONG = 65536
KEPT = LONG * (4 * 1024 + 2 * 16 * 64 + 4 * 16)
"""Bytes of a layer of it: input, attention's output and LSE."""


def large(policy: FullConfig) -> GPT:
    torch.manual_seed(0)
    spec = AttentionSpec(16, 4, 64, LONG, "bfloat16", torch.cuda.get_device_capability())
    with torch.device("cuda"):
        model = GPT(LARGE, build_attention(ATTENTIONS["flash"](name="flash"), spec))
    activations.apply(model, policy)
    return model.train()


def step(model: GPT) -> Tensor:
    """Adds to the gradients; the loss."""
    tokens = torch.randint(LARGE.vocab_size, (1, LONG + 1), device="cuda", generator=torch.Generator("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        loss: Tensor = model(tokens[:, :-1], tokens[:, 1:].contiguous()) / LONG
    loss.backward()
    return loss.detach()


@pytest.mark.gpu
def test_on_a_gpu_losses_and_gradients_are_the_same_bits() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        results = []
        for policy in (FullConfig(), OffloadConfig(), OffloadConfig(host=0.5, keep_attention=0.5, head_groups=4)):
            model = large(policy)
            losses = [step(model).item() for _ in range(2)]
            results.append((losses, [parameter.grad for parameter in model.parameters()]))
    finally:
        torch.use_deterministic_algorithms(False)
    for losses, gradients in results[1:2]:
        assert losses == results[0][0]
        for found, expected in zip(gradients, results[0][1], strict=True):
            assert torch.equal(found, expected)
    assert results[2][0] == pytest.approx(results[0][0], rel=1e-3), "groups of heads are added up in another order"


@pytest.mark.gpu
def test_on_a_gpu_the_peak_falls_by_what_leaves_and_the_host_holds_it() -> None:
    peaks = []
    for policy in (FullConfig(), OffloadConfig()):
        model = large(policy)
        step(model)  # now there are gradients, and pinned memory
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(model)
        peaks.append(torch.cuda.max_memory_allocated())
    # Two of eight layers are on the device at a time: the one in use, and the one that leaves or comes.
    assert peaks[0] - peaks[1] == pytest.approx(6 * KEPT, rel=0.1)
    buffers = store_of(model).buffers
    assert buffers is not None
    assert buffers.bytes == 7 * KEPT


@pytest.mark.gpu
def test_on_a_gpu_copies_run_beside_what_is_computed() -> None:
    seconds = []
    for policy in (FullConfig(), OffloadConfig()):
        model, taken = large(policy), []
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            step(model)
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        seconds.append(min(taken))
    assert seconds[1] <= 1.1 * seconds[0]
