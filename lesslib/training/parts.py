"""The layers that are finished while others are not: files, by which training resumes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from torch import Tensor, nn

from lesslib.states import Kernels
from lesslib.util.files import read_torch, write_torch
from lesslib.util.ranks import gather


def stamp_of(header: dict, windows: Tensor) -> str:
    """What decides the weights of a training: its header and its token `windows`, as one text."""
    sha256 = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return json.dumps([header, sha256], sort_keys=True)


class LayerParts:
    """One file a finished layer, in `<path>.parts/`, until all layers of `path` are there.

    A part holds its training's stamp, the layer's weights and its curves; those of another stamp
    do not count. Raises ValueError for a damaged one.
    """

    def __init__(self, path: Path, stamp: str, layers: int):
        self.folder = path.with_name(f"{path.name}.parts")
        self.stamp = stamp
        self.layers = layers
        self.finished: dict[int, dict] = {}
        for layer in range(layers):
            part = read_torch(self._file(layer), "delete it, and that layer is trained again")
            if part and part["stamp"] == stamp:
                self.finished[layer] = part

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03d}.pt"

    def unfinished(self) -> list[int]:
        """The layers that are still to be trained, the same on every rank.

        A layer is finished when every rank sees its part: with a disk for each node, some are
        trained again. Raises ValueError where another rank trains something else.
        """
        stamps = []
        finished = set(range(self.layers))
        for rank_stamp, rank_finished in gather((self.stamp, set(self.finished))):
            stamps.append(rank_stamp)
            finished &= rank_finished
        for rank, stamp in enumerate(stamps):
            if stamp != stamps[0]:
                raise ValueError(
                    f"rank {rank} has another model, recipe or text than rank 0: "
                    "give all the same arguments, data and lesslib"
                )
        return [layer for layer in range(self.layers) if layer not in finished]

    def add(self, layer: int, kernels: nn.Module, curves: dict) -> None:
        """Record a layer that this rank has trained."""
        weights = kernels.cpu().state_dict()
        part = {"stamp": self.stamp, "weights": weights, "curves": curves}
        self.finished[layer] = part
        write_torch(self._file(layer), part)

    def exchange(self, layers: list[int]) -> None:
        """Give the parts of `layers` to all other ranks and take theirs.

        They are not read from the disk, which may show another node's files late.
        """
        for parts in gather({layer: self.finished[layer] for layer in layers}):
            self.finished |= parts

    def load_into(self, kernels: Kernels) -> dict[str, dict]:
        """Load the weights of all layers into `kernels`; returns {layer: curves}."""
        curves = {}
        for layer in range(self.layers):
            part = self.finished[layer]
            kernels[layer].load_state_dict(part["weights"])
            curves[str(layer)] = part["curves"]
        return curves

    def delete(self) -> None:
        """Remove the files: all that they hold lies in one file by now."""
        shutil.rmtree(self.folder)
