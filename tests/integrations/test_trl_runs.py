"""What surrounds the loss in TRL goes on as before: evaluating, saving, resuming, generating; and the reports."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from datasets import IterableDataset
from packaging.version import Version
from transformers import AutoModelForCausalLM

import slime_fused as sf
from slime_fused.integrations.trl import enable_loss, enable_slime
from slime_fused.model.head import attach_head
from tests.integrations.trl_cases import Expected, expected_loss, make_trainer, reports, token_logps
from tests.integrations.trl_worker import train_twice
from tests.processes import run_processes
from tests.tiny_models import make_pairs, tiny_llama

SLIME = sf.SlimeLossConfig()
WORKER = Path(__file__).with_name("trl_worker.py")


def plain_logits(model, inputs):
    return model(**inputs).logits


def test_evaluation_weighs_every_pair_the_same(tokenizer, tmp_path):
    """Five pairs in batches of two, two and one give the numbers of one batch, by hand from the model's logits."""
    trainer = make_trainer(tokenizer, tmp_path)
    enable_slime(trainer)
    found = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(5)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    with torch.no_grad():
        logits = plain_logits(trainer.model, {name: batch[name] for name in ("input_ids", "attention_mask")})[
            :, :-1
        ]
        logits = logits.double()
        loss = expected_loss(trainer.model, batch, SLIME, None, plain_logits)
    logps, mask = token_logps(torch.cat([logits, logits[:, :1]], 1), labels), labels != -100
    sums, counts = logps.sum(1), mask.sum(1)
    means = sums / counts
    log_p = torch.log_softmax(logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    is_top1 = logits.argmax(-1) == labels
    expected = {
        "loss": loss,
        "logps/chosen": sums[:5].mean(),
        "logps/rejected": sums[5:].mean(),
        "mean_logps/chosen": means[:5].mean(),
        "mean_logps/rejected": means[5:].mean(),
        "rewards/chosen": means[:5].mean(),
        "rewards/rejected": means[5:].mean(),
        "rewards/margins": (means[:5] - means[5:]).mean(),
        "rewards/accuracies": (means[:5] > means[5:]).double().mean(),
        "slime/anchor": -SLIME.lambda_w * means[:5].mean(),
        "slime/active_fraction": (means[:5] - means[5:] < SLIME.margin_hard).double().mean(),
        "entropy": entropy[mask].mean(),
        "mean_token_accuracy": is_top1[:5][mask[:5]].double().mean(),
        "logits/chosen": logits.mean(-1)[:5][mask[:5]].mean(),
        "logits/rejected": logits.mean(-1)[5:][mask[5:]].mean(),
    }
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(float(value), rel=2e-5, abs=1e-6), name
    terms = sum(found[f"eval_slime/{name}"] for name in ("anchor", "margin", "stabilizer"))
    assert terms == pytest.approx(found["eval_loss"], rel=1e-5)
    assert all(f"eval_{name}" in found for name in ("num_tokens", "slime/stabilizer"))


def test_training_reports_means_since_the_last_report(tokenizer, tmp_path):
    """Three steps in one report are the mean of three reports; tokens add up over the run."""
    each, together = (make_trainer(tokenizer, tmp_path, logging_steps=n, learning_rate=0.0) for n in (1, 3))
    for trainer in (each, together):
        enable_slime(trainer)
        trainer.train()
    (report,) = reports(together)
    singles = reports(each)
    for name in ("logps/chosen", "mean_logps/rejected", "slime/stabilizer", "rewards/margins"):
        assert report[name] == pytest.approx(sum(row[name] for row in singles) / 3, rel=1e-5), name
    assert report["num_tokens"] == singles[-1]["num_tokens"] > singles[0]["num_tokens"] > 0


@pytest.mark.parametrize("first", ["trl", "slime"])
def test_either_order_of_heads_generates_and_saves_as_before(first, tokenizer, tmp_path):
    """TRL 1.15 and newer patch the model's forward too."""
    model = tiny_llama(len(tokenizer))
    prompt = torch.tensor([[5, 6, 7]])
    logits = model(prompt).logits
    text = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=1)
    if first == "slime":
        attach_head(model)
    trainer = make_trainer(tokenizer, tmp_path, model)
    enable_slime(trainer)
    torch.testing.assert_close(model(prompt).logits, logits, rtol=0, atol=0)
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=1), text)
    expected = Expected(trainer, SLIME)
    trainer.train()
    expected.check()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_a_resumed_run_is_the_same_to_the_bit(tokenizer, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = make_trainer(tokenizer, tmp_path, **options)
    enable_slime(whole)
    whole.train()
    rest = make_trainer(tokenizer, tmp_path, tiny_llama(len(tokenizer), seed=9), **options)
    enable_slime(rest)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rest.state.global_step == 4
    for (name, value), (_, expected) in zip(
        rest.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(value, expected), name
    assert [row["loss"] for row in reports(rest)] == [row["loss"] for row in reports(whole)]
    card = (tmp_path / "README.md").read_text()
    assert "trained with Slime" in card
    assert "2602.02383" in card


@pytest.mark.parametrize("name", ["dpo", "slime"])
def test_gradient_checkpointing(name, tokenizer, tmp_path):
    """On by default in TRL."""
    loss = {"dpo": sf.losses.DPO(beta=0.3), "slime": SLIME}[name]
    plain = tiny_llama(len(tokenizer))
    trainer = make_trainer(tokenizer, tmp_path, ref_model="copy", gradient_checkpointing=True)
    enable_loss(trainer, loss)
    expected = Expected(trainer, loss, lambda inputs: plain(**inputs).logits)
    trainer.train()
    expected.check()


def test_the_way_round_the_hook_is_closed(tokenizer, tmp_path):
    """Up to TRL 1.13 ``use_liger_kernel=True`` sends the loss through another method, with this attribute."""
    trainer = make_trainer(tokenizer, tmp_path)
    trainer.use_liger_kernel = True
    enable_slime(trainer)
    expected = Expected(trainer, SLIME)
    trainer.train()
    expected.check()


def test_the_reference_model_is_freed(tokenizer, tmp_path):
    model = tiny_llama(len(tokenizer), seed=2)
    trainer = make_trainer(tokenizer, tmp_path, ref_model=model)
    watched = weakref.ref(model)
    del model
    enable_slime(trainer)
    gc.collect()
    assert trainer.ref_model is None
    assert watched() is None


def test_a_cached_reference_is_used_and_freed(tokenizer, tmp_path):
    plain = tiny_llama(len(tokenizer))
    trainer = make_trainer(tokenizer, tmp_path, ref_model="copy")
    loss = sf.losses.DPO(beta=0.5)
    enable_loss(trainer, loss, cache_reference=True)
    assert trainer.ref_model is None
    expected = Expected(trainer, loss, lambda inputs: plain(**inputs).logits)
    trainer.train()
    expected.check()
    assert trainer.evaluate()["eval_loss"] > 0
    bare = trainer.eval_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    with pytest.raises(
        ValueError, match=r"eval_dataset: DPO expected the columns ref_chosen_logps and .* in every"
    ):
        trainer.evaluate(bare)


def test_trls_own_columns_of_the_reference_are_used(tokenizer, tmp_path):
    """And not by a loss without a reference, which evaluates other data, too, without a pass of one."""
    plain = tiny_llama(len(tokenizer))
    loss = sf.losses.DPO(beta=0.5)
    trainer = make_trainer(tokenizer, tmp_path / "dpo", ref_model="copy", precompute_ref_log_probs=True)
    enable_loss(trainer, loss)
    trainer.ref_model = None
    expected = Expected(trainer, loss, lambda inputs: plain(**inputs).logits)
    trainer.train()
    expected.check()

    slime = make_trainer(tokenizer, tmp_path / "slime", ref_model="copy", precompute_ref_log_probs=True)
    enable_slime(slime)
    expected = Expected(slime, SLIME)
    slime.train()
    expected.check()
    tokens = slime.eval_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    assert slime.evaluate(tokens)["eval_loss"] == pytest.approx(slime.evaluate()["eval_loss"], rel=1e-6)


def test_a_stream_of_rows(tokenizer, tmp_path):
    rows = IterableDataset.from_generator(lambda: iter(make_pairs(12)))
    streamed = make_trainer(tokenizer, tmp_path, train_dataset=rows)
    enable_slime(streamed)
    expected = Expected(streamed, SLIME)
    streamed.train()
    expected.check()


@pytest.fixture
def precision_of_its_own(monkeypatch):
    """Before transformers 5 a precision stays in the process for whatever is trained next."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("precision_of_its_own")
def test_mixed_precision_starts_at_the_reference(tokenizer, tmp_path):
    """Policy and reference round alike: while they are one model every reward is exactly 0."""
    trainer = make_trainer(tokenizer, tmp_path, ref_model="copy", bf16=True, max_steps=1)
    enable_loss(trainer, sf.losses.DPO())
    trainer.train()
    (report,) = reports(trainer)
    assert report["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert report["rewards/chosen"] == report["rewards/rejected"] == 0.0


@pytest.mark.parametrize("source", ["config", "args"])
def test_the_load_balancing_loss_of_experts_is_added(source, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
        output_router_logits=source == "config",
        router_aux_loss_coef=0.5,
        attn_implementation="eager",
    )
    options = {} if source == "config" else {"router_aux_loss_coef": 0.25}
    model = transformers.MixtralForCausalLM(config)
    try:
        trainer = make_trainer(tokenizer, tmp_path, model, max_steps=1, **options)
    except TypeError:
        pytest.skip("this TRL has no router_aux_loss_coef")
    enable_slime(trainer)
    # The model's own by default, but in some releases a default of TRL's.
    coefficient = getattr(trainer, "router_aux_loss_coef", 0.5)
    assert source == "config" or coefficient == 0.25
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    trainer.model.train()
    aux = model(**inputs, output_router_logits=True).aux_loss.double()
    expected = expected_loss(model, batch, SLIME, None, plain_logits) + coefficient * aux
    parameters = dict(model.named_parameters())
    truth = torch.autograd.grad(expected, list(parameters.values()))
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)
    for (name, _), value, gradient in zip(
        parameters.items(), truth, torch.autograd.grad(loss, list(parameters.values())), strict=True
    ):
        floor = 2e-5 * float(value.abs().max()) + 1e-7
        torch.testing.assert_close(gradient, value, rtol=2e-3, atol=floor, msg=lambda m, n=name: f"{n}: {m}")
    trainer.train()
    (report,) = reports(trainer)
    parts = sum(report[f"slime/{name}"] for name in ("anchor", "margin", "stabilizer"))
    reported = coefficient if hasattr(trainer, "router_aux_loss_coef") else 1.0  # TRL 1.0 and older know none
    assert report["loss"] == pytest.approx(parts + reported * report["aux_loss"], rel=1e-4)


def test_predictions_are_the_models_logits(tokenizer, tmp_path):
    """By a forward of their own, as TRL's; the last evaluation's means are not mixed with what was predicted."""
    trainer = make_trainer(tokenizer, tmp_path)
    enable_slime(trainer)
    before = trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset)
    expected = make_trainer(tokenizer, tmp_path, ref_model="copy").predict(trainer.eval_dataset)
    assert (predicted.predictions == expected.predictions).all()
    after = trainer.evaluate()
    assert after["eval_slime/anchor"] == before["eval_slime/anchor"]


def read_results(folder: Path):
    return torch.load(folder / "gradients.pt"), json.loads((folder / "reports.json").read_text())


def test_columns_of_the_reference_stay_exact(tokenizer, tmp_path, monkeypatch):
    """Under DeepSpeed in 16 bits the base trainer casts every number of a batch."""
    trainer = make_trainer(tokenizer, tmp_path, ref_model="copy")
    enable_loss(trainer, sf.losses.DPO(beta=0.3), cache_reference=True)
    plain = transformers.Trainer._prepare_input

    def rounded(self, data):
        data = plain(self, data)
        return data.bfloat16() if isinstance(data, torch.Tensor) and data.is_floating_point() else data

    monkeypatch.setattr(transformers.Trainer, "_prepare_input", rounded)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    prepared = trainer._prepare_inputs(batch)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert prepared[name].tolist() == batch[name].tolist()


def test_the_log_probs_of_the_reference_stay_exact(tokenizer, tmp_path):
    """FSDP2 with mixed precision rounds what leaves a model; before a step DPO is log 2 all the same."""
    trainer = make_trainer(tokenizer, tmp_path, ref_model="copy", max_steps=1)
    enable_loss(trainer, sf.losses.DPO(beta=0.3))

    def rounded(model, args, output):
        return {name: x.bfloat16() for name, x in output.items()} if type(output) is dict else output

    for model in (trainer.model, trainer.ref_model):
        model.register_forward_hook(rounded)
    trainer.train()
    # transformers 4 reports four digits; rounded log-probs gave 0.6828.
    assert reports(trainer)[0]["loss"] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.slow
def test_two_processes_step_as_one(tmp_path):
    """Gradients, reports and an evaluation of five pairs, of which one process gets one twice; FSDP2 too."""
    one, two, sharded = folders = [tmp_path / name for name in ("one", "two", "sharded")]
    for folder in folders:
        folder.mkdir()
    has_fsdp = Version(accelerate.__version__) >= Version("1.15")
    run_processes([str(WORKER), str(two), *([str(sharded)] if has_fsdp else [])], 2, two)
    train_twice(one, batch_size=4, accumulation=1)
    expected, (expected_steps, expected_evaluation) = read_results(one)
    gradients, _ = read_results(two)
    assert len(gradients) == len(expected) == 4
    for step, expected_step in zip(gradients, expected, strict=True):
        for name, value in expected_step.items():
            floor = 2e-5 * float(value.abs().max())
            torch.testing.assert_close(step[name], value, rtol=2e-3, atol=floor, msg=lambda m, n=name: f"{n}: {m}")
    for folder in folders[1:] if has_fsdp else [two]:
        _, (steps, evaluation) = read_results(folder)
        for found, truth in [*zip(steps, expected_steps, strict=True), (evaluation, expected_evaluation)]:
            assert "grad_norm" in found or found is evaluation
            for name, value in truth.items():
                # Where margins are 0 but for rounding, rounding decides how many are above it.
                is_noise = name == "rewards/accuracies" and abs(truth["rewards/margins"]) < 1e-6
                if not is_noise and not name.endswith(("_time", "_runtime", "_per_second")):
                    assert found[name] == pytest.approx(value, rel=2e-4, abs=1e-5), (folder.name, name)
