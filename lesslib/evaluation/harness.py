"""lm-evaluation-harness under LESS, with no change to its tasks (`pip install "lm_eval[hf]"`):

    python -m lesslib.harness run --model less --model_args pretrained=pico-llama,policy=h2o,fraction=0.05 --tasks lambada_openai

Likelihoods go through the whole-sequence form, generated text through a LessCache. All of the harness's other options apply.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lesslib.attention.cache import LessCache
from lesslib.attention.fit import check_fit, model_shape
from lesslib.hf import less
from lesslib.models import load_kernels, load_model
from lesslib.policies import get_policy

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as e:
    raise ImportError(
        f'lesslib.harness needs lm-evaluation-harness ({e}): pip install "lm_eval[hf]"'
    ) from e


@register_model("less")
class LessLM(HFLM):
    """A model of the harness that keeps `fraction` of its context under `policy` ("full" keeps all), with or without kernels.

    `pretrained`: a name or folder for lesslib.models.load_model. `kernels`: "carried" for those of the package, a folder for your own
    (see load_kernels), "none" or None for the policy alone. `prefill`: as in LessCache. `dtype`: a name of torch's. Of the harness's HFLM
    the `OPTIONS` work too. Raises ValueError for any other argument.
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

    def __init__(
        self,
        pretrained: str = "pico-llama",
        policy: str = "h2o",
        fraction: float = 0.05,
        kernels: str | None = "carried",
        prefill: Any = "dense",
        device: str | None = None,
        dtype: str | None = None,
        **kwargs: Any,
    ):
        if unknown := sorted(set(kwargs) - set(self.OPTIONS)):
            known = (
                "pretrained",
                "policy",
                "fraction",
                "kernels",
                "prefill",
                "device",
                "dtype",
                *self.OPTIONS,
            )
            raise ValueError(
                f"unknown argument {', '.join(unknown)} of the model less: choose from {', '.join(known)}"
            )
        if dtype not in (None, "auto") and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype {dtype!r}: choose float32, bfloat16, float16 or auto")
        model, tokenizer = load_model(
            pretrained, device, None if dtype in (None, "auto") else getattr(torch, dtype)
        )
        full = get_policy(policy).name == "full"
        self.policy = (
            get_policy(policy)()
            if full
            else get_policy(policy).from_fraction(float(fraction), model_shape(model)["context"])
        )
        own, none = None if kernels == "carried" else kernels, full or kernels in (None, "none")
        self.kernels = None if none else load_kernels(pretrained, policy, float(fraction), own)
        self.prefill, self.full = prefill, full
        if full:
            check_fit(model, self.policy, None)
        else:
            LessCache(
                model, self.policy, self.kernels, prefill
            )  # raises what it would raise at the first text
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **kwargs)

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
