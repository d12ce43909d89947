import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.trainer.data.forms import FormOptions, detect_form, infer_preference_base, parse_row, parse_transcript
from steersman.trainer.data.records import Comparison, Demonstration, Message, Origin, Prompt
from steersman.trainer.data.rows import BadRow, Row

WHERE = Origin(file="d.jsonl", line=7)
USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}
ASKED = (Message(role="user", content="Hi"),)


def parse(fields, base=None):
    form = detect_form(fields)
    assert form is not None
    return parse_row(Row(fields=fields, origin=WHERE), form, FormOptions(preference_base=base))


def reason(fields, base=None):
    with pytest.raises(BadRow) as caught:
        parse(fields, base)
    assert str(caught.value).startswith("d.jsonl:7: ")
    return caught.value.reason


@pytest.mark.parametrize(
    ("fields", "prompt", "responses"),
    [
        ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, "Q", ("good", "bad")),
        ({"prompt": "Hi", "chosen": [REPLY], "rejected": [OTHER]}, ASKED, ("Hello", "Go away")),
        ({"prompt": "Hi", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, ASKED, ("Hello", "Go away")),
        ({"prompt": [USER], "chosen": REPLY, "rejected": OTHER}, ASKED, ("Hello", "Go away")),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER]}, ASKED, ("Hello", "Go away")),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"},
            ASKED,
            ("Hello", "Go away"),
        ),
    ],
    ids=["text", "messages", "messages-with-prompt", "message-prompt", "implicit-prompt", "transcript"],
)
def test_chosen_and_rejected(fields, prompt, responses):
    assert parse(fields) == Comparison(prompt=prompt, responses=responses, ranks=(1, 2), origin=WHERE)


def test_a_margin_is_kept():
    assert parse({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 2}).margin == 2.0
    assert "margin is -1" in reason({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": -1})


@pytest.mark.parametrize("names", [("candidate1", "candidate2"), ("candidate_0", "candidate_1")])
@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: {"role": "assistant", "content": text}])
@pytest.mark.parametrize(("base", "choice", "ranks"), [(0, 0, (1, 2)), (0, 1, (2, 1)), (1, 1, (1, 2)), (1, 2, (2, 1))])
def test_candidates(names, wrap, base, choice, ranks):
    fields = {"input_text": "Q", names[0]: wrap("a"), names[1]: wrap("b"), "human_preference": choice}
    assert parse(fields, base) == Comparison(prompt="Q", responses=("a", "b"), ranks=ranks, origin=WHERE)


def candidates(choice, **more):
    return Row(
        fields={"input_text": "Q", "candidate1": "a", "candidate2": "b", "human_preference": choice} | more,
        origin=WHERE,
    )


def test_the_base_of_the_choices_is_inferred():
    assert infer_preference_base([candidates(1), candidates(0)]) == 0
    assert infer_preference_base([candidates(1), candidates(2)]) == 1
    assert infer_preference_base([candidates(1), candidates(1, candidate_0="x")]) == 0
    assert infer_preference_base([candidates(1), candidates("tie")]) is None
    with pytest.raises(BadRow, match="neither from 0 nor from 1"):
        infer_preference_base([candidates(0), candidates(2)])


def test_a_choice_that_means_nothing_is_named():
    assert "set preference_base" in reason(candidates(1).fields)
    assert reason(candidates(3).fields, 1) == "human_preference is 3, must be 1, 2 or 'tie'"
    assert "human_preference is True" in reason(candidates(True).fields, 1)
    assert reason(candidates(None).fields, 1) == "human_preference or choice is missing"
    assert parse(candidates("tie").fields).ranks == (1, 1)


def test_ranked_lists():
    ranked = {"prompt": "Q", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}
    comparison = parse(ranked)
    assert comparison.ranks == (2, 1, 2)
    assert comparison.best == "b"
    assert parse({"prompt": "Q", "responses": ["a", "b", "c"]}).ranks == (1, 2, 3)
    assert reason(ranked | {"ranks": [1, 2]}) == "ranks has 2 entries, must have 3, one for each response"
    assert "must be a list of integers" in reason(ranked | {"ranks": [1.5, 2, 3]})
    assert "at least two" in reason(ranked | {"responses": ["a"]})
    assert "responses[1] is empty" in reason(ranked | {"responses": ["a", " ", "c"]})


def test_demonstrations_and_prompts():
    assert parse({"messages": [USER, REPLY]}) == Demonstration(prompt=ASKED, completion="Hello", origin=WHERE)
    for name in ("completion", "response"):
        assert parse({"prompt": "Q", name: "A"}) == Demonstration(prompt="Q", completion="A", origin=WHERE)
    assert parse({"prompt": [USER]}) == Prompt(prompt=ASKED, origin=WHERE)
    assert parse({"input_text": "Q"}) == Prompt(prompt="Q", origin=WHERE)


