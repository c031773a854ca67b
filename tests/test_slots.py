"""Continuous batching beside rows in step: the same completions, whatever the number of slots."""

import contextlib
import dataclasses
import gc
import signal
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pspo import rollout, slots
from pspo.dataset import Problem, Prompt
from pspo.host.interrupt import Interrupted
from pspo.rollout import in_step, sample, uniforms
from pspo.rollout.samplers.draw import draw_ranked

PROMPTS = [[11, 12, 13, 14], [21], [31, 32, 33, 34, 35, 36, 37], [41, 42]]
ROWS = [prompt for prompt in PROMPTS for _ in range(6)]


@pytest.fixture
def policy(tiny_policy):
    """Of float64, with stop tokens frequent enough that rows end at all times."""
    policy = tiny_policy(torch.float64, exact=True, attention="grouped")
    return dataclasses.replace(policy, stop_ids=list(range(2, 128, 16)))


def numbers(rows=24, length=20):
    return torch.from_numpy(uniforms([7], rows, length))


def until_stop(policy, found):
    return [(ids, [round(x, 9) for x in logprobs], end) for ids, logprobs, end in rollout._cut(policy, *found)]


@pytest.mark.parametrize("look", [1, 3, 8, 50])
@pytest.mark.parametrize("num_slots", [1, 2, 5, 24, 100])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (0.0, 1.0)])
def test_completions_are_those_of_rows_in_step(policy, monkeypatch, temperature, top_p, num_slots, look):
    monkeypatch.setattr(slots, "LOOK", look)
    monkeypatch.setattr(slots, "PLACES", 4)
    found = slots.decode(policy, ROWS, numbers(), temperature, top_p, num_slots)
    expected = in_step(policy, ROWS, numbers(), temperature, top_p, 100)
    assert [tuple(column.shape) for column in found] == [(24, 20)] * 2
    assert until_stop(policy, found) == until_stop(policy, expected)
    lengths = [len(ids) for ids, _, _ in until_stop(policy, found)]
    assert temperature == 0 or (min(lengths) < 4 and max(lengths) > 8)


def test_a_slot_is_taken_again_and_the_batch_shrinks(policy, monkeypatch):
    monkeypatch.setattr(slots, "LOOK", 1)
    begun, widths = [], []
    begin, put = slots.State.begin, slots.Slots.put

    def watched_begin(self, slot_B, row_B, *rest):
        begun.extend(zip(row_B.tolist(), slot_B.tolist(), strict=True))
        return begin(self, slot_B, row_B, *rest)

    def watched_put(self, token_B, *rest):
        widths.append(len(token_B))
        return put(self, token_B, *rest)

    monkeypatch.setattr(slots.State, "begin", watched_begin)
    monkeypatch.setattr(slots.Slots, "put", watched_put)
    slots.decode(policy, ROWS, numbers(), 1.0, 1.0, 8)
    assert [row for row, _ in begun] == list(range(24))  # each row once, in their order
    assert {slot for _, slot in begun} == set(range(8))
    assert widths[0] == 8
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 8
    assert len(widths) < 24 / 8 * 19  # fewer steps than three batches that each wait for their longest


def test_a_prompt_is_read_once_for_the_rows_that_begin_with_it(policy, monkeypatch):
    read, counts = slots.Slots.read, []
    monkeypatch.setattr(
        slots.Slots, "read", lambda self, prompts: (counts.append(len(prompts)), read(self, prompts))[1]
    )
    slots.decode(policy, ROWS, numbers(), 1.0, 1.0, 24)
    assert counts == [4]


