"""Hugging Face Trainer: a wrapped model and one compiled in place; outputs are ModelOutputs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import grapefx
from grapefx.runtime.module import FeedbackModule

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")


class Sentences(Dataset[dict[str, Tensor]]):
    """The class is the first token's parity."""

    def __init__(self, lm: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, 30, (64, 6), generator=generator)
        if lm:
            self.ids[:, 1:] = self.ids[:, :1]
        self.labels = self.ids if lm else self.ids[:, 0] % 2

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def trainer(model: Any, folder: Path, data: Dataset[Any], **arguments: Any) -> Any:
    settings = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=16, learning_rate=1e-2,
        report_to=[], use_cpu=True, logging_steps=4, disable_tqdm=True,
        **{"save_strategy": "no", "num_train_epochs": 5, **arguments},
    )  # fmt: skip
    return transformers.Trainer(model, settings, train_dataset=data, eval_dataset=data)


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
def test_trainer_trains_bert(inplace: bool, tmp_path: Path) -> None:
    model: Any = grapefx.compile(bert(), method="grape", backend="eager", inplace=inplace)  # type: ignore[call-overload]
    net: FeedbackModule = model.grapefx if inplace else model

    class SetEpoch(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            net.set_epoch(round(state.epoch or 0))

    run = trainer(model, tmp_path, Sentences(False))
    run.add_callback(SetEpoch())
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.8 * before
    state = net.feedback_state_dict()["schedule"]
    assert state["step"] == 20 and state["epoch"] == 4 and state["calibrations"] == 5
    assert len([p for p in net._captures.programs.values() if p.plan is not None]) == 1
    run.save_model(str(tmp_path / "model"))
    other = bert()  # the files are those of the plain model
    from safetensors.torch import load_file

    other.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))


def test_the_wrapper_looks_like_its_model() -> None:
    """What Trainer reads: config, the signature of forward on class and object, methods."""
    model = gpt2()
    net = grapefx.compile(model, backend="eager")
    assert net.config is model.config and net.main_input_name == "input_ids"
    assert inspect.signature(net.forward) == inspect.signature(model.forward)
    assert inspect.signature(type(net).forward) == inspect.signature(type(model).forward)
    assert "labels" in transformers.utils.find_labels(type(net))
    assert net.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("inplace", [False, True])
def test_generate_and_model_outputs(inplace: bool) -> None:
    model: Any = grapefx.compile(gpt2(), backend="eager", method="bp", inplace=inplace)  # type: ignore[call-overload]
    plain, ids = gpt2(), torch.randint(2, 30, (3, 4))
    text = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.eval().generate(ids, **text), plain.eval().generate(ids, **text))
    results = []
    for m in (model.train(), plain.train()):
        out = m(input_ids=ids, labels=ids, use_cache=False)
        assert isinstance(out, transformers.utils.ModelOutput)
        assert out.logits.shape == (3, 4, 30)
        out.loss.backward()
        results.append((out.loss.detach(), m.transformer.h[0].attn.c_attn.weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_accelerate_mixed_precision() -> None:
    """It replaces ``forward`` on the object by one under autocast."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one a process
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    net = grapefx.compile(gpt2(), backend="eager", method="grape", calib_every=None)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    model, optimizer = accelerator.prepare(net, optimizer)
    ids = Sentences(True).ids[:16]
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        out = model(input_ids=ids, labels=ids, use_cache=False)
        accelerator.backward(out.loss)
        optimizer.step()
        losses.append(float(out.loss))
    assert out.logits.dtype == torch.float32  # accelerate converts outputs back
    assert losses[-1] < losses[0]
    assert any(key[-1] is torch.bfloat16 for key in net._captures.programs)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
