"""Shapes of published networks: fields of `model.Config` by name. Parameter counts are tested."""

from typing import Any


def _gpt2(n_layer: int, n_head: int, n_embd: int) -> dict[str, Any]:
    return dict(arch="gpt2", vocab_size=50257, block_size=1024, n_layer=n_layer, n_head=n_head, n_embd=n_embd, tie=True)


def _llama(n_layer: int, n_head: int, n_embd: int, **more: Any) -> dict[str, Any]:
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd) | more


def _llama_3(n_layer: int, n_head: int, n_embd: int, n_hidden: int, **more: Any) -> dict[str, Any]:
    shape = dict(vocab_size=128256, block_size=8192, n_kv_head=8, n_hidden=n_hidden, rope_base=500000.0)
    return _llama(n_layer, n_head, n_embd, **shape | more)


def _long(factor: float) -> dict[str, Any]:
    """LLaMA 3.1 and 3.2: 16 times the context, by slower rotations."""
    scaling = dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_block_size=8192)
    return dict(block_size=131072, rope_scaling=scaling)


def _smollm2(n_layer: int, n_head: int, n_embd: int, **more: Any) -> dict[str, Any]:
    return _llama(n_layer, n_head, n_embd, vocab_size=49152, block_size=8192, tie=True, **more)


def _mistral(**more: Any) -> dict[str, Any]:
    return _llama(32, 32, 4096, block_size=32768, n_kv_head=8, n_hidden=14336, **more)


def _qwen2(n_layer: int, n_head: int, n_embd: int, n_hidden: int, **more: Any) -> dict[str, Any]:
    shape = dict(vocab_size=151936, block_size=32768, n_hidden=n_hidden, rope_base=1e6, norm_eps=1e-6, qkv_bias=True)
    return _llama(n_layer, n_head, n_embd, **shape | more)


def _qwen3(n_layer: int, n_head: int, n_embd: int, n_hidden: int, **more: Any) -> dict[str, Any]:
    shape = dict(vocab_size=151936, block_size=40960, n_kv_head=8, n_hidden=n_hidden, head_size=128)
    return _llama(n_layer, n_head, n_embd, **shape, rope_base=1e6, norm_eps=1e-6, qk_norm=True, **more)


PRESETS = {
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "llama-7b": _llama(32, 32, 4096, norm_eps=1e-6),
    "llama-13b": _llama(40, 40, 5120, norm_eps=1e-6),
    "llama-30b": _llama(60, 52, 6656, norm_eps=1e-6),
    "llama-65b": _llama(80, 64, 8192, norm_eps=1e-5),
    "llama-2-7b": _llama(32, 32, 4096, block_size=4096),
    "llama-2-13b": _llama(40, 40, 5120, block_size=4096),
    "llama-2-70b": _llama(80, 64, 8192, block_size=4096, n_kv_head=8, n_hidden=28672),
    "llama-3-8b": _llama_3(32, 32, 4096, 14336),
    "llama-3-70b": _llama_3(80, 64, 8192, 28672),
    "llama-3.1-8b": _llama_3(32, 32, 4096, 14336, **_long(8.0)),
    "llama-3.1-70b": _llama_3(80, 64, 8192, 28672, **_long(8.0)),
    "llama-3.2-1b": _llama_3(16, 32, 2048, 8192, tie=True, **_long(32.0)),
    "llama-3.2-3b": _llama_3(28, 24, 3072, 8192, tie=True, **_long(32.0)),
    "tinyllama-1.1b": _llama(22, 32, 2048, n_kv_head=4, n_hidden=5632),
    "smollm2-135m": _smollm2(30, 9, 576, n_kv_head=3, n_hidden=1536, rope_base=100000.0),
    "smollm2-360m": _smollm2(32, 15, 960, n_kv_head=5, n_hidden=2560, rope_base=100000.0),
    "smollm2-1.7b": _smollm2(24, 32, 2048, n_hidden=8192, rope_base=130000.0),
    "smollm3-3b": _llama(
        36, 16, 2048, vocab_size=128256, block_size=65536, n_kv_head=4, n_hidden=11008, rope_base=5e6, norm_eps=1e-6,
        tie=True, no_rope_every=4,
    ),
    "mistral-7b-v0.1": _mistral(window=4096),
    "mistral-7b-v0.3": _mistral(vocab_size=32768, rope_base=1e6),
    "qwen2.5-0.5b": _qwen2(24, 14, 896, 4864, n_kv_head=2, tie=True),
    "qwen2.5-1.5b": _qwen2(28, 12, 1536, 8960, n_kv_head=2, tie=True),
    "qwen2.5-3b": _qwen2(36, 16, 2048, 11008, n_kv_head=2, tie=True),
    "qwen2.5-7b": _qwen2(28, 28, 3584, 18944, n_kv_head=4, vocab_size=152064),
    "qwen3-0.6b": _qwen3(28, 16, 1024, 3072, tie=True),
    "qwen3-1.7b": _qwen3(28, 16, 2048, 6144, tie=True),
    "qwen3-4b": _qwen3(36, 32, 2560, 9728, tie=True),
    "qwen3-8b": _qwen3(36, 32, 4096, 12288),
    "qwen3-14b": _qwen3(40, 40, 5120, 17408),
    "qwen3-32b": _qwen3(64, 64, 5120, 25600),
}  # fmt: skip
