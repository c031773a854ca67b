import datetime
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from forked import SMALL, make, output_of
from tokenizers import Tokenizer, models, pre_tokenizers
from training import composed
from transformers import PreTrainedTokenizerFast

from pspo import dataset, model
from pspo.base.schema import ConfigError
from pspo.dataset import prompt
from pspo.dataset.problem import Problem
from pspo.run.job import run
from tests.test_dataset import config

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} ; {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(template=TEMPLATE):
    words = ["system", "user", "assistant", ":", ";", "Be", "brief", ".", "How", "many", "?", "eggs"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    made.chat_template = template
    return made


def test_render_sends_a_system_message_only_if_there_is_one():
    made = tokenizer()
    assert made.decode(dataset.render(made, "Be brief .", ["How many ?"])[0]) == (
        "system : Be brief . ; user : How many ? ; assistant :"
    )
    assert made.decode(dataset.render(made, "", ["How many ?"])[0]) == "user : How many ? ; assistant :"


SHOTS = [Problem("s", "How many eggs ?", "2", "Be eggs .")]


def text(made, system_prompt="", **options):
    """What the model sees, with one space between its tokens."""
    return made.decode(dataset.render(made, system_prompt, ["How many ?"], **options)[0])


def test_a_model_without_a_chat_template_sees_plain_text():
    plain = tokenizer(None)
    ids = dataset.render(plain, "Be brief .", ["How many ?"], shots=SHOTS)[0]
    whole = "Be brief .\n\nQuestion: How many eggs ?\nAnswer: Be eggs .\n\nQuestion: How many ?\nAnswer:"
    assert ids == plain.encode(whole)
    assert dataset.prompt_date(plain, None) is None


def test_a_prompt_of_the_users_own_replaces_the_chat_template():
    made = tokenizer()
    assert dataset.render(made, "", ["{how} many ?"], prompt="user : {question}")[0] == made.encode(
        "user : {how} many ?"
    )
    with pytest.raises(ConfigError, match=r"dataset.prompt='Q:': must hold \{question\}"):
        config("gsm8k", prompt="Q:")


def test_examples_are_turns_of_a_conversation():
    assert text(tokenizer(), "Be brief .", shots=SHOTS) == (
        "system : Be brief . ; user : How many eggs ? ; assistant : Be eggs . ; user : How many ? ; assistant :"
    )


def test_long_prompts_are_dropped_and_counted():
    short, long = Problem("a", "How many ?", "1", ""), Problem("b", "How many eggs ?", "1", "")
    made = tokenizer()
    length = len(dataset.render(made, "", [short.question])[0])
    prompts, num_dropped = dataset.encode(made, config("embedded", max_prompt_tokens=length), [short, long, short])
    assert [each.problem for each in prompts] == [short, short]
    assert num_dropped == 1
    assert all(len(each.token_ids) == length for each in prompts)


GEMMA = (  # of gemma-2-2b-it, shortened
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] | trim + ' ; ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
)


def refused(template, system_prompt="Be brief ."):
    with pytest.raises(ConfigError) as caught:
        dataset.encode(
            tokenizer(template), config("gsm8k", system_prompt=system_prompt), [Problem("a", "How ?", "", "")]
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_template_that_refuses_a_system_message_names_the_remedy():
    told = refused(GEMMA)
    assert "System role not supported; it writes prompts without a system message alone" in told
    assert told.endswith('set dataset.system_prompt=""')
    made = tokenizer(GEMMA)
    assert made.decode(dataset.render(made, "", ["How many ?"])[0]) == "user : How many ? ; assistant :"


def test_a_template_that_leaves_the_system_message_out_is_refused():
    silent = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    assert refused(silent).startswith("dataset.system_prompt='Be brief .': the model's chat template leaves it out")


def test_a_template_that_refuses_examples_does_not_blame_the_system_message():
    alone = "{% if messages | length > 2 %}{{ raise_exception('One question only') }}{% endif %}{{ messages }}"
    with pytest.raises(ConfigError, match="One question only; mend chat_template"):
        dataset.render(tokenizer(alone), "Be brief .", ["How many ?"], shots=SHOTS)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m['content'] }", "unexpected"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[0]['content'] | no_such_filter }}", "No filter named 'no_such_filter'"),
        ("{{ raise_exception('Conversations begin with a greeting') }}", "Conversations begin with a greeting"),
        ("{{ tools | length }}", "has no len"),
        ("{{ persona.name }}", "'persona' is undefined"),
        ("{{ 1 / (messages | length - messages | length) }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_cannot_write_a_prompt_is_one_sentence(template, reason):
    for system_prompt in ("Be brief .", ""):
        told = refused(template, system_prompt)
        assert reason in told
        assert told.endswith("mend chat_template.jinja in the model's folder, or choose another model")


def test_one_of_several_templates_is_the_default():
    several = {"rag": TEMPLATE, "tool_use": TEMPLATE}
    assert "this model has the chat templates rag, tool_use and none named default" in refused(several)
    made = tokenizer(several | {"default": TEMPLATE})
    assert made.decode(dataset.render(made, "", ["How many ?"])[0]) == "user : How many ? ; assistant :"


DATED = (  # of Llama-3.2-1B-Instruct, shortened
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}{%- endif %}Today Date: {{ date_string }}\n{% for m in messages %}{{ m['content'] }}{% endfor %}"
)


