"""Records in the forms that collections have, and those that break a rule."""

from __future__ import annotations

from typing import Any

import pytest

from minitron_mcore.data.chat.forms import Chat, Completion, Pair, RecordError, parse_pair, parse_sample

USER = {"role": "user", "content": "q"}
ANSWER, OTHER = ({"role": "assistant", "content": text} for text in "ab")
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT = Chat((USER, ANSWER))
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": [USER, ANSWER], "id": 3}, CHAT),
        ({"messages": [SYSTEM, USER, ANSWER], "tools": [TOOL]}, Chat((SYSTEM, USER, ANSWER), (TOOL,))),
        (
            {"messages": [USER, ANSWER], "tools": '[{"type": "function"}]'},
            Chat((USER, ANSWER), ({"type": "function"},)),
        ),
        ({"messages": [USER, ANSWER], "tools": []}, CHAT),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}], "name": None}, ANSWER]},
            CHAT,
        ),
        ({"messages": [USER, CALL, {"role": "tool", "content": "1", "name": "f"}, ANSWER]}, None),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, CHAT),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            Chat((SYSTEM, USER, ANSWER)),
        ),
        ({"conversations": [SYSTEM, USER, ANSWER], "system": ""}, Chat((SYSTEM, USER, ANSWER))),
        ({"prompt": "q", "completion": "a"}, Completion("q", "a")),
        ({"input": "q", "output": "a"}, Completion("q", "a")),
        ({"instruction": "i", "output": "a"}, Completion("i", "a")),
        ({"instruction": "i", "input": "", "output": "a"}, Completion("i", "a")),
        ({"instruction": "i", "input": "q", "output": "a"}, Completion("i\n\nq", "a")),
        # NeMo's and OpenAssistant's names of roles.
        (
            {"conversations": [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}], "mask": "User"},
            CHAT,
        ),
        ({"messages": [{"role": "prompter", "content": "q"}, ANSWER]}, CHAT),
        ({"prompt": [USER], "completion": [ANSWER]}, Chat((USER, ANSWER), first=1)),
        ({"prompt": [SYSTEM, USER], "completion": ANSWER}, Chat((SYSTEM, USER, ANSWER), first=2)),
        ({"prompt": [USER], "completion": "a"}, Chat((USER, ANSWER), first=1)),
        # A collection that has both: what is said in turns.
        ({"prompt": "q", "messages": [USER, ANSWER]}, CHAT),
    ],
)
def test_chats_and_completions(fields: dict[str, Any], expected: Any) -> None:
    found = parse_sample(fields)
    if expected is None:
        assert isinstance(found, Chat)
        assert found.messages[1] == {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
        }
        assert found.messages[2] == {"role": "tool", "content": "1", "name": "f"}
    else:
        assert found == expected


@pytest.mark.parametrize("keys", [("prompt", "completion"), ("input", "output")])
def test_texts_as_turns(keys: tuple[str, str]) -> None:
    assert parse_sample(dict(zip(keys, "qa", strict=True)), turns=True) == Chat((USER, ANSWER), first=1)
    pair = parse_pair({"prompt": "q", "chosen": "a", "rejected": "b"}, turns=True)
    assert pair == Pair(Chat((USER, ANSWER), first=1), Chat((USER, OTHER), first=1))


TEXT_PAIR = Pair(Completion("q", "a"), Completion("q", "b"))
BOTH = Pair(Chat((USER, ANSWER), first=1), Chat((USER, OTHER), first=1))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, TEXT_PAIR),
        (
            {"prompt": "q", "chosen_response": "a", "rejected_response": "b"},
            Pair(Completion("q", "a"), Completion("q", "b")),
        ),
        (
            {"chosen": "Q: why?\nA: so is it", "rejected": "Q: why?\nA: some say"},
            Pair(Completion("Q: why?\nA:", " so is it"), Completion("Q: why?\nA:", " some say")),
        ),
        (
            {"chosen": "Q: why? yes", "rejected": "Q: why? yes it is"},
            Pair(Completion("Q: why?", " yes"), Completion("Q: why?", " yes it is")),
        ),
        # The prompt again in both answers.
        ({"prompt": "q ", "chosen": "q a", "rejected": "q b"}, Pair(Completion("q ", "a"), Completion("q ", "b"))),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, BOTH),
        ({"prompt": [USER], "chosen": ANSWER, "rejected": OTHER}, BOTH),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, BOTH),
        ({"prompt": "q", "chosen": [ANSWER], "rejected": [OTHER]}, BOTH),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, BOTH),
        # As UltraFeedback has it: the prompt's text, and both chats whole.
        ({"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER]}, BOTH),
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, BOTH),
        (
            {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, OTHER]},
            Pair(Chat((USER, ANSWER, USER, ANSWER), first=3), Chat((USER, ANSWER, USER, OTHER), first=3)),
        ),
    ],
)
@pytest.mark.parametrize("rewards", [None, ("chosen_reward", "rejected_reward"), ("score_chosen", "score_rejected")])
def test_preferences(fields: dict[str, Any], expected: Pair, rewards: tuple[str, str] | None) -> None:
    named = {} if rewards is None else dict(zip(rewards, (3, -0.5), strict=True))
    found = parse_pair({**fields, **named}, needs_rewards=rewards is not None)
    assert found == Pair(expected.chosen, expected.rejected, None if rewards is None else (3.0, -0.5))


