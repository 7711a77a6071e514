"""Names that lie in `lesslib.states`, kept where users found them."""

from lesslib.states import FORMAT, SCALE_INIT, Kernels, LayerKernels, LayerPerformer

__all__ = ["FORMAT", "SCALE_INIT", "Kernels", "LayerKernels", "LayerPerformer"]