def text_of(template, today):
    class Echo(PreTrainedTokenizerFast):
        def __call__(self, texts, **_):
            return {"input_ids": texts}

    made = Echo(tokenizer_object=Tokenizer(models.WordLevel({})))
    made.chat_template = template
    return dataset.render(made, "", ["How many ?"], today)[0]


def test_a_template_that_prints_the_date_prints_the_given_one():
    assert text_of(DATED, datetime.date(2031, 2, 3)) == "Today Date: 03 Feb 2031\nHow many ?"
    nested = "{% macro head() %}{{ strftime_now(format='%-d.%-m.%y, %A, %H:%M') }}{% endmacro %}{{ head() }}"
    assert text_of(nested, datetime.date(2031, 2, 3)) == "3.2.31, Monday, 00:00"


BEFORE = ["\n", "\n\n", "  ", "  {% if true %} x{% endif %}\n", "{# note #}\n", "{{ '' }}\n"]
FORMS = ["%Y-%m-%d", "%A, %d. %B %y", "%a %b %-d %j %U %W %G-%V-%u %w %x", "day"]


@pytest.mark.parametrize(("before", "form"), [("", form) for form in FORMS] + [(text, FORMS[0]) for text in BEFORE])
def test_a_given_date_changes_nothing_else(before, form):
    template = before + "{{ strftime_now('" + form + "') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    days, free = [datetime.date.today()], text_of(template, None)
    days.append(datetime.date.today())  # another one at midnight
    assert free in [text_of(template, day) for day in days]


def test_the_first_run_of_a_group_sets_the_date_of_all(tmp_path):
    assert dataset.prompt_date(tokenizer(), tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    today = dataset.prompt_date(tokenizer(DATED), tmp_path)
    assert (tmp_path / "prompt_date").read_text() == f"{today}\n"
    (tmp_path / "prompt_date").write_text("2001-02-03\n")
    assert dataset.prompt_date(tokenizer(DATED), tmp_path) == datetime.date(2001, 2, 3)
    (tmp_path / "prompt_date").write_text("soon")
    with pytest.raises(
        ConfigError, match="prompt_date, which holds a day such as 2026-01-31, cannot be read or written"
    ):
        dataset.prompt_date(tokenizer(DATED), tmp_path)
    with pytest.raises(ConfigError, match="cannot be read or written"):
        dataset.prompt_date(tokenizer(DATED), tmp_path / "prompt_date")


def test_runs_that_begin_together_agree_on_the_date(tmp_path, monkeypatch):
    days = iter(datetime.date(2031, 2, day) for day in range(1, 9))

    class Clock(datetime.date):
        @classmethod
        def today(cls):
            time.sleep(0.01)  # long enough for all to find no file, were there no lock
            return next(days)

    monkeypatch.setattr("pspo.dataset.prompt.date", Clock)
    made = tokenizer(DATED)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: dataset.prompt_date(made, tmp_path), range(8)))
    assert found == [datetime.date(2031, 2, 1)] * 8


# --- in a run


UNTRAINED = ["model.architecture=null", "model.warm_start=null"]


@pytest.fixture
def folder(tmp_path, tiny_policy):
    """A factory of model folders with a chat template of one's own."""

    def make_folder(template):
        policy = tiny_policy()
        saved = tmp_path / "saved"
        model.save(policy, saved)
        (saved / "chat_template.jinja").write_text(template)
        return saved

    return make_folder


def test_a_run_refuses_a_template_before_anything_is_loaded_or_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("weights were loaded"))
    settings = [
        *SMALL,
        *UNTRAINED,
        f"model.path={folder(GEMMA)}",
        f"output_dir={tmp_path / 'outputs'}",
        "dataset.system_prompt=Hi",
    ]
    with pytest.raises(ConfigError, match=r'System role not supported; .* set dataset\.system_prompt=""'):
        run(composed(*settings))
    assert not (tmp_path / "outputs").exists()


@pytest.mark.process
def test_all_runs_of_a_group_print_the_day_of_the_first(folder, tmp_path, cache):
    """The first run, the same one resumed and another arm, each on a day of its own."""
    runs = tmp_path / "runs"
    place = folder("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ strftime_now('%Y-%m-%d') }}")

    def on(day):
        class Clock(datetime.date):
            @classmethod
            def today(cls):
                return cls(2031, 2, day)

        def encode(tokenizer, *arguments):
            prompts, dropped = kept(tokenizer, *arguments)
            if len(arguments) == 4:  # not the trial before the run has a directory
                print("prompt:", tokenizer.decode(prompts[0].token_ids)[-10:])
            return prompts, dropped

        kept, dataset.encode, prompt.date = dataset.encode, encode, Clock
        model.load = lambda *_: print("end") or exit(0)  # prompts are all that is of interest

    for day, seed in ((1, 0), (2, 0), (3, 1)):
        overrides = [*UNTRAINED, f"model.path={place}", f"seed={seed}", "dataset.max_prompt_tokens=500"]
        status, output = make(runs, cache, overrides, hook=lambda day=day: on(day)), output_of(runs)
        assert status == 0, output
    told = [line for line in output.splitlines() if line.startswith("prompt:")]
    assert told == ["prompt: 2031-02-01"] * 9  # of three splits
    assert "the model's chat template prints a date, 2031-02-01 in all runs of this group" in output
