"""What stands for kvpress where tests run the peer's process: presses that keep the newest tokens.

They take the arguments of kvpress' own and count steps as those do.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class KnormPress:
    compression_ratio: float = 0.0


@dataclass
class DecodingPress:
    base_press: KnormPress
    compression_interval: int
    target_size: int
    hidden_states_buffer_size: int

    @contextmanager
    def __call__(self, model):
        steps = 0

        def after(module, args, kwargs, output):
            nonlocal steps
            if args[0].shape[1] > 1:
                return
            steps += 1
            if steps % self.compression_interval == 0:
                keep_newest(kwargs["past_key_values"], self.target_size)

        hook = model.register_forward_hook(after, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@dataclass
class PrefillDecodingPress:
    prefilling_press: KnormPress
    decoding_press: DecodingPress

    @contextmanager
    def __call__(self, model):
        def after(module, args, kwargs, output):
            tokens = args[0].shape[1]
            if tokens > 1:
                kept = int(tokens * (1 - self.prefilling_press.compression_ratio))
                keep_newest(kwargs["past_key_values"], kept)

        hook = model.register_forward_hook(after, with_kwargs=True)
        try:
            with self.decoding_press(model):
                yield
        finally:
            hook.remove()


def keep_newest(cache: Any, tokens: int) -> None:
    for layer in cache.layers:
        layer.keys = layer.keys[:, :, -tokens:].contiguous()
        layer.values = layer.values[:, :, -tokens:].contiguous()
