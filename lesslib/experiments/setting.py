"""From a `Method` to what a model runs under: its policy and its state, with kernels trained when
they are needed.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from lesslib.experiments.loaded import model_of, sha256_of
from lesslib.experiments.method import Method
from lesslib.models import kernel_path, load_kernels, model_shape
from lesslib.policies import Full, Policy, get_policy
from lesslib.profiles import Profile, get_profile, results_dir
from lesslib.states import Kernels, ModelState, get_state
from lesslib.training import Recipe, train_for_profile
from lesslib.util.paths import ASSETS


def policy_and_state(
    method: Method,
    profile: str,
    seed: int,
    model_name: str | None = None,
    kernel_size: int | None = None,
    carried: bool = False,
) -> tuple[Policy, ModelState | None]:
    """What `less(model, policy, state)` takes for `method`; kernels are trained now if need be.

    `model_name` and `kernel_size` (R): the profile's unless given. `carried`: only kernels of the
    package. Raises ValueError for a policy or a state of an unknown name.
    """
    p = profile_for(profile, model_name, kernel_size)
    shape = model_shape(model_of(p.model)[0])
    if method.policy == "full":
        return Full(), None
    policy: Policy = get_policy(method.policy).from_fraction(method.fraction, shape["context"])
    if method.extra_tokens:
        policy = policy.plus(p.kernel_size // 2)
    if method.state == "none":
        return policy, None
    if method.state == "performer":
        return policy, Kernels.performer(shape, p.kernel_size, seed)
    if method.state == "less":
        if carried:
            return policy, carried_kernels(p, method)
        return policy, own_kernels(p, method, seed)
    return policy, get_state(method.state).for_model(shape)


def profile_for(profile: str, model_name: str | None, kernel_size: int | None) -> Profile:
    """The profile `profile` for another model and another R, where these are given."""
    p = get_profile(profile)
    p = p.of(model_name or p.model)
    return replace(p, kernel_size=kernel_size or p.kernel_size)


def carried_kernels(p: Profile, method: Method) -> Kernels:
    """The kernels that the package carries for `method`."""
    assert method.trained_fraction is not None
    return load_kernels(p.model, method.policy, method.trained_fraction)


def own_kernels(p: Profile, method: Method, seed: int) -> Kernels:
    """The kernels of profile `p` for `method`, trained now unless they lie there up to date.

    `load_kernels` and `check_fit` refuse those of other weights.
    """
    assert method.trained_fraction is not None
    folder = kernels_dir(p.name, p.kernel_size)
    if not folder.is_relative_to(ASSETS):
        path = kernel_path(p.model, method.policy, method.trained_fraction, folder, seed)
        if not are_up_to_date(path, p, seed):
            fit_kernels(
                p.name, seed, method.policy, method.trained_fraction, p.model, p.kernel_size
            )
    return load_kernels(
        p.model, method.policy, method.trained_fraction, folder, kernel_seed(p, seed)
    )


def are_up_to_date(path: Path, p: Profile, seed: int) -> bool:
    """Whether the kernels at `path` are of the recipe and the texts of `p`."""
    if not path.is_file():
        return False
    header = Kernels.load(path).header
    if header.get("sequences") != p.sequences or header.get("recipe") != asdict(Recipe.of(p, seed)):
        return False
    trained_on = [corpus["sha256"] for corpus in header.get("data", [])]
    return trained_on == [sha256_of(corpus) for corpus in p.training]


def kernel_seed(p: Profile, seed: int) -> int:
    """The seed of the kernels to load: quick profiles have those of the package's first seed."""
    return 0 if p.quick else seed


def kernels_dir(profile: str, kernel_size: int) -> Path:
    """Where a profile's kernels of size R lie.

    Below its results; in the package where its kernels will do and none were trained here.
    """
    p = get_profile(profile)
    folder = results_dir(profile) / "kernels"
    if p.quick or (p.carried and not folder.is_dir()):
        folder = ASSETS / "kernels"
    return folder if kernel_size == p.kernel_size else folder / f"R{kernel_size}"


def fit_kernels(
    profile: str,
    seed: int,
    policy: str = "h2o",
    fraction: float = 0.05,
    model_name: str | None = None,
    kernel_size: int | None = None,
) -> dict:
    """Train one set of kernels, or take those of the package (see `kernels_dir`).

    {"layers": curves by layer}, with "carried" where they are the package's.
    """
    p = profile_for(profile, model_name, kernel_size)
    folder = kernels_dir(profile, p.kernel_size)
    if folder.is_relative_to(ASSETS):
        kernels = load_kernels(p.model, policy, fraction, folder, kernel_seed(p, seed))
        return {"layers": kernels.header["curves"], "carried": True}
    path = kernel_path(p.model, policy, fraction, folder, seed)
    return {"layers": train_for_profile(p, policy, fraction, path, seed)}
