"""Models on meta from what a user names: a folder, a config.json, a model that is in the hub's cache, a config."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hetegen_compile.errors import OptionError, UnsupportedModelError, first_line

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class NamedModel:
    """A model and what to call it.

    Attributes:
        name: for people.
        module: in evaluation mode; its weights are on meta unless it was given as a module.
        dtype: name of the weights' type, of all of them where there are several.
        generates: whether it makes tokens one by one from a cache; an encoder runs one forward only.
        positions: the longest context that its config states, or None.
        quantised: whether its config states quantised weights, which a plan does not model.
    """

    name: str
    module: nn.Module
    dtype: str
    generates: bool
    positions: int | None = None
    quantised: bool = False

    def takes(self, argument: str) -> bool:
        """Whether the forward has a parameter of this name."""
        return argument in inspect.signature(self.module.forward).parameters


def named_model(source: Any, dtype: str | None = None) -> NamedModel:
    """The model that ``source`` means, without weights and without the network.

    Args:
        source: a folder with a config.json, such a file, the id of a model whose config is in the hub's cache, a
            transformers config, or a module (which is taken as it is, whatever ``dtype`` says).
        dtype: name of the weights' type; None: what the config states (``stated_dtype``).

    Raises:
        OptionError: ``dtype`` is none that weights are stored in.
        UnsupportedModelError: no such model, or not one that reads tokens; the message says what to do.
    """
    if dtype not in (*DTYPES, None):
        raise OptionError(f"dtype={dtype!r}: valid are {', '.join(map(repr, DTYPES))}")
    if isinstance(source, nn.Module):
        config = getattr(source, "config", None)
        makes_tokens = generates(config) if config is not None else False
        return _named(type(source).__name__, source, _dtype_of(source), config, makes_tokens)
    config = named_config(source) if isinstance(source, (str, Path)) else source
    if not hasattr(config, "model_type"):
        raise UnsupportedModelError(f"{source!r} is neither a path, nor a model's id, nor a config, nor a module")
    name = str(source) if isinstance(source, (str, Path)) else f"{config.model_type} config"
    dtype = dtype or stated_dtype(config)
    return _named(name, _on_meta(config, DTYPES[dtype]), dtype, config, generates(config))


def stated_dtype(config: Any) -> str:
    """The type that a config states for the weights (``dtype``, once ``torch_dtype``); float16 if none of ours."""
    stated = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return stated if stated in DTYPES else "float16"


def _dtype_of(model: nn.Module) -> str:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return ", ".join(sorted(dtypes)) or "none"


def _named(name: str, module: nn.Module, dtype: str, config: Any, generates: bool) -> NamedModel:
    found = NamedModel(
        name=name,
        module=module,
        dtype=dtype,
        generates=generates,
        positions=getattr(config, "max_position_embeddings", None),
        quantised=getattr(config, "quantization_config", None) is not None,
    )
    if not found.takes("input_ids"):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) does not read tokens: use hetegen_compile.plan(model, *inputs) for it"
        )
    return found


def named_config(source: str | Path) -> Any:
    """The transformers config that a path or a model's id names; UnsupportedModelError if there is none here."""
    from transformers import AutoConfig

    if _is_path(source) and not Path(source).exists():
        raise UnsupportedModelError(f"no config of {str(source)!r}: there is no such file or folder")
    try:
        return AutoConfig.from_pretrained(str(source), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"no config of {str(source)!r}: {first_line(error)} It has to be a folder with a config.json, such a "
            "file, or a model whose config is in the hub's cache; the network is not used (to fetch it: "
            "hf download MODEL config.json)"
        ) from error


def _is_path(source: str | Path) -> bool:
    """Whether this can be no model's id: those are "name" or "owner/name"."""
    text = str(source)
    return isinstance(source, Path) or text.startswith((".", "/", "~")) or text.endswith(".json") or text.count("/") > 1


def _on_meta(config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} has an encoder and a decoder: use hetegen_compile.plan(model, ...) on a forward of it"
        )
    factory: Any = AutoModelForCausalLM if generates(config) else AutoModel
    try:
        with torch.device("meta"):
            module: nn.Module = factory.from_config(copy.deepcopy(config), dtype=dtype)  # which notes the type there
    except (ValueError, ImportError) as error:
        raise UnsupportedModelError(f"no model of type {config.model_type!r} can be made: {error}") from error
    return module.eval()


def generates(config: Any) -> bool:
    """Whether a config is that of a causal language model.

    BERT and its like have both kinds of head; without ``is_decoder`` they are encoders.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    return type(config) not in MODEL_FOR_MASKED_LM_MAPPING or bool(getattr(config, "is_decoder", False))