class Refusing(TorchDispatchMode):
    """Refuses what waits for the device or makes a shape of what it finds there: neither can be in a graph."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        looks = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
        assert name != "is_nonzero", "a look"  # which has no such tag
        assert name == "index" or not set(looks) & set(func.tags), name
        given = [a for a in args if isinstance(a, (list, tuple))]
        assert not any(getattr(t, "dtype", None) == torch.bool for indices in given for t in indices), name
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("temperature", "top_p", "drawn"), [(1.0, 1.0, 6), (0.0, 1.0, 6), (1.0, 0.9, 6), (1.0, 0.999, 1)]
)
def test_a_step_can_be_a_graph(policy, monkeypatch, temperature, top_p, drawn):
    """A graph replays launches on the same memory: a step must neither move its buffers nor look at what they hold."""
    monkeypatch.setattr(slots, "draw_ranked", partial(draw_ranked, ranked=126))
    policy.stop_ids = [0]
    with torch.inference_mode():
        decoder = slots.Slots(policy, 3, 30)
        state = slots.State(decoder, numbers(3), policy.stop_ids, 0, temperature, top_p)
        logits_BV = decoder.fill(torch.arange(3), PROMPTS[:3], torch.arange(3))
        state.begin(torch.arange(3), torch.arange(3), torch.tensor([4, 1, 7]), logits_BV)

        def places():
            own = {name: value.data_ptr() for name, value in vars(state).items() if isinstance(value, torch.Tensor)}
            return own, [cache.data_ptr() for cache in decoder.cache], decoder.cis_SD.data_ptr()

        before = places()
        with Refusing():
            for _ in range(5):
                state.step(30)
        assert places() == before
        assert state.drawn_B.tolist() == [drawn] * 3


def test_a_step_mixes_no_devices(policy):
    """On the device that holds no values, as if it were the GPU: what is left on the CPU is refused."""
    policy.model.to("meta")
    with torch.inference_mode():
        state = slots.State(slots.Slots(policy, 3, 30), numbers(3).to("meta"), policy.stop_ids, 0, 0.7, 0.9)
        state.step(8)
        state.step(30)
    assert {value.device.type for value in vars(state).values() if isinstance(value, torch.Tensor)} == {"meta"}


def test_a_graph_is_run_then_recorded_and_from_then_on_replayed(monkeypatch):
    """A stand-in for CUDA's: recording runs nothing."""
    told, recording = [], []

    class Recorded:
        def replay(self):
            told.append("replayed")

    @contextlib.contextmanager
    def record(graph, pool, **_):
        assert isinstance(graph, Recorded)
        recording.append(pool)
        yield
        recording.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", record)
    graph = slots.Graph(lambda: told.append("run" if len(recording) != 1 else "recorded"), pool="pool")
    for _ in range(4):
        graph()
    assert told == ["run", "recorded", "replayed", "replayed", "replayed"]
    assert recording == ["pool", "end"]


def test_graphs_that_are_recorded_after_a_shrink_have_a_pool_of_their_own(policy, monkeypatch):
    """That of graphs which are all gone may not be used again."""
    pools = []

    def graph(work, pool):
        pools.append(pool)
        return work

    monkeypatch.setattr(slots, "LOOK", 1)
    monkeypatch.setattr(slots.State, "_new_pool", lambda state: [len(state.row_B), len(pools)])
    monkeypatch.setattr(slots, "Graph", graph)
    expected = in_step(policy, ROWS, numbers(), 1.0, 1.0, 24)
    found = slots.decode(policy, ROWS, numbers(), 1.0, 1.0, 8)
    assert until_stop(policy, found) == until_stop(policy, expected)
    assert len(pools) > 1
    assert len({id(pool) for pool in pools}) == len(pools)


@pytest.mark.parametrize("look", [1, 3, 8])
@pytest.mark.parametrize(("ranked", "some_stand"), [(1, True), (60, True), (128, False)])
def test_a_row_with_a_wide_nucleus_stands_still_until_the_next_look(policy, monkeypatch, ranked, some_stand, look):
    stood, take = [], slots.State._take

    def watched(self, at, *drawn):
        stood.append(int(self.stands_B[at].sum()))
        place, before = self.place_B[at].clone(), self.token_RT.clone()
        stands, row = self.stands_B[at].clone(), self.row_B[at]
        take(self, at, *drawn)
        assert torch.equal(self.place_B[at][stands], place[stands])
        assert torch.equal(self.token_RT[row][stands, :-1], before[row][stands, :-1])

    monkeypatch.setattr(slots, "LOOK", look)
    monkeypatch.setattr(slots, "draw_ranked", partial(draw_ranked, ranked=ranked))
    monkeypatch.setattr(slots.State, "_take", watched)
    found = slots.decode(policy, ROWS, numbers(), 1.0, 0.7, 8)
    assert until_stop(policy, found) == until_stop(policy, in_step(policy, ROWS, numbers(), 1.0, 0.7, 100))
    assert (sum(stood) > 0) == some_stand


def test_where_most_rows_stand_still_each_step_is_followed_by_a_look(policy, monkeypatch):
    steps, step = [], slots.State.step
    monkeypatch.setattr(slots.State, "step", lambda self, until: (steps.append(until), step(self, until))[1])
    monkeypatch.setattr(slots, "draw_ranked", partial(draw_ranked, ranked=1))
    policy = dataclasses.replace(policy, stop_ids=[0])
    slots.decode(policy, ROWS, numbers(), 1.0, 0.9999, 24)
    assert len(steps) < 19 + 2 * slots.LOOK


@pytest.mark.parametrize(("rows", "length"), [(1, 20), (24, 1), (24, 2), (1, 1)])
def test_one_row_and_one_token(policy, rows, length):
    found = slots.decode(policy, ROWS[:rows], numbers(rows, length), 1.0, 1.0, 5)
    assert until_stop(policy, found) == until_stop(
        policy, in_step(policy, ROWS[:rows], numbers(rows, length), 1.0, 1.0, 5)
    )


