"""lm-evaluation-harness under LESS, with no change to its tasks (`pip install "lm_eval[hf]"`):

    python -m lesslib.harness run --model less \
        --model_args pretrained=pico-llama,policy=h2o,fraction=0.05 --tasks lambada_openai

Likelihoods go through the whole-sequence form, generated text through a LessCache. All of the
harness's other options apply.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lesslib.attention.cache import LessCache
from lesslib.hf import less
from lesslib.models import check_fit, load_kernels, load_model, model_shape
from lesslib.policies import Policy, get_policy
from lesslib.states import Kernels

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as e:
    raise ImportError(
        f'lesslib.harness needs lm-evaluation-harness ({e}): pip install "lm_eval[hf]"'
    ) from e


@dataclass(frozen=True)
class LessArguments:
    """What `--model_args` says of a model under LESS.

    `pretrained` is a name or folder for `lesslib.models.load_model`. `fraction` of its context is
    kept under `policy` ("full" keeps all). `kernels`: "carried" for those of the package, a folder
    for your own (see `load_kernels`), "none" or None for the policy alone. `prefill`: as in
    LessCache. `dtype`: a name of torch's. Raises ValueError for a name that torch does not have.
    """

    pretrained: str = "pico-llama"
    policy: str = "h2o"
    fraction: float = 0.05
    kernels: str | None = "carried"
    prefill: Any = "dense"
    device: str | None = None
    dtype: str | None = None

    def torch_dtype(self) -> torch.dtype | None:
        """The dtype to load in, None to leave it to `load_model`."""
        if self.dtype in (None, "auto"):
            return None
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype {self.dtype!r}: choose float32, bfloat16, float16 or auto")
        return dtype

    def keeps_all(self) -> bool:
        return get_policy(self.policy).name == "full"

    def make_policy(self, context: int) -> Policy:
        """The policy, for a model of that context."""
        policy = get_policy(self.policy)
        if self.keeps_all():
            return policy()
        return policy.from_fraction(float(self.fraction), context)

    def load_kernels(self) -> Kernels | None:
        """The kernels, None for the policy alone."""
        if self.keeps_all() or self.kernels in (None, "none"):
            return None
        folder = None if self.kernels == "carried" else self.kernels
        return load_kernels(self.pretrained, self.policy, float(self.fraction), folder)


@register_model("less")
class LessLM(HFLM):
    """A model of the harness under a policy, with or without kernels: see `LessArguments`.

    Of the harness's HFLM the `OPTIONS` work too. Raises ValueError for any other argument.
    """

    OPTIONS = (
        "batch_size",
        "max_batch_size",
        "max_length",
        "truncation",
        "logits_cache",
        "add_bos_token",
        "prefix_token_id",
    )

    def __init__(self, pretrained: str = "pico-llama", **arguments: Any):
        names = [field.name for field in fields(LessArguments)]
        unknown = sorted(set(arguments) - set(names) - set(self.OPTIONS))
        if unknown:
            raise ValueError(
                f"unknown argument {', '.join(unknown)} of the model less: choose from "
                f"{', '.join((*names, *self.OPTIONS))}"
            )
        options = {name: arguments.pop(name) for name in self.OPTIONS if name in arguments}
        chosen = LessArguments(pretrained, **arguments)
        model, tokenizer = load_model(pretrained, chosen.device, chosen.torch_dtype())
        self.policy = chosen.make_policy(model_shape(model)["context"])
        self.kernels = chosen.load_kernels()
        self.prefill = chosen.prefill
        self.full = chosen.keeps_all()
        if self.full:
            check_fit(model, self.policy, None)
        else:
            # raises what it would raise at the first text
            LessCache(model, self.policy, self.kernels, self.prefill)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        assert isinstance(self.model, PreTrainedModel)
        with less(self.model, self.policy, self.kernels):
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        assert isinstance(self.model, PreTrainedModel)
        if self.full:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        cache = LessCache(self.model, self.policy, self.kernels, self.prefill)
        with less(self.model):
            return super()._model_generate(
                context, max_length, stop, past_key_values=cache, **generation_kwargs
            )


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli_evaluate()
