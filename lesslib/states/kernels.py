"""The kernels of all layers of a model, and the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lesslib.states.base import ModelState, State, model_header
from lesslib.states.low_rank import LayerKernels
from lesslib.states.performer import LayerPerformer
from lesslib.util.files import write_bytes

FORMAT = "less-kernels-1"


class Kernels(ModelState):
    """LESS's state for a model: phi and psi of every layer, with a header on what they were made
    from.

    `header` holds at least layers, heads, kv_heads, head_dim, kernel_size (R) and hidden; trained
    ones add model, revision, policy, budget, fraction, data, seed, recipe and the lesslib
    version.
    """

    @classmethod
    def new(
        cls,
        shape: dict[str, int],
        kernel_size: int,
        hidden: int,
        dropout: float = 0.3,
        seed: int = 0,
    ) -> Kernels:
        """Freshly initialised kernels for a model of `shape` (layers, heads, kv_heads,
        head_dim).
        """
        header = model_header(shape, kernel_size=kernel_size, hidden=hidden)
        layers: list[State] = []
        for i in range(shape["layers"]):
            # A generator each, so that layers come out the same wherever they are trained.
            generator = torch.Generator().manual_seed(seed * 1000 + i)
            sizes = layer_sizes(header)
            layers.append(LayerKernels(**sizes, dropout=dropout, generator=generator))
        return cls(header | {"seed": seed}, layers)

    @classmethod
    def performer(cls, shape: dict[str, int], kernel_size: int = 8, seed: int = 0) -> Kernels:
        """The Performer baseline for a model of `shape`; its header says `hidden` 0."""
        header = model_header(shape, kernel_size=kernel_size)
        generator = torch.Generator().manual_seed(seed)
        layers: list[State] = []
        for _ in range(shape["layers"]):
            layers.append(LayerPerformer(**layer_sizes(header), generator=generator))
        return cls(header | {"hidden": 0, "seed": seed}, layers)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the JSON header, whole or not at all."""
        tensors = {}
        for name, tensor in self.state_dict().items():
            tensors[name] = tensor.detach().cpu().contiguous()
        header = json.dumps(self.header, sort_keys=True)
        write_bytes(path, save(tensors, metadata={"format": FORMAT, "header": header}))

    @classmethod
    def load(cls, path: str | Path) -> Kernels:
        """Read what `save` wrote.

        Raises FileNotFoundError, or ValueError for a file that is cut short, foreign or holds NaN.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no kernels at {path}: train them with python -m lesslib.train"
            )
        metadata, tensors = read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds format {metadata.get('format')!r}, not {FORMAT!r}:"
                " not LESS kernels of this version"
            )
        try:
            header = json.loads(metadata["header"])
            kernels = cls._of_header(header)
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(
                f"{path}: its header is damaged ({type(e).__name__}: {e});"
                " delete the file and train again"
            ) from e
        check_tensors(path, kernels.state_dict(), tensors)
        kernels.load_state_dict(tensors)
        kernels.header = header
        return kernels.eval()

    @classmethod
    def _of_header(cls, header: dict[str, Any]) -> Kernels:
        if header["hidden"]:
            return cls.new(header, header["kernel_size"], header["hidden"])
        return cls.performer(header, header["kernel_size"])


def layer_sizes(header: dict[str, int]) -> dict[str, int]:
    """The sizes in a fresh header that one layer is made of."""
    return {field: size for field, size in header.items() if field != "layers"}


def read_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file. Raises ValueError for one that is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensors[name] = file.get_tensor(name)
            return file.metadata() or {}, tensors
    except (SafetensorError, OSError) as e:
        raise ValueError(
            f"{path} is not a whole safetensors file ({e}): delete it and train again"
        ) from e


def check_tensors(path: str | Path, wanted: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raises ValueError naming the first tensor of `read` that its header does not speak of."""
    for name in sorted(wanted.keys() | read.keys()):
        is_there = tuple(read[name].shape) if name in read else "missing"
        should_be = tuple(wanted[name].shape) if name in wanted else "not to be there"
        if is_there != should_be:
            raise ValueError(
                f"{path}: {name} is {is_there}, the header says {should_be};"
                " delete the file and train again"
            )
        if not read[name].isfinite().all():
            raise ValueError(
                f"{path}: {name} holds NaN or infinite weights; delete the file and train again"
            )
