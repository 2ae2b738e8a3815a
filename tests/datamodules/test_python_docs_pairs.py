"""Questions about Python: enough of them, cleanly answered, each with a wrong answer that is no give-away."""

from __future__ import annotations

from collections import Counter

import pytest

from datamodules import python_docs
from datamodules.python_docs_pairs import PHRASINGS, askable, conversations, first_sentence, preferences


def test_there_are_3000_different_questions_and_more_with_more_phrasings():
    asked = [record["messages"][0]["content"] for record in conversations()]
    assert len(asked) >= 3000 and len(set(asked)) == len(asked)
    often = [record["messages"][0]["content"] for record in conversations(phrasings=PHRASINGS)]
    assert len(often) == PHRASINGS * len(asked) == len(set(often))


def test_each_question_names_what_it_asks_about_and_wordings_differ():
    asked = [record["messages"][0]["content"] for record in conversations()]
    assert all(f"`{entry.name}`" in question for (entry, _), question in zip(askable(), asked, strict=True))
    assert len({question.split("`")[0] for question in asked}) >= PHRASINGS


def test_a_first_sentence_is_clean_prose_of_at_least_four_words():
    for entry, sentence in askable():
        assert len(sentence.split()) >= 4 and sentence.isprintable() and len(sentence) <= 301, entry.name
        assert sentence[0].isupper() and sentence[-1] in ".!?", entry.name
        assert ">>>" not in sentence and "->" not in sentence, entry.name


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Return the value of it.  If not found,\nraise.", "Return the value of it."),
        ("Return a list of\nall names\n\nMore text.", "Return a list of all names."),
        ("Use it, e.g. When it rains, for all. Then more.", "Use it, e.g. When it rains, for all."),
        ("Is this the one? Yes.", "Is this the one?"),
        ("S.index(sub) -> int", ""),  # a call
        ("lower case begins this sentence.", ""),
        ("Too short.", ""),
        ("Options are the following:", ""),  # goes on in a list
        ("Return x (or y if there is none.", ""),  # unbalanced
        ("Return `x if there is none of it.", ""),
        ("Run it like this >>> run() and look.", ""),
        ("Very long " + "indeed " * 60 + ".", ""),
    ],
)
def test_what_counts_as_a_first_sentence(text, sentence):
    assert first_sentence(text) == sentence


def test_the_answer_is_the_first_sentence_or_the_whole_text():
    entries = {entry.name: entry for entry in python_docs.entries()}
    short, whole = list(conversations("first_sentence")), list(conversations("whole"))
    for one, other in zip(short, whole, strict=True):
        assert one["messages"][0] == other["messages"][0]
        name = one["messages"][0]["content"].split("`")[1]
        assert other["messages"][1]["content"] == entries[name].text
        first, text = one["messages"][1]["content"], " ".join(entries[name].text.split())
        assert text.startswith(first.removesuffix("."))


@pytest.mark.parametrize(("phrasings", "turns", "times"), [(1, 4, 1), (2, 3, 5)])
def test_each_question_comes_so_often_among_others_each_time(phrasings, turns, times):
    alone = {
        record["messages"][0]["content"]: record["messages"][1] for record in conversations(phrasings=phrasings, things=50)
    }
    records = list(conversations(phrasings=phrasings, things=50, turns=turns, times=times))
    assert [len(record["messages"]) // 2 for record in records[:turns]] == list(range(1, turns + 1))
    said = [message for record in records for message in record["messages"]]
    pairs = list(zip(said[::2], said[1::2], strict=True))
    assert all(alone[question["content"]] == answer for question, answer in pairs)
    assert Counter(question["content"] for question, _ in pairs) == dict.fromkeys(alone, times)
    neighbours = {question: set() for question in alone}
    for before, behind in zip(said[:-2:2], said[2::2], strict=True):
        neighbours[behind["content"]].add(before["content"])
    assert times == 1 or sum(len(each) > times / 2 for each in neighbours.values()) > len(alone) * 0.9
    assert records == list(conversations(phrasings=phrasings, things=50, turns=turns, times=times))


@pytest.mark.parametrize("name", ["turns", "times"])
@pytest.mark.parametrize("number", [0, True, 2.0, "4"])
def test_a_number_of_turns_or_times_that_cannot_be_is_refused(name, number):
    with pytest.raises(ValueError, match=f"the {name} of 'python_docs' must be a number from 1"):
        list(conversations(**{name: number}))


@pytest.mark.parametrize("answer", ["first_sentence", "whole"])
def test_the_rejected_answer_is_anothers_of_similar_length(answer):
    pairs = list(preferences(answer))
    right = {record["messages"][0]["content"]: record["messages"][1]["content"] for record in conversations(answer)}
    answers = set(right.values())
    differences = []
    for pair in pairs:
        chosen, rejected = pair["chosen"]["content"], pair["rejected"]["content"]
        assert chosen == right[pair["messages"][0]["content"]] and rejected in answers and rejected != chosen
        differences.append(abs(len(chosen) - len(rejected)) / len(chosen))
    assert sorted(differences)[len(pairs) * 99 // 100] < 0.05  # length does not tell them apart


def test_pairs_are_the_same_each_time():
    assert list(preferences()) == list(preferences())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": "half"}, "answer of 'python_docs' must be first_sentence or whole, got 'half'"),
        ({"phrasings": 0}, f"phrasings of 'python_docs' must be a number from 1 to {PHRASINGS}, got 0"),
        ({"phrasings": PHRASINGS + 1}, f"from 1 to {PHRASINGS}, got {PHRASINGS + 1}"),
        ({"phrasings": True}, "got True"),
        ({"things": 1}, "things of 'python_docs' must be 2 or more, got 1"),
        ({"things": "all"}, "got 'all'"),
        ({"phrasings": "2"}, "got '2'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    for pairs in (conversations, preferences):
        with pytest.raises(ValueError, match=message):
            next(pairs(**options))


def test_a_part_of_the_things_is_the_same_in_conversations_and_preferences():
    few = [record["messages"][0]["content"] for record in conversations(things=50)]
    assert len(set(few)) == 50
    assert few == [record["messages"][0]["content"] for record in preferences(things=50)]
    worded = [record["messages"][0]["content"] for record in conversations(phrasings=2, things=50)]
    assert worded[::2] == few and len(set(worded)) == 100
