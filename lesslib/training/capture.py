"""What training learns from: q, k, v and attention outputs of layers, by a pass of the model."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lesslib.hf import capture
from lesslib.models import model_shape
from lesslib.util.hardware import autocast
from lesslib.util.progress import progress


class AllCaptured(Exception):
    """Ends a pass of the model where all that was wanted of it is there."""


@dataclass
class LayerData:
    """One layer over N sequences of S tokens.

    q, out [N, Hq, S, D or Dv]; k, v [N, Hkv, S, D or Dv]; `scaling` of its logits; `seconds`, its
    share of the pass that captured it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scaling: float = field(default=0.0, init=False)
    seconds: float = field(default=0.0, init=False)

    def put(self, rows: slice, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Take the tensors of the sequences `rows`."""
        self.q[rows] = q.to("cpu", self.q.dtype)
        self.k[rows] = k.to("cpu", self.k.dtype)
        self.v[rows] = v.to("cpu", self.v.dtype)
        self.out[rows] = out.to("cpu", self.out.dtype)


def captured_bytes(shape: dict[str, int], windows: Tensor) -> int:
    """What `capture_layers` keeps of one layer: four tensors, two bytes a number."""
    heads = 2 * (shape["heads"] + shape["kv_heads"])
    return windows.numel() * shape["head_dim"] * heads * 2


def capture_layers(
    model,
    windows: Tensor,
    layers: list[int],
    batch: int = 8,
    memory_gib: float = 8.0,
    folder: Path | None = None,
) -> dict[int, LayerData]:
    """q, k, v after RoPE and attention outputs of `layers` over token `windows` [N, S], by layer.

    They come from ONE pass, in half precision. A float32 model's matmuls run under `autocast`; the
    outputs are those of the captured q, k and v all the same. Beyond `memory_gib` they are mapped
    files in `folder`, gone with the tensors; raises ValueError without a folder that holds them.
    """
    needed = len(layers) * captured_bytes(model_shape(model), windows)
    is_on_disk = needed > memory_gib * 2**30
    if is_on_disk:
        _check_disk(needed, memory_gib, folder)
    data = {}
    for layer in layers:
        if is_on_disk:
            data[layer] = _layer_on_disk(model, windows, f"{folder}/{layer}")
        else:
            data[layer] = _layer_in_memory(model, windows)

    # The sequences that pass through the model at the moment.
    rows = slice(0, 0)
    last = max(layers)

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scaling: float) -> None:
        if layer in data:
            data[layer].put(rows, q, k, v, out)
            data[layer].scaling = scaling
        if layer == last:
            raise AllCaptured

    sequences = len(windows)
    begun = time.perf_counter()
    with autocast(model.device, model.dtype == torch.float32), capture(model, keep):
        for start in range(0, sequences, batch):
            rows = slice(start, min(start + batch, sequences))
            with contextlib.suppress(AllCaptured):
                model(input_ids=windows[rows].to(model.device), use_cache=False, logits_to_keep=1)
            progress("capturing q, k, v", rows.stop, sequences)
    seconds = time.perf_counter() - begun
    for layer_data in data.values():
        layer_data.seconds = seconds / len(data)
    return data


def _check_disk(needed: int, memory_gib: float, folder: Path | None) -> None:
    """Raises ValueError where no `folder` has room for the `needed` bytes."""
    if folder is None:
        fix = "give a folder to stream them to"
    elif shutil.disk_usage(folder).free < needed:
        fix = f"free that much disk at {folder}, or use fewer sequences"
    else:
        return
    raise ValueError(
        f"the captured layers take {needed / 2**30:.1f} GiB, above memory_gib={memory_gib:g}: {fix}"
    )


def _layer_in_memory(model, windows: Tensor) -> LayerData:
    """Room for a layer in memory."""
    dtype = _half_precision(model)
    tensors = {}
    for name, size in _sizes(model, windows).items():
        tensors[name] = torch.empty(size, dtype=dtype)
    return LayerData(**tensors)


def _layer_on_disk(model, windows: Tensor, prefix: str) -> LayerData:
    """Room for a layer in mapped files, whose names begin with `prefix`; they end with it."""
    dtype = _half_precision(model)
    tensors = {}
    for name, size in _sizes(model, windows).items():
        path = Path(f"{prefix}-{name}.bin")
        numbers = torch.from_file(str(path), shared=True, size=size.numel(), dtype=dtype)
        # The mapping keeps its bytes, and a process that is killed leaves none behind.
        path.unlink()
        tensors[name] = numbers.view(size)
    return LayerData(**tensors)


def _half_precision(model) -> torch.dtype:
    """The model's own where it has one; float16 holds more digits of what a float32 model gives."""
    return torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16


def _sizes(model, windows: Tensor) -> dict[str, torch.Size]:
    """The sizes of a layer's tensors by their names in `LayerData`."""
    shape = model_shape(model)
    sequences, tokens = windows.shape
    per_query_head = torch.Size((sequences, shape["heads"], tokens, shape["head_dim"]))
    per_key_head = torch.Size((sequences, shape["kv_heads"], tokens, shape["head_dim"]))
    return {"q": per_query_head, "k": per_key_head, "v": per_key_head, "out": per_query_head}
