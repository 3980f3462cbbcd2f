"""What a model is: the fields of `configs/model/*.yaml`. No torch here, so a mistake is found before it loads."""

from __future__ import annotations

from dataclasses import dataclass, field

SCALINGS = ("none", "linear", "ntk", "yarn", "llama3")


@dataclass
class RotaryConfig:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), and how they are stretched for a longer context."""

    theta: float = 10000.0
    """Base of the frequencies. Raising it is ABF (Xiong et al. 2023, arXiv:2309.16039): 500000 in Llama 3."""
    scaling: str = "none"
    """none, linear, ntk, yarn or llama3; all but none stretch `original_seq_len` by `factor`."""
    factor: float = 1.0
    original_seq_len: int = 8192
    """The context length the unscaled frequencies were trained for (yarn and llama3)."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this over the original context are left alone."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are interpolated fully."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_seq_len / this are interpolated fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_seq_len / this are left alone."""

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise ValueError(f"model.rotary.scaling={self.scaling!r} is unknown; use {', '.join(SCALINGS)}")
        if self.scaling == "none" and self.factor != 1:
            raise ValueError(
                f"model.rotary.factor={self.factor:g} does nothing with scaling=none; "
                f"name a scaling: {', '.join(SCALINGS[1:])}"
            )
        if self.factor < 1:
            raise ValueError(f"model.rotary.factor={self.factor:g} would shorten the context; use 1 or more")
        if self.theta <= 1:
            raise ValueError(f"model.rotary.theta={self.theta:g} must be above 1; 10000 is usual")
        if self.original_seq_len < 1:
            raise ValueError(f"model.rotary.original_seq_len={self.original_seq_len} must be at least 1")
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(f"model.rotary.{low}={getattr(self, low):g} must lie between 0 and {high}")


@dataclass
class ModelConfig:
    """A decoder-only transformer. Two families come out of these choices: GPT-2 and Llama."""

    name: str
    n_layers: int
    n_heads: int
    dim: int
    """Width of the residual stream."""
    ffn_dim: int
    """Width inside the feed-forward layer."""
    vocab_size: int
    n_kv_heads: int | None = None
    """Key/value heads, shared by groups of query heads (grouped-query attention); None for as many as n_heads."""
    head_dim: int | None = None
    """None for dim / n_heads."""
    position: str = "rotary"
    """learned (a table of n_positions, GPT-2) or rotary (Llama)."""
    n_positions: int = 0
    """Rows of the learned table; unused with rotary."""
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    norm: str = "rmsnorm"
    """rmsnorm (Llama) or layernorm (GPT-2)."""
    norm_eps: float = 1e-5
    mlp: str = "swiglu"
    """swiglu (Llama) or gelu (GPT-2, the tanh form)."""
    bias: bool = False
    """Biases in the linear layers and, with layernorm, in the norms."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections, where the others have none (Qwen 2)."""
    tie_head: bool = False
    """The output head is the embedding table."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before rotation (Dehghani et al. 2023, arXiv:2302.05442)."""
    window: int | None = None
    """Sliding window: most recent tokens a token sees, itself included; None for all."""
    attention_softcap: float = 0.0
    """c > 0 replaces an attention score s with c · tanh(s / c) (Gemma 2)."""
    attention_scale: float | None = None
    """Multiplies attention scores; None for 1/√head_dim."""
    logit_softcap: float = 0.0
    """c > 0 replaces a logit z with c · tanh(z / c)."""
    loss_chunk_size: int = 2048
    """Tokens whose logits exist at one time in training; 0 for all. Those of 2048 tokens take 196 MiB in bf16 with a
    vocabulary of 50k. Fewer cost time: the head's gradient, a sum over chunks, passes through memory once a chunk."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "dim", "ffn_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise ValueError(
                    f"model.n_heads={self.n_heads} does not divide model.dim={self.dim}; "
                    f"choose a divisor or set model.head_dim"
                )
            self.head_dim = self.dim // self.n_heads
        if self.head_dim < 1:
            raise ValueError(f"model.head_dim={self.head_dim} must be at least 1")
        if self.norm_eps < 0:
            raise ValueError(f"model.norm_eps={self.norm_eps} is negative; 1e-5 is usual")
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_kv_heads={self.n_kv_heads} does not divide model.n_heads={self.n_heads}; "
                f"choose a divisor, or null for as many"
            )
        for name, allowed in (
            ("position", ("learned", "rotary")),
            ("norm", ("rmsnorm", "layernorm")),
            ("mlp", ("swiglu", "gelu")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"model.{name}={getattr(self, name)!r} is unknown; use {' or '.join(allowed)}")
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"model.head_dim={self.head_dim} is odd: rotary positions need an even one, such as {self.head_dim + 1}"
            )
        if self.position == "rotary" and self.rotary.scaling == "ntk" and self.head_dim < 4:
            raise ValueError(f"model.rotary.scaling=ntk needs a head_dim of 4 or more, not {self.head_dim}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"model.window={self.window}: a token sees at least itself; use 1 or more, or null")
        if self.attention_scale is not None and not self.attention_scale > 0:
            raise ValueError(f"model.attention_scale={self.attention_scale} must be above 0; null is 1/√head_dim")
        for name in ("attention_softcap", "logit_softcap", "loss_chunk_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)} is negative; use 0 to switch it off")

    def check_seq_len(self, seq_len: int) -> None:
        """Raises ValueError when rows of this length have positions the model lacks."""
        if self.position == "learned" and seq_len > self.n_positions:
            raise ValueError(
                f"seq_len={seq_len} is beyond the model's {self.n_positions} learned positions; "
                f"set model.n_positions={seq_len} or use a model with rotary positions"
            )


def linear_sizes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer of a block, by its name there, in the order of its products."""
    assert model.head_dim is not None
    assert model.n_kv_heads is not None
    heads, D, E, F = model.n_heads + 2 * model.n_kv_heads, model.head_dim, model.dim, model.ffn_dim
    first = ("mlp.gate_up", 2 * F) if model.mlp == "swiglu" else ("mlp.up", F)
    return {
        "attention.qkv": (E, heads * D),
        "attention.out": (model.n_heads * D, E),
        first[0]: (E, first[1]),
        "mlp.down": (F, E),
    }
