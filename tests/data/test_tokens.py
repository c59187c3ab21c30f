"""Tokens and masks: what is learnt, what is context, and that nothing is lost silently."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.data.examples import Example, Message
from kdcache.data.tokens import tokenise
from kdcache.errors import DataError, TokenizerError
from kdcache.token_maps import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(models):
    return load_tokenizer(str(models / "teacher"))


def chat(*turns, index=0):
    return Example(index, messages=tuple(Message(role, content) for role, content in turns))


def learnt(row, tokenizer):
    return tokenizer.decode(row.ids[row.targets])


def test_only_the_response_and_one_end_are_learnt(tokenizer):
    example = chat(("user", "What is 2 plus 2?"), ("assistant", "It is 4."))
    row = tokenise([example], tokenizer, max_length=128).rows[0]
    assert learnt(row, tokenizer) == "It is 4.<|im_end|>"
    assert (
        tokenizer.decode(row.ids)
        == "<|im_start|>user\nWhat is 2 plus 2?<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>"
    )
    assert not row.targets[0]


def test_every_assistant_turn_is_learnt_and_nothing_else(tokenizer):
    example = chat(
        ("system", "Be brief."), ("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"), ("user", "c")
    )
    row = tokenise([example], tokenizer, max_length=128).rows[0]
    assert learnt(row, tokenizer) == "one<|im_end|>two<|im_end|>"


def test_a_system_message_is_added_only_where_there_is_none(tokenizer):
    bare, own = chat(("user", "u"), ("assistant", "a")), chat(("system", "mine"), ("user", "u"), ("assistant", "a"))
    first, second = tokenise([bare, own], tokenizer, system="ours", max_length=128).rows
    assert "ours" in tokenizer.decode(first.ids)
    assert "ours" not in tokenizer.decode(second.ids)


def test_plain_text_is_learnt_whole_and_ends(tokenizer):
    row = tokenise([Example(0, text="once upon a time")], tokenizer, max_length=128).rows[0]
    assert tokenizer.decode(row.ids) == "once upon a time<|im_end|>"
    assert row.positions == len(row.ids) - 1


def test_plain_prompt_needs_no_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    example = chat(("user", "q"), ("assistant", "a"))
    row = tokenise([example], bare, prompt="plain", max_length=128).rows[0]
    assert tokenizer.decode(row.ids) == "q\na<|im_end|>"
    assert learnt(row, tokenizer) == "a<|im_end|>"
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenise([example], bare, max_length=128)


def test_a_beginning_token_is_put_where_the_tokenizer_puts_one(tokenizer):
    from tokenizers.processors import TemplateProcessing

    with_bos = copy.deepcopy(tokenizer)
    with_bos.bos_token = "<|im_start|>"
    with_bos._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    row = tokenise([Example(0, text="once")], with_bos, max_length=128).rows[0]
    assert row.ids[0] == with_bos.bos_token_id
    assert not row.targets[0]
    assert row.targets[1:].all()


def test_a_template_with_its_own_turn_end_still_learns_one_real_end(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    example = chat(("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"))
    row = tokenise([example], other, max_length=128).rows[0]
    assert learnt(row, tokenizer) == "a[/]b[/]<|im_end|>"


def test_everything_that_is_cut_or_dropped_is_counted(tokenizer):
    long, short = (
        chat(("user", "u"), ("assistant", "word " * 200), index=3),
        chat(("user", "u"), ("assistant", "a"), index=1),
    )
    lost = chat(("user", "word " * 200), ("assistant", "a"), index=2)
    nothing = Example(0, messages=(Message("user", "u"), Message("assistant", "")), empty=True)
    result = tokenise([nothing, short, lost, long], tokenizer, max_length=40)
    assert [r.index for r in result.rows] == [1, 3]
    assert (result.examples, result.dropped_empty, result.dropped_no_target, result.truncated) == (4, 1, 1, 2)
    assert len(result.rows[1].ids) == 40
    assert result.rows[1].ids[-1] != tokenizer.eos_token_id


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="renders earlier turns differently"):
        tokenise([chat(("user", "u"), ("assistant", "a"))], other, max_length=64)


def test_a_template_that_refuses_is_named_with_its_example(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"example 5: the chat template refuses .* roles must alternate"):
        tokenise([chat(("user", "u"), ("assistant", "a"), index=5)], other, max_length=64)


def test_a_tokenizer_without_end_is_refused(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(TokenizerError, match="no end-of-sequence"):
        tokenise([], endless, max_length=64)


turns = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), st.text("abc 12.\n\u00e9", min_size=1, max_size=30)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=turns, max_length=st.integers(2, 80))
def test_targets_are_the_assistant_text_whatever_the_conversation(tokenizer, turns, max_length):
    example = chat(*turns)
    whole = tokenise([example], tokenizer, max_length=10_000).rows
    cut = tokenise([example], tokenizer, max_length=max_length).rows
    said = "".join(content + "<|im_end|>" for role, content in turns if role == "assistant")
    assert (learnt(whole[0], tokenizer) if whole else "") == said
    if cut:
        # A cut row is the head of the whole one, masks included.
        length = len(cut[0].ids)
        assert length == min(max_length, len(whole[0].ids))
        assert (cut[0].ids == whole[0].ids[:length]).all()
        assert (cut[0].targets == whole[0].targets[:length]).all()
