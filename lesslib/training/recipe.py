"""The settings of kernel training, with the paper's values as defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lesslib.profiles import Profile


@dataclass(frozen=True)
class Recipe:
    """Settings of kernel training; the defaults are the paper's.

    `Recipe.of(profile, seed)` takes a profile's. Raises ValueError naming a setting that cannot be.
    """

    # R, the features of phi and psi, and the width of their hidden layer.
    kernel_size: int = 8
    hidden: int = 512

    # Adam at `lr`, which halves every so many epochs; `batch` sequences a step.
    epochs: int = 40
    halve_every: int = 10
    lr: float = 1e-3
    dropout: float = 0.3
    batch: int = 2

    # Of weights, order and dropout.
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "dropout":
                if not 0 <= value < 1:
                    raise ValueError(f"recipe {name}={value!r}: it is a share in [0, 1)")
            elif name != "seed" and not value > 0:
                raise ValueError(f"recipe {name}={value!r}: it must be positive")

    @classmethod
    def of(cls, profile: Profile, seed: int) -> Recipe:
        """The recipe of a profile."""
        return cls(
            kernel_size=profile.kernel_size,
            hidden=profile.hidden,
            epochs=profile.epochs,
            halve_every=profile.halve_every,
            lr=profile.lr,
            dropout=profile.dropout,
            batch=profile.train_batch,
            seed=seed,
        )
