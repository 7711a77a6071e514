"""What is remembered of who left."""

from lesslib.states.kernels import FORMAT, SCALE_INIT, Kernels, LayerKernels, LayerPerformer

__all__ = ["FORMAT", "SCALE_INIT", "Kernels", "LayerKernels", "LayerPerformer"]