def test_prompts_are_read_some_at_a_time(policy, monkeypatch):
    expected = slots.decode(policy, ROWS, numbers(), 1.0, 1.0, 24)
    monkeypatch.setattr(slots, "READ", 8)
    assert until_stop(policy, slots.decode(policy, ROWS, numbers(), 1.0, 1.0, 24)) == until_stop(policy, expected)


def test_equal_prompts_apart_from_each_other(policy):
    rows = [PROMPTS[n % 4] for n in range(24)]
    found = slots.decode(policy, rows, numbers(), 1.0, 1.0, 7)
    assert until_stop(policy, found) == until_stop(policy, in_step(policy, rows, numbers(), 1.0, 1.0, 24))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_in_bfloat16_first_tokens_are_mostly_those_of_rows_in_step(tiny_policy, device):
    policy = dataclasses.replace(tiny_policy(attention="grouped"), autocast=True)
    policy.model.to(device)
    rows, random = [PROMPTS[n % 4] for n in range(200)], numbers(200, 4).to(device)
    (ours, logprobs), (theirs, others) = (
        decode(policy, rows, random, 1.0, 1.0, 50) for decode in (slots.decode, in_step)
    )
    assert (ours[:, 0] == theirs[:, 0]).double().mean() > 0.97
    same = (ours == theirs).cumprod(1).bool()
    assert (logprobs - others)[same].abs().mean() < 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_in_float32_999_of_1000_rows_are_those_of_rows_in_step(tiny_policy, device):
    policy, rows = tiny_policy(attention="grouped"), [PROMPTS[n % 4] for n in range(2000)]
    expected = in_step(policy, rows, numbers(2000, 8), 1.0, 1.0, 2000)
    policy.model.to(device)
    found = slots.decode(policy, rows, numbers(2000, 8).to(device), 1.0, 1.0, 500)
    ours, theirs = (rollout._cut(policy, *(column.cpu() for column in columns)) for columns in (found, expected))
    assert sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True)) >= 0.999 * len(rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2])
def test_completions_from_a_vocabulary_that_is_not_ranked_at_once(policy, monkeypatch, top_p, device):
    monkeypatch.setitem(slots.SMALL, "cuda", 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy.model.resize_token_embeddings(3000, mean_resizing=False)
        torch.nn.init.normal_(policy.model.get_output_embeddings().weight, std=0.1)
    policy = dataclasses.replace(policy, stop_ids=list(range(2, 3000, 20)))
    expected = in_step(policy, ROWS, numbers(), 1.0, top_p, 100)
    policy.model.to(device)
    found = slots.decode(policy, ROWS, numbers().to(device), 1.0, top_p, 8)
    assert until_stop(policy, [column.cpu() for column in found]) == until_stop(policy, expected)


def test_nothing_is_left_of_the_cache(policy, monkeypatch):
    """Else a GPU would hold it through the updates, until Python happens to look for cycles."""
    kept, init = [], slots.Slots.__init__

    def watched(self, *given):
        init(self, *given)
        kept.append(weakref.ref(self))

    monkeypatch.setattr(slots.Slots, "__init__", watched)
    gc.disable()
    try:
        slots.decode(policy, ROWS, numbers(), 1.0, 1.0, 8)
        assert kept[0]() is None
    finally:
        gc.enable()


def test_it_is_interrupted_between_two_steps(policy, monkeypatch):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 5:
            raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(slots.interrupt, "check", check)
    with pytest.raises(Interrupted):
        slots.decode(policy, ROWS, numbers(), 1.0, 1.0, 8)
    assert len(calls) == 5


def test_the_sampler_takes_it_where_it_is_chosen(policy, monkeypatch):
    prompts = [Prompt(Problem(f"p{i}", "", "", ""), ids) for i, ids in enumerate(PROMPTS)]
    settings = {"seed": [1], "group_size": 4, "max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "max_rows": 5}
    assert rollout.choose_decode(policy) is in_step  # on a CPU
    expected = sample(policy, prompts, **settings)
    monkeypatch.setattr(rollout, "choose_decode", lambda policy: slots.decode)
    for a, b in zip(sample(policy, prompts, **settings), expected, strict=True):
        assert (a.prompt, a.sample, a.token_ids, a.finished, a.text) == (
            b.prompt,
            b.sample,
            b.token_ids,
            b.finished,
            b.text,
        )
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (0.0, 1.0)])
def test_on_a_gpu_graphs_write_what_the_cpu_writes(policy, monkeypatch, temperature, top_p):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    monkeypatch.setattr(slots, "PLACES", 8)
    monkeypatch.setitem(slots.SMALL, "cuda", 1)  # so that it shrinks, and records anew
    expected = slots.decode(policy, ROWS, numbers(), temperature, top_p, 8)
    policy.model.cuda()
    found = slots.decode(policy, ROWS, numbers().cuda(), temperature, top_p, 8)
    assert until_stop(policy, [column.cpu() for column in found]) == until_stop(policy, expected)
