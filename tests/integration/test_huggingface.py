"""Hugging Face Trainer: a wrapped model and one compiled in place; outputs are ModelOutputs."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import grapefx
from grapefx.errors import OptionError, StateError
from grapefx.runtime.module import FeedbackModule

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from grapefx.integrations.huggingface import FILE, FeedbackCallback, attach  # noqa: E402


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
        use_cpu=True, disable_tqdm=True,
        **{
            "save_strategy": "no", "num_train_epochs": 5, "logging_steps": 4, "report_to": [],
            **arguments,
        },
    )  # fmt: skip
    return transformers.Trainer(model, settings, train_dataset=data, eval_dataset=data)


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
def test_trainer_trains_bert(inplace: bool, tmp_path: Path) -> None:
    model: Any = grapefx.compile(
        bert(), method="grape", calib_every=1, backend="eager", inplace=inplace
    )  # type: ignore[call-overload]
    net: FeedbackModule = model.grapefx if inplace else model
    run = trainer(model, tmp_path, Sentences(False))
    attach(run)
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


class Tiny(nn.Module):
    """What the Trainer asks of a model, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.hidden = nn.Linear(16, 16)
        self.out = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.out(torch.tanh(self.hidden(torch.tanh(self.embed(input_ids[:, 0])))))
        found = {"logits": logits}
        if labels is not None:
            found = {"loss": nn.functional.cross_entropy(logits, labels), **found}
        return found


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def run_of(folder: Path, epochs: int, inplace: bool = False, **arguments: Any) -> Any:
    model = grapefx.compile(tiny(), method="grape", calib_every=1, backend="eager", inplace=inplace)  # type: ignore[call-overload]
    settings = {"num_train_epochs": epochs, "save_strategy": "epoch", "logging_steps": 2}
    settings |= {"lr_scheduler_type": "constant"}
    return trainer(model, folder, Sentences(False), **{**settings, **arguments})


def net_of(run: Any) -> FeedbackModule:
    return run.model if isinstance(run.model, FeedbackModule) else run.model.grapefx  # type: ignore[no-any-return]


@pytest.mark.parametrize("inplace", [False, True])
def test_checkpoints_resume_the_learning_state(inplace: bool, tmp_path: Path) -> None:
    whole = run_of(tmp_path / "a", 3, inplace)
    attach(whole)
    whole.train()
    half = run_of(tmp_path / "b", 2, inplace)
    attach(half)
    half.train()
    again = run_of(tmp_path / "b", 3, inplace)
    attach(again)
    again.train(resume_from_checkpoint=True)
    for k, v in net_of(whole).feedback.items():
        torch.testing.assert_close(net_of(again).feedback[k], v)
    state = net_of(again).feedback_state_dict()["schedule"]
    assert state == net_of(whole).feedback_state_dict()["schedule"]
    assert (state["step"], state["epoch"], state["calibrations"]) == (12, 2, 3)
    losses = [[r["loss"] for r in run.state.log_history if "loss" in r] for run in (whole, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_resumed_run_without_its_learning_state_is_refused(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", 1)
    attach(first)
    first.train()
    elsewhere = tmp_path / "a" / "checkpoint-4"
    moved = run_of(tmp_path / "b", 2)
    attach(moved)
    with pytest.raises(StateError, match=r"there is no(.|\n)*resume_from"):
        moved.train(resume_from_checkpoint=str(elsewhere))
    named = run_of(tmp_path / "b", 2)
    attach(named, resume_from=elsewhere)
    named.train(resume_from_checkpoint=str(elsewhere))
    assert net_of(named).calibrations == 2
    # a folder of the same name from another run
    other = run_of(tmp_path / "c", 1)
    attach(other)
    other.train()
    wrong = run_of(tmp_path / "c", 2)
    attach(wrong)
    with pytest.raises(StateError, match="another run"):
        wrong.train(resume_from_checkpoint=str(elsewhere))
    (elsewhere / FILE).unlink()


def test_loggers_get_the_alignment(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "tb")
    try:
        run = run_of(tmp_path, 2, save_strategy="no", report_to=["tensorboard"])
        attach(run)
        run.train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    found: dict[str, list[float]] = {}
    for file in (tmp_path / "tb").rglob("events*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [s.value for s in events.Scalars(tag)]
    for layer, cosines in net_of(run).alignment().items():
        for kind, value in cosines.items():
            assert found[f"train/grapefx/{kind}/{layer}"][-1] == pytest.approx(value, abs=1e-6)
    assert found["train/grapefx/calibrations"] == [1, 1, 2, 2]
    logged = [r for r in run.state.log_history if "loss" in r]
    assert all("grapefx/cos_gradient/mean" in r for r in logged)


def test_what_is_not_compiled_is_refused(tmp_path: Path) -> None:
    run = trainer(tiny(), tmp_path, Sentences(False))
    with pytest.raises(OptionError, match="nothing in this Tiny was compiled"):
        attach(run)
    run.add_callback(FeedbackCallback())
    with pytest.raises(OptionError, match="nothing in this"):
        run.train()


def test_the_wrapper_looks_like_its_model() -> None:
    """What Trainer reads: config, the signature of forward on class and object, methods."""
    model = gpt2()
    net = grapefx.compile(model, backend="eager", calib_every=1)
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
    assert net.plan is not None
    values = [n.meta.get("val") for n in net.plan.joint.gm.graph.nodes]
    assert any(isinstance(v, Tensor) and v.dtype is torch.bfloat16 for v in values)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
