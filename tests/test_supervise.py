"""Supervised learning on solutions: its loss, its resumption, and the folder that it leaves."""

import itertools
import json
import math
import signal
import sys

import pytest
import torch
from forked import at, fingerprint, fork, output_of, wait
from safetensors.torch import load_file

from pspo import checkpoint, dataset, model
from pspo import supervise as command
from pspo.base.schema import ConfigError
from pspo.config import compose_tree
from pspo.model import tiny, warm_start
from pspo.model.batch import make_batch
from pspo.status.state import collect
from pspo.supervise import SuperviseConfig, cli, supervise

CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path, tiny_policy):
    """A folder with a model and twelve problems with solutions."""
    model.save(tiny_policy(attention="sdpa"), tmp_path / "base")
    rows = [{"question": f"{n}+4=?", "answer": n + 4, "solution": f"{n}+4={n + 4}"} for n in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def arguments(place, *overrides):
    return [
        "model=hf", f"model.path={place / 'base'}", "model.autocast=false", "dataset=jsonl", "dataset.num_validation=3",
        f"dataset.path={place / 'train.jsonl'}", "dataset.system_prompt=", "supervise.epochs=4", "threads=1",
        "tracker=jsonl", "supervise.batch_size=4", "optimizer.lr=1e-2", "optimizer.warmup_steps=2",
        f"output_dir={place / 'outputs'}",
        *overrides,
    ]  # fmt: skip


def settings(place, *overrides):
    return compose_tree("supervise", SuperviseConfig, arguments(place, *overrides))


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# --- the loss


def texts(policy):
    ids = policy.tokenizer
    pairs = [("1+1=", "2"), ("Tom has 3 apples", "3+4=7\n#### 7"), ("12*5=", "60"), ("How many?", "#### 12")]
    return [(ids.encode(prompt), [*ids.encode(answer), ids.eos_token_id]) for prompt, answer in pairs]


def batches(policy, *parts):
    return [make_batch([(prompt, [answer]) for prompt, answer in part], policy.pad_id, CPU) for part in parts]


def test_the_loss_is_the_librarys_cross_entropy_of_the_answers_tokens(tiny_policy):
    policy = tiny_policy(torch.float64, attention="sdpa")
    total, num_tokens = 0.0, 0
    for prompt, answer in texts(policy):
        labels = torch.tensor([[-100] * len(prompt) + answer])
        total += policy.model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.item() * len(answer)
        num_tokens += len(answer)
    loss = warm_start.mean_loss(policy.model, batches(policy, texts(policy)), autocast=False)
    assert loss == pytest.approx(total / num_tokens, rel=1e-5)


def test_a_step_does_not_depend_on_its_micro_batches(tiny_policy):
    def learned(*cuts):
        policy = tiny_policy(torch.float64, exact=True)
        optimizer = torch.optim.SGD(policy.model.parameters())
        rows = texts(policy)
        parts = [rows[start:end] for start, end in itertools.pairwise(cuts)]
        steps = [(batches(policy, *parts), 0.5)]
        (loss,) = warm_start.train(policy.model, optimizer, steps, autocast=False, max_norm=math.inf)
        return loss, torch.cat([p.detach().flatten() for p in policy.model.parameters()])

    (loss, weights), (cut_loss, cut_weights) = learned(0, 4), learned(0, 1, 3, 4)
    assert cut_loss == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(cut_weights, weights, rtol=0, atol=1e-12)


def test_a_loss_that_is_no_number_changes_no_weight(tiny_policy):
    policy = tiny_policy(attention="sdpa")
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[0, 0] = torch.nan
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = torch.optim.AdamW(policy.model.parameters())
    steps = [(batches(policy, texts(policy)), 0.1)]
    with pytest.raises(FloatingPointError, match="the optimizer step was not taken"):
        list(warm_start.train(policy.model, optimizer, steps, autocast=False, max_norm=1.0))
    assert all(torch.equal(p.nan_to_num(7), before[name].nan_to_num(7)) for name, p in policy.model.named_parameters())


# --- the command


def test_it_learns_and_leaves_the_best_epochs_model(place):
    directory = supervise(settings(place))
    rows = metrics(directory)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["budget/optimizer_steps"] == 12  # nine training problems in batches of four
    losses = [row["supervise/validation_loss"] for row in rows]
    assert rows[-1]["supervise/train_loss"] < rows[1]["supervise/train_loss"] < losses[0]
    assert rows[-1]["optimizer/lr"] == pytest.approx(1e-2 * (1 - 11 / 12) / (1 - 2 / 12))
    best = json.loads((directory / "summary.json").read_text())["selected_step"]
    assert losses[best] == min(losses)
    assert "supervised, seed 0, 4 steps" in (directory / "report.html").read_text()
    assert (directory / "DONE").is_file()
    (status,) = collect(directory.parent).rows
    assert (status.state, status.done, status.budget, status.unit) == ("done", 4, 4, "steps")
    assert supervise(settings(place)) == directory  # and nothing is done
    assert metrics(directory) == rows
    policy = model.load(settings(place, f"model.path={directory / 'model'}").model, 0, CPU)
    prompts, _ = dataset.encode(
        policy.tokenizer, settings(place).dataset, dataset.load(settings(place).dataset, 0).validation
    )
    pairs = [
        (row.prompt_ids, row.token_ids)
        for row in command.solution_rows(policy.tokenizer, prompts, settings(place).dataset)
    ]
    loss = warm_start.mean_loss(policy.model, batches(policy, pairs), autocast=False)
    assert loss == pytest.approx(losses[best], rel=1e-5)


def test_the_last_epoch_needs_no_validation(place):
    directory = supervise(settings(place, "selection=last", "dataset.num_validation=0", "supervise.epochs=1"))
    assert [row["step"] for row in metrics(directory)] == [0, 1]
    trained = torch.load(directory / "checkpoints" / "step_000001" / "state.pt", weights_only=True)["weights"]
    saved = load_file(directory / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in trained.items())


NAMED = ("config.yaml", "overrides.yaml")  # files that name the directory
HOOKS = {
    "before any checkpoint": at(checkpoint, "save", 1, signal.SIGKILL),
    "in a validation": at(command, "mean_loss", 4, signal.SIGKILL),
    "at the very end": at(model, "save", 1, signal.SIGKILL),
    "between two steps": at(warm_start, "token_logprobs", 7, signal.SIGTERM),
}


@pytest.mark.process
def test_a_killed_run_resumes_to_the_bytes_of_an_unbroken_one(place):
    def make(folder, hook=None):
        config = settings(place, f"output_dir={place / folder}")
        return wait(fork(place / folder, place / "cache", work=lambda: supervise(config), hook=hook))

    def found(folder):
        (directory,) = (place / folder / "supervised").glob("supervised_*")
        files = {name: digest for name, digest in fingerprint(directory).items() if name not in NAMED}
        return "DONE" in files, files

    assert make("unbroken") == 0, output_of(place / "unbroken")
    for when, hook in HOOKS.items():
        assert make(when, hook) in (-9, 143), when
        assert not found(when)[0]
        assert make(when) == 0, output_of(place / when)
        assert found(when) == found("unbroken"), when


def test_solutions_stand_behind_the_prompts_of_reinforcement_learning(place):
    def shown(*overrides):
        config = settings(place, *overrides)
        prompts, _ = dataset.encode(encoder, config.dataset, dataset.load(config.dataset, 0).train)
        row, prompt = command.solution_rows(encoder, prompts, config.dataset)[0], prompts[0]
        assert row.prompt_ids == prompt.token_ids
        return encoder.decode(row.token_ids).replace(prompt.problem.solution, "SOLUTION")

    encoder = tiny.train_tokenizer(["3+4=7"], 128)
    assert shown() == "SOLUTION<|end|>"
    assert shown("dataset.prompt='Q: {question} A:'") == " SOLUTION<|end|>"
    encoder.chat_template = encoder.chat_template.replace("<|end|>", "<|system|>")
    assert shown() == "SOLUTION<|system|>"  # the template's end of a turn
    encoder.chat_template = None
    assert shown() == " SOLUTION<|end|>"


def test_what_cannot_be_learned_is_one_sentence(place, monkeypatch, capsys):
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    (place / "train.jsonl").write_text("".join(json.dumps(row | {"solution": ""}) + "\n" for row in rows))
    for wrong, told in (
        ([], "dataset=jsonl has no solutions to learn from; choose gsm8k"),
        (["supervise.epochs=0"], "supervise.epochs must be in [1, inf), got 0"),
        (["supervise.epoch=3"], "unknown key supervise.epoch (did you mean supervise.epochs?)"),
        ([f"model.path={place / 'nothing'}"], "does not exist"),
    ):
        monkeypatch.setattr(sys, "argv", ["pspo.supervise", *arguments(place, *wrong)])
        with pytest.raises(SystemExit) as left:
            cli()
        assert left.value.code == 2
        assert told in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
    with pytest.raises(ConfigError, match="dataset=asdiv is a test set"):
        supervise(settings(place, "dataset=asdiv", "dataset.path=null", "selection=last", "dataset.num_validation=0"))
    assert not (place / "outputs").exists()


def test_a_learning_rate_that_breaks_the_weights_at_the_last_step_stops_the_run(place):
    """No further loss would show it, and the broken weights would be the last checkpoint."""
    one_step = ["supervise.epochs=1", "supervise.batch_size=9", "optimizer.warmup_steps=0", "optimizer.decay=constant"]
    with pytest.raises(FloatingPointError, match=r"learning rate 1e\+39 made weights that are not finite; lower it"):
        supervise(settings(place, *one_step, "optimizer.lr=1e39"))
    (directory,) = (place / "outputs" / "supervised").glob("supervised_*")
    assert not list(directory.glob("checkpoints/step_000001"))
