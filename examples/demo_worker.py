"""One measurement of the demo, in a process of its own so that its peak memory is its own.

    python demo_worker.py prepare MODEL FOLDER
    python demo_worker.py head    MODEL PAIRS --impl fused --pairs 2 --max-length 192
    python demo_worker.py train   MODEL PAIRS --impl fused --pairs 2 --max-length 192 --steps 8 --seconds 120

Prints one JSON object per line: {"event": "progress", ...} while it runs and {"event": "result", ...} at the end.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.utils import logging

import slime_fused
from slime_fused.trainer import PreferenceCollator, SlimeConfig, SlimeTrainer, load_model, load_tokenizer
from slime_fused.trainer.data import prepare_dataset
from slime_fused.trainer.losses import naive_loss
from slime_fused.trainer.reading import read_pairs

HELD_OUT = 6
"""Pairs kept back to evaluate on before and after training."""


def say(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


def memory_now() -> int:
    """Resident bytes of this process."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return memory_peak()


def memory_peak() -> int:
    """Most resident bytes since `reset_peak`, or since the start where the system cannot reset it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def load_resident(path: str) -> Any:
    """The model with its weights copied into memory: pages of a mapped file come and go and blur the numbers."""
    model = load_model(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def prepare(args: argparse.Namespace) -> None:
    """Turn a model file into a folder that the other workers load in a moment."""
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    model.save_pretrained(args.pairs_or_folder)
    tokenizer.save_pretrained(args.pairs_or_folder)
    say("result", parameters=model.num_parameters(), vocab=model.config.vocab_size, hidden=model.config.hidden_size)


def settings(args: argparse.Namespace, folder: str) -> SlimeConfig:
    return SlimeConfig(
        output_dir=folder,
        loss_impl=args.impl,
        per_device_train_batch_size=args.pairs,
        per_device_eval_batch_size=args.pairs,
        max_length=args.max_length,
        truncation="keep_start",
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        max_steps=args.steps,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )


def head(args: argparse.Namespace) -> None:
    """Output head and loss alone, forward and backward, on hidden states and labels of a real batch's shape."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(args, folder)
    weight = load_model(args.model).get_output_embeddings().weight.detach().clone().requires_grad_()
    tokenizer = load_tokenizer(args.model)
    rows = read_pairs(args.pairs_or_folder).select(range(4 * args.pairs))
    tokens = prepare_dataset(rows, tokenizer, config, "demo").select(range(args.pairs))
    batch = PreferenceCollator(tokenizer.pad_token_id)(list(tokens))
    labels = batch["labels"]
    torch.manual_seed(0)
    hidden = torch.randn(*labels.shape, weight.shape[1]).mul_(2.0).requires_grad_()

    def step() -> float:
        hidden.grad = weight.grad = None
        if args.impl == "fused":
            loss = slime_fused.slime_loss(hidden, weight, labels, config=config.loss_config(), shift=True).loss
        else:
            loss = naive_loss(torch.nn.functional.linear(hidden, weight), labels, config.loss_config())["loss"]
        loss.backward()
        return float(loss)

    before = memory_now()
    reset_peak()
    times = []
    for repeat in range(args.steps):
        start = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - start)
        say("progress", done=repeat + 1)
    seconds = min(times)
    say(
        "result",
        loss=loss,
        seconds=seconds,
        positions=labels.numel(),
        targets=int((labels[:, 1:] != -100).sum()),
        tokens_per_second=int(batch["attention_mask"].sum()) / seconds,
        memory=memory_peak() - before,
    )


class Watch(TrainerCallback):
    """Times the steps, reports them, and stops when the time is up."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.times: list[float] = []
        self.began = self.step_began = 0.0
        self.memory_before = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()
        self.memory_before = memory_now()
        reset_peak()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter() - self.step_began)
        if time.perf_counter() - self.began + statistics.median(self.times) > self.seconds:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            say("progress", done=state.global_step, loss=logs["loss"], margin=logs["rewards/margins"])


def train(args: argparse.Namespace) -> None:
    """Whole optimizer steps on a LoRA adapter: model, head, loss, backward, AdamW.

    An adapter as most people train one, with the head frozen: the weights' own gradients and AdamW's copies of them
    would hide everything else on a model this small.
    """
    pairs = read_pairs(args.pairs_or_folder)
    held_out = pairs.select(range(HELD_OUT)) if args.evaluate else None
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(args.seconds)
        trainer = SlimeTrainer(
            load_resident(args.model),
            settings(args, folder),
            train_dataset=pairs.select(range(HELD_OUT, len(pairs))),
            eval_dataset=held_out,
            processing_class=load_tokenizer(args.model),
            callbacks=[watch],
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        )
        evaluations = [trainer.evaluate()] if args.evaluate else []
        trainer.train()
        peak = memory_peak()
        evaluations += [trainer.evaluate()] if args.evaluate else []
        if args.save:
            trainer.save_model(args.save)
    reports = [entry for entry in trainer.state.log_history if "loss" in entry]
    # The first step also warms up caches and checks the head.
    rates = [r["num_tokens"] / t for r, t in zip(reports, watch.times, strict=True)][1:]
    say(
        "result",
        losses=[entry["loss"] for entry in reports],
        history=trainer.state.log_history,
        tokens_per_second=statistics.median(rates or [reports[0]["num_tokens"] / watch.times[0]]),
        seconds=statistics.median(watch.times[1:] or watch.times),
        memory=peak - watch.memory_before,
        memory_of_process=peak,
        evaluations=evaluations,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["prepare", "head", "train"])
    parser.add_argument("model")
    parser.add_argument("pairs_or_folder")
    parser.add_argument("--impl", choices=["fused", "naive"], default="fused")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--save", default="")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    {"prepare": prepare, "head": head, "train": train}[args.what](args)


if __name__ == "__main__":
    main()