def test_transcripts_keep_turns_of_both_sides_and_text_with_blank_lines():
    text = "\n\nHuman: one\n\nstill one\n\nAssistant: two\n\nHuman: three\n\nAssistant: four"
    assert [(m.role, m.content) for m in parse_transcript(text)] == [
        ("user", "one\n\nstill one"),
        ("assistant", "two"),
        ("user", "three"),
        ("assistant", "four"),
    ]


turns = st.lists(
    st.text(st.characters(codec="ascii", exclude_characters=":\r"), max_size=20).map(str.strip), min_size=1, max_size=5
)


@given(turns)
def test_a_transcript_comes_back(contents):
    speakers = ["Human" if n % 2 == 0 else "Assistant" for n in range(len(contents))]
    text = "".join(f"\n\n{s}: {c}" for s, c in zip(speakers, contents, strict=True))
    assert [m.content for m in parse_transcript(text)] == contents


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"chosen": "\n\nHuman: A\n\nAssistant: x", "rejected": "\n\nHuman: B\n\nAssistant: y"},
            "chosen and rejected differ before the last assistant turn, must share the whole prompt",
        ),
        (
            {"chosen": "\n\nHuman: A\n\nAssistant:", "rejected": "\n\nHuman: A\n\nAssistant: y"},
            "chosen ends with an empty assistant turn",
        ),
        (
            {"chosen": "\n\nHuman: A", "rejected": "\n\nHuman: A\n\nAssistant: y"},
            "chosen ends with a turn of role 'user', must end with 'assistant'",
        ),
        ({"chosen": "\n\nHuman: A\n\nAssistant: x", "rejected": 3}, "rejected is 3, must be text"),
        (
            {"prompt": "Q", "chosen": "a", "rejected": [OTHER]},
            "chosen and rejected must both be text or both be messages",
        ),
        ({"chosen": "a", "rejected": "b"}, "prompt is missing"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role is 'robot', must be one of"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content is None, must be text"),
        ({"messages": "hello"}, "messages is 'hello', must be a list of messages"),
        ({"messages": [REPLY]}, "messages has no turn before the assistant's: the prompt is empty"),
        ({"prompt": "Q", "completion": ""}, "completion is empty"),
    ],
)
def test_a_bad_row_says_which_field_and_what_it_must_be(fields, expected):
    assert reason(fields).startswith(expected)


@pytest.mark.parametrize(
    ("form", "fields", "expected"),
    [
        ("completion", {"prompt": "Q"}, "completion or response is missing"),
        ("completion", {"completion": "A"}, "prompt is missing"),
        ("completion", {"prompt": "Q", "response": 5}, "response is 5, must be text or a list of messages"),
        ("completion", {"prompt": 5, "response": "A"}, "prompt is 5, must be text or a list of messages"),
        ("transcript", {"chosen": "\n\nHuman: A\n\nAssistant: x"}, "rejected is missing"),
        ("preference", {"prompt": "Q", "rejected": "b"}, "chosen is missing"),
        ("preference", {"prompt": "Q", "chosen": [REPLY]}, "rejected is missing"),
        (
            "candidates",
            {"input_text": "Q", "candidate1": "a", "candidate2": "b"},
            "human_preference or choice is missing",
        ),
        ("ranked", {"prompt": "Q"}, "responses is missing"),
        ("ranked", {"prompt": "Q", "responses": ["a", None]}, "responses[1] is missing"),
        ("messages", {"prompt": "Q"}, "messages is missing"),
        ("prompt", {"completion": "A"}, "prompt or input_text is missing"),
    ],
)
def test_a_row_that_lacks_a_field_of_its_form_says_so(form, fields, expected):
    with pytest.raises(BadRow) as caught:
        parse_row(Row(fields=fields, origin=WHERE), form, FormOptions())
    assert caught.value.reason.startswith(expected)


def test_fields_of_no_form():
    assert detect_form({"text": "x"}) is None
    assert detect_form({"prompt": None, "text": "x"}) is None


def test_subset_and_annotator_are_kept():
    row = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    record = parse(row | {"subset": "safety", "annotator": 12})
    assert (record.subset, record.annotator) == ("safety", "12")
    assert (parse(row).subset, parse(row).annotator) == ("", "")
    assert "subset is ['x']" in reason(row | {"subset": ["x"]})
    assert "at most 64" in reason(row | {"annotator": "x" * 65})
