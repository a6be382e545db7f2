"""`PreferenceTrainer` with each loss of pairs: numbers, gradients, references, accumulation, resuming."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import Trainer

from slime_fused import reference
from slime_fused.losses import CPO, DPO, KTO, ORPO, SFT, AlphaPO, Own, PolicyGradient, SimPO, Slime, UnitTerms
from slime_fused.model.reference import REFERENCE_COLUMNS
from slime_fused.trainer import PreferenceConfig, PreferenceTrainer
from slime_fused.trainer.data import PreferenceCollator, prepare_dataset
from slime_fused.trainer.reference import LateReference
from tests.tiny_models import (
    GradientRecorder,
    make_pairs,
    quick_settings,
    require_transformers_adapters,
    tiny_llama,
)
from tests.trainer.test_trainer import losses


def squared(pairs) -> UnitTerms:
    return UnitTerms((pairs.chosen_sum_logps - pairs.ref_chosen_sum_logps - 1) ** 2 - pairs.rejected_mean_logps)


LOSSES = [
    DPO(),
    DPO(loss_type="ipo", nll_weight=0.5, nll_reduction="token"),
    SimPO(),
    CPO(),
    ORPO(),
    ORPO(nll_reduction="token"),
    AlphaPO(),
    KTO(baseline="zero", undesirable_weight=1.5),
    KTO(baseline="batch"),
    Slime(stabilizer_reduction="token"),
    Own(squared, needs=("ref_logps",)),
]


@pytest.fixture
def settings(tmp_path):
    def make(**overrides) -> PreferenceConfig:
        return PreferenceConfig(**quick_settings(tmp_path / "out", **{"max_grad_norm": 0.0, **overrides}))

    return make


def build(tokenizer, args, loss, *, model=None, rows=None, **options):
    recorder = GradientRecorder()
    trainer = PreferenceTrainer(
        tiny_llama(len(tokenizer)) if model is None else model,
        args,
        loss,
        train_dataset=make_pairs(8) if rows is None else rows,
        processing_class=tokenizer,
        callbacks=[recorder],
        **options,
    )
    return trainer, recorder


def by_hand(model, batch, loss, ref_sum_logps=None) -> torch.Tensor:
    """The loss of a whole batch in float64, from the model's own logits."""
    logits = model.double()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    logps = torch.log_softmax(logits[:, :-1], -1)
    logps = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    given = {"desirable": torch.arange(len(targets)) < len(targets) // 2} if isinstance(loss, KTO) else {}
    if ref_sum_logps is not None:
        given["ref_sum_logps"] = ref_sum_logps
    return reference.preference_terms(logps, targets, loss, given).loss, (logps * (targets != -100)).sum(1).detach()


@pytest.mark.parametrize("loss_impl", ["fused", "naive"])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_values_and_gradients_against_the_definition(tokenizer, settings, loss, loss_impl):
    """The second of two steps: the policy has left its reference by then."""
    args = settings(learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", loss_impl=loss_impl)
    trainer, recorder = build(tokenizer, args, loss, rows=make_pairs(4))
    before = tiny_llama(len(tokenizer))
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        _, ref_sums = by_hand(before, batch, Slime())
    needs_reference = "ref_logps" in loss.needs
    assert (REFERENCE_COLUMNS[0] in trainer.train_dataset.column_names) == needs_reference
    if needs_reference:
        torch.testing.assert_close(batch["ref_sum_logps"], ref_sums, rtol=1e-5, atol=1e-5)
    else:
        ref_sums = None
    model = tiny_llama(len(tokenizer))
    for step in range(2):
        value, _ = by_hand(model, batch, loss, ref_sums)
        assert losses(trainer)[step] == pytest.approx(float(value.detach()), rel=1e-4), step
        model.zero_grad()
        value.backward()
        for name, parameter in model.named_parameters():
            got, wanted = recorder.steps[step][name].double(), parameter.grad
            error = float((got - wanted).abs().max())
            assert error <= 1e-3 * float(wanted.abs().max()) + 1e-7, (step, name, error)
            parameter.data -= 0.1 * wanted


def test_a_loss_without_a_reference_runs_none(tokenizer, settings):
    model = tiny_llama(len(tokenizer))
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    for loss, passes in ((SimPO(), 2), (DPO(), 2 + 2)):  # two steps; and 8 pairs in two batches before them
        calls.clear()
        args = settings(check_head=False, per_device_eval_batch_size=4)
        build(tokenizer, args, loss, model=model)[0].train()
        assert len(calls) == passes, loss


# SimPO and AlphaPO are cut up as ORPO is, and SLIME has a test of its own.
CUT_UP = [LOSSES[i] for i in (0, 1, 3, 4, 7, 10)]


@pytest.mark.parametrize("loss", CUT_UP, ids=lambda loss: loss.name)
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(tokenizer, settings, loss):
    runs = []
    for size in (4, 1):
        args = settings(per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, learning_rate=0.02)
        trainer, recorder = build(tokenizer, args, loss)
        trainer.train()
        runs.append((trainer, recorder))
    (whole, expected), (cut, got) = runs
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    for name, grad in expected.steps[1].items():
        torch.testing.assert_close(got.steps[1][name], grad, rtol=2e-3, atol=3e-5 * float(grad.abs().max()))
    for step, (report, wanted) in enumerate(
        zip(cut.state.log_history[:2], whole.state.log_history[:2], strict=True)
    ):
        starts = ("rewards/", "logps", "entropy", "mean_token", f"{loss.name.lower()}/")
        shared = [name for name in wanted if name.startswith(starts)]
        assert len(shared) >= 10 + len(loss.term_names)
        if step == 0 and "ref_logps" in loss.needs:
            shared.remove("rewards/accuracies")  # of margins that are 0 but for rounding
        for name in shared:
            assert report[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name


def test_reported_rewards(tokenizer, settings):
    """DPO and KTO reward the log-ratio, SimPO the mean log-prob; before the first update DPO's ratio is 0."""
    reports = {}
    for loss in (DPO(), KTO(baseline="zero"), SimPO(), Slime()):
        trainer, _ = build(tokenizer, settings(learning_rate=0.05), loss, rows=make_pairs(4))
        trainer.train()
        reports[loss.name] = trainer.state.log_history
    first, second, *_ = reports["DPO"]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    moved = (second["logps_sum/chosen"] - first["logps_sum/chosen"]) * 0.1
    assert abs(moved) > 0.01
    assert second["rewards/chosen"] == pytest.approx(moved, rel=1e-3)
    assert second["rewards/margins"] == pytest.approx(
        second["rewards/chosen"] - second["rewards/rejected"], rel=1e-5
    )
    first, second, *_ = reports["KTO"]
    moved = (second["logps_sum/rejected"] - first["logps_sum/rejected"]) * 0.1
    assert second["rewards/rejected"] == pytest.approx(moved, rel=1e-3)
    report = reports["SimPO"][0]
    assert report["rewards/chosen"] == pytest.approx(2 * report["logps/chosen"], rel=1e-5)
    report = reports["Slime"][0]
    assert report["rewards/rejected"] == report["logps/rejected"]


def test_token_statistics_against_the_logits(tokenizer, settings):
    trainer, _ = build(tokenizer, settings(max_steps=1), SimPO(), rows=make_pairs(4))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    trainer.train()
    targets = batch["labels"][:, 1:]
    logps = torch.log_softmax(logits[:, :-1], -1)[targets != -100]
    report = trainer.state.log_history[0]
    assert report["entropy"] == pytest.approx(float(-(logps.exp() * logps).sum(-1).mean()), rel=1e-5)
    is_top = logps.argmax(-1) == targets[targets != -100]
    assert report["mean_token_accuracy"] == pytest.approx(float(is_top.double().mean()), rel=1e-6)
    quiet, _ = build(tokenizer, settings(max_steps=1, log_token_statistics=False), SimPO())
    quiet.train()
    assert "entropy" not in quiet.state.log_history[0]


LORA = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=True)


def test_the_reference_of_an_adapter_is_the_model_without_it(tokenizer, settings):
    """In advance, and batch by batch of a stream: the same training."""
    rows = make_pairs(8)
    runs = []
    for data in (rows, IterableDataset.from_generator(lambda: iter(rows))):
        args = settings(learning_rate=0.05, train_sampling_strategy="sequential")
        trainer, recorder = build(tokenizer, args, DPO(), rows=data, peft_config=LORA)
        trainer.train()
        runs.append((trainer, recorder))
    (known, expected), (streamed, got) = runs
    assert REFERENCE_COLUMNS[0] in known.train_dataset.column_names
    assert losses(streamed) == pytest.approx(losses(known), rel=1e-5)
    assert abs(losses(known)[1] - 0.6931) > 0.01
    for name, grad in expected.steps[1].items():
        torch.testing.assert_close(got.steps[1][name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
    metrics = known.evaluate(make_pairs(3, seed=4))  # rows that come later: without the adapter, too
    plain = tiny_llama(len(tokenizer))
    batch = known.data_collator(list(known.prepared(make_pairs(3, seed=4), "eval")))
    with torch.no_grad():
        _, ref_sums = by_hand(plain, batch, Slime())
        expected_loss, _ = by_hand(known.model, batch, DPO(), ref_sums)
    assert metrics["eval_loss"] == pytest.approx(float(expected_loss), rel=1e-4)


@pytest.mark.parametrize("options", [{"bf16": True}, {"bf16": True, "loss_impl": "naive"}], ids=["fused", "naive"])
def test_the_reference_in_mixed_precision_is_the_policy_s(tokenizer, settings, options):
    """DPO begins at log 2 where both round alike; with a reference in float32 it is off by 0.004 here."""
    trainer, _ = build(tokenizer, settings(max_steps=1, **options), DPO())
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=2e-3)


def test_an_adapter_that_transformers_has_added(tokenizer, settings):
    model = tiny_llama(len(tokenizer))
    require_transformers_adapters()
    model.add_adapter(LORA)
    trainer, _ = build(tokenizer, settings(learning_rate=0.05), DPO(), model=model)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert abs(losses(trainer)[1] - 0.693147) > 0.01


def test_the_card_names_the_loss(tokenizer, settings):
    trainer, _ = build(tokenizer, settings(), DPO(beta=0.3))
    trainer.train()
    trainer.create_model_card()
    with open(f"{trainer.args.output_dir}/README.md", encoding="utf-8") as file:
        text = file.read()
    assert "with the DPO loss ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290))" in text
    assert "| beta | 0.3 |" in text
    assert "SLIME" not in text


def test_a_resumed_run_has_the_reference_of_the_first(tokenizer, settings, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05}
    whole, _ = build(tokenizer, settings(**options), DPO())
    whole.train()
    again, _ = build(tokenizer, settings(output_dir=str(tmp_path / "again"), **options), DPO())
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert losses(again)[2:] == losses(whole)[2:]
    assert losses(whole)[3] < 0.69
    for name in REFERENCE_COLUMNS:
        assert again.train_dataset[name][:] == whole.train_dataset[name][:]
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [row.get("num_tokens") for row in again.state.log_history] == [
        row.get("num_tokens") for row in whole.state.log_history
    ]


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (None, TypeError, r"loss: expected a value of slime_fused.losses.* got None"),
        ("dpo", TypeError, "loss: expected a loss of slime_fused.losses .* got 'dpo'"),
        (KTO(), ValueError, r"loss: KTO\(baseline='given'\) expected a kl_baseline .* use baseline='batch'"),
        (
            SFT(),
            ValueError,
            r"loss: expected a loss of preferences, got SFT\(.*rejected responses too; take SftTrainer",
        ),
        (PolicyGradient(), ValueError, r"loss: expected a loss of preferences, got PolicyGradient\(.*sampled"),
        (DPO(ld_alpha=0.5), ValueError, "expected a reference's log-prob of every token"),
        (Own(squared, needs=("temperatures",)), ValueError, r"loss: squared expected \['temperatures'\]"),
    ],
)
def test_losses_that_pairs_cannot_serve_are_refused(tokenizer, settings, loss, error, message):
    with pytest.raises(error, match=message):
        build(tokenizer, settings(), loss)


def test_a_reference_that_cannot_be_had_is_refused(tokenizer, settings):
    stream = IterableDataset.from_generator(lambda: iter(make_pairs(8)))
    with pytest.raises(ValueError, match=r"DPO needs a reference's log-probs.*for a stream.*peft_config"):
        build(tokenizer, settings(), DPO(), rows=stream)
    trainer, _ = build(tokenizer, settings(), DPO())
    before = trainer.evaluate(make_pairs(3, seed=4))
    assert before["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    trainer.train()
    late = r"eval_dataset: DPO needs .* been trained since; give .* constructor"
    with pytest.raises(ValueError, match=late):
        trainer.evaluate(make_pairs(3, seed=4))
    trainer.train_dataset = trainer.prepared(make_pairs(3, seed=4), "train")
    with pytest.raises(ValueError, match=late):
        trainer.train()


def test_evaluation_while_training_keeps_the_reference_of_before(tokenizer, settings):
    args = settings(eval_strategy="steps", eval_steps=1, learning_rate=0.05, eval_on_start=True)
    trainer, _ = build(tokenizer, args, DPO(), eval_dataset={"a": make_pairs(8), "b": make_pairs(3, seed=1)})
    trainer.train()
    values = [row["eval_a_loss"] for row in trainer.state.log_history if "eval_a_loss" in row]
    assert values[0] == pytest.approx(0.693147, abs=1e-5)
    assert values[2] < values[1] < values[0]


def with_sums(rows):
    """As TRL's ``precompute_ref_log_probs`` leaves them."""
    return [{**row, "ref_chosen_logps": -3.0 - i, "ref_rejected_logps": -5.25} for i, row in enumerate(rows)]


def test_reference_columns_of_the_rows_are_kept(tokenizer, settings):
    rows = with_sums(make_pairs(4))
    trainer, _ = build(tokenizer, settings(max_steps=1), DPO(), rows=rows, eval_dataset=rows)
    trainer.train()
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        assert dataset["ref_chosen_logps"][:] == [-3.0, -4.0, -5.0, -6.0]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    stream = prepare_dataset(stream, tokenizer, settings(), "train", REFERENCE_COLUMNS)
    assert list(stream) == trainer.train_dataset.to_list()
    batch = trainer.data_collator(list(trainer.train_dataset))
    model = tiny_llama(len(tokenizer))
    value, _ = by_hand(model, batch, DPO(), torch.tensor([-3.0, -4, -5, -6, *[-5.25] * 4]).double())
    assert losses(trainer)[0] == pytest.approx(float(value.detach()), rel=1e-4)
    without, _ = build(tokenizer, settings(), SimPO(), rows=rows)
    assert REFERENCE_COLUMNS[0] not in without.train_dataset.column_names
    with pytest.raises(ValueError, match=r"train_dataset: expected rows with \('ref_chosen.*to fit max_length=12"):
        build(tokenizer, settings(max_length=12), DPO(), rows=rows)
    with pytest.raises(ValueError, match="expected a number in 'ref_chosen_logps' of every row, got None"):
        build(tokenizer, settings(), DPO(), rows=[*rows, {**rows[0], "ref_chosen_logps": None}])


def test_a_reference_is_not_rounded_with_a_batch_of_deepspeed_s(tokenizer, settings, monkeypatch):
    """Its trainer casts what floats in a batch to the engine's 16 bits, in which 301.3 is 302."""
    monkeypatch.setattr(
        Trainer,
        "_prepare_input",
        lambda self, data: {k: v.bfloat16() if torch.is_floating_point(v) else v for k, v in data.items()},
    )
    trainer, _ = build(tokenizer, settings(), DPO(), rows=with_sums(make_pairs(4)))
    batch = {
        "input_ids": torch.tensor([1]),
        "other": torch.ones(1),
        "ref_sum_logps": torch.tensor([301.3]).double(),
    }
    prepared = trainer._prepare_inputs(batch)
    assert prepared["other"].dtype == torch.bfloat16
    assert prepared["ref_sum_logps"].tolist() == batch["ref_sum_logps"].tolist()
    assert prepared["ref_sum_logps"].dtype == torch.float64


def test_a_collator_may_be_replaced(tokenizer, settings):
    expected, _ = build(tokenizer, settings(learning_rate=0.05), DPO())
    expected.train()
    trainer, _ = build(tokenizer, settings(learning_rate=0.05), DPO())
    trainer.data_collator = PreferenceCollator(tokenizer.pad_token_id)
    trainer.train()
    assert losses(trainer) == losses(expected)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_rows_are_grouped_before_a_sharded_model_has_a_reference(tokenizer, settings, strategy):
    trainer, _ = build(tokenizer, settings(train_sampling_strategy=strategy), DPO())
    torch.manual_seed(0)
    expected = list(trainer._get_train_sampler())
    trainer.train_dataset = LateReference(trainer.train_dataset)
    torch.manual_seed(0)
    assert list(trainer._get_train_sampler()) == expected
