"""Log-probabilities over 152k tokens, forward and backward: ``python -m benchmarks.logprob [rounds] [--small]``.

A random model of width 64 and two layers reads 32 completions of 256 tokens; peak memory over what the process held
before, and seconds. ``plain`` is ``log_softmax`` of all logits, 15 GB; ``trl`` is the head that TRL's trainer puts on
the model, with the entropies that it asks for; ours gives those as well. Each round is a process of its own for each,
in turns; the first pass is measured for memory, the second for time. ``--small``: an eighth of the completions.
"""

import argparse
import functools
import json
from collections.abc import Callable

import torch

from benchmarks import measure
from benchmarks.preset import PRESETS, random_policy
from pspo.config import compose
from pspo.host import environment, speed
from pspo.host.memory import call_peak_gib
from pspo.model.batch import make_batch
from pspo.model.logprob import predicting_states, token_logprobs

ROWS, LENGTH = 32, 256


def make_pass(side: str, rows: int) -> Callable[[], None]:
    """Forward and backward of the sum of the log-probabilities of completions behind a prompt of one token."""
    preset = PRESETS["vocab"]
    assert preset.shape is not None
    config, device = compose(preset.overrides), torch.device("cpu")
    policy = random_policy(config, preset.shape, device)
    ids = torch.randint(preset.shape["vocab_size"], (rows, 1 + LENGTH))
    model = policy.model
    if side == "ours":
        batch = make_batch([(row[:1], [row[1:]]) for row in ids.tolist()], policy.pad_id, device)
        decoder = model.get_decoder()
        return lambda: token_logprobs(model, batch, predicting_states(decoder, batch), 1.0, False)[0].sum().backward()
    model.set_attn_implementation("sdpa")
    if side == "plain":
        target = ids[:, 1:, None]
        return lambda: model(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(-1, target).sum().backward()
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
    labels = ids.clone()
    labels[:, 0] = -100
    there = torch.ones_like(ids)
    scored = functools.partial(model, input_ids=ids, attention_mask=there, labels=labels, fused_lm_head=True)
    return lambda: scored().log_probs.sum().backward()


def main() -> None:
    """Children in turns."""
    parser = argparse.ArgumentParser(prog="benchmarks.logprob")
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="an eighth of the completions, and nothing is kept")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--alone", choices=["ours", "plain", "trl"], help="print peak and seconds of one and leave")
    asked = parser.parse_args()
    torch.set_num_threads(environment.choose_threads(asked.threads))
    rows, device = ROWS // 8 if asked.small else ROWS, torch.device("cpu")
    if asked.alone:
        work = make_pass(asked.alone, rows)
        print(json.dumps([call_peak_gib(work, device), speed.seconds(work, device)]))
        return
    words = [*(["--small"] if asked.small else []), f"--threads={torch.get_num_threads()}"]
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": [], "trl": []}
    for _ in range(asked.rounds):
        for side, values in found.items():
            values.append(measure.alone("benchmarks.logprob", f"--alone={side}", *words))
    table = []
    for side, peak_target, time_target in (("plain", "≥ 12", "≥ 1.43"), ("trl", "≥ 8", "")):
        beside = "log_softmax" if side == "plain" else "TRL's head"
        for place, what, target in ((0, "peak memory, GiB", peak_target), (1, "seconds", time_target)):
            ours, theirs = ([values[place] for values in found[name]] for name in ("ours", side))
            values = measure.summary(ours), beside, measure.summary(theirs), measure.ratio(theirs, ours)
            table.append(measure.row(f"log-probs over 152k tokens: {what}", *values, target))
    if asked.small:
        print(measure.markdown(table))
    else:
        measure.write("logprob", table, rounds=found)


if __name__ == "__main__":
    main()