def message(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, "has no keys, not messages, conversations"),
        ({"text": "a"}, "has only text"),
        ({"prompt": "a"}, "has only prompt"),
        ({"chosen": "a", "rejected": "b"}, "has only chosen, rejected"),
        ({"messages": []}, "has in messages an empty list, not messages"),
        ({"messages": "q"}, "has in messages a text, not messages"),
        ({"messages": ["q"]}, "has as message 1 of messages a text, not a message"),
        ({"messages": [{"content": "q"}]}, "has no role in message 1 of messages, only content"),
        ({"messages": [message("bot", "q")]}, "the unknown role 'bot' in message 1 of messages"),
        ({"instruction": ["i"], "output": "a"}, "has a list as instruction, not a text"),
        ({"prompt": "p", "completion": "a", "label": False}, "has an answer with label=false, one that is not to be"),
        ({"messages": [{"role": "user"}]}, "has no content in message 1 of messages"),
        ({"messages": [message("user", 3)]}, "content that is a number, not text"),
        ({"messages": [message("user", [{"type": "image", "url": "x"}]), ANSWER]}, "content of type image, not text"),
        ({"messages": [USER]}, "ends with the user's"),
        ({"messages": [SYSTEM]}, "has no message of a user"),
        ({"messages": [ANSWER]}, "roles out of turn: message 1 is the assistant's, at the beginning"),
        ({"messages": [USER, USER, ANSWER]}, "roles out of turn: message 2 is the user's, after the user's"),
        ({"messages": [USER, SYSTEM, ANSWER]}, "message 2 is the system's, after the user's"),
        ({"messages": [USER, ANSWER, ANSWER]}, "message 3 is the assistant's, after the assistant's"),
        ({"messages": [USER, message("tool", "x"), ANSWER]}, "message 2 is the tool's"),
        ({"messages": [USER, message("assistant", " \n")]}, "has an empty answer: message 2"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "has tools that are not JSON"),
        ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "has tools that are not a list"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]},
            "no content in message 2 of conversations, only from",
        ),
        ({"prompt": "q", "completion": " "}, "has an empty answer, completion"),
        ({"input": "q", "output": ""}, "has an empty answer, output"),
        ({"prompt": 3, "completion": "a"}, "has in prompt a number, not messages"),
    ],
)
def test_chats_that_break_a_rule(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_sample(fields)
    assert rule in caught.value.rule and caught.value.remedy and "\n" not in caught.value.rule


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"prompt": "q"}, "has no chosen and no rejected, only prompt"),
        ({"prompt": "q", "chosen": "a"}, "has no rejected, only chosen, prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "the same answer as chosen and as rejected"),
        ({"prompt": "q", "chosen": [ANSWER], "rejected": "a"}, "the same answer"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "the same answer"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "has an empty answer, rejected"),
        ({"chosen": "yes", "rejected": "no"}, "has no prompt, and its answers begin with different words"),
        ({"chosen": [ANSWER], "rejected": [OTHER]}, "has no prompt, and its answers begin with different messages"),
        ({"chosen": [USER, ANSWER], "rejected": [message("user", "r"), OTHER]}, "has no prompt"),
        ({"prompt": "r", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "has a prompt that is not what"),
        ({"prompt": "q", "chosen": [message("user", "r")], "rejected": [OTHER]}, "has a prompt that is not what"),
        ({"prompt": [SYSTEM], "chosen": "a", "rejected": "b"}, "roles out of turn"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": 1}, "has no rejected_reward"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": 1, "rejected_reward": "0"}, "has '0' as"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": 1, "rejected_reward": float("nan")},
            "not a finite number",
        ),
    ],
)
def test_preferences_that_break_a_rule(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_pair(fields)
    assert rule in caught.value.rule and caught.value.remedy


def test_rewards_that_a_method_needs() -> None:
    with pytest.raises(RecordError, match="has no chosen_reward and no rejected_reward"):
        parse_pair({"prompt": "q", "chosen": "a", "rejected": "b"}, needs_rewards=True)
