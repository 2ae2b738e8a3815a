"""The quickstart has enough questions, clean answers, and wrong answers that do not give themselves away."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import stdlib_docs
from questions import MAX_PHRASINGS, askable, conversations, first_sentence, multiple_choice, preferences, select


@pytest.fixture(scope="module")
def all_askable():
    return askable(stdlib_docs.entries())


@pytest.fixture(scope="module")
def subjects(all_askable):
    return select(all_askable, len(all_askable))


@pytest.fixture(scope="module")
def few(all_askable):
    return select(all_askable, 50)


@pytest.mark.slow
def test_thousands_of_subjects_with_different_phrasings(subjects):
    assert len(subjects) >= 3000
    asked = [question for subject in subjects for question in subject.phrasings(MAX_PHRASINGS)]
    assert len(set(asked)) == len(asked) == MAX_PHRASINGS * len(subjects)


@pytest.mark.slow
def test_questions_name_their_subject_in_varied_words(subjects):
    asked = [subject.phrasings()[0] for subject in subjects]
    assert all(f"`{subject.name}`" in question for subject, question in zip(subjects, asked, strict=True))
    assert len({question.split("`")[0] for question in asked}) >= MAX_PHRASINGS


def test_answers_are_clean_sentences_of_the_documentation(all_askable):
    for entry, sentence in all_askable:
        assert len(sentence.split()) >= 4 and sentence.isprintable() and len(sentence) <= 301, entry.name
        assert sentence[0].isupper() and sentence[-1] in ".!?", entry.name
        assert ">>>" not in sentence and "->" not in sentence, entry.name
        assert " ".join(entry.text.split()).startswith(sentence.removesuffix(".")), entry.name


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
        ("Options are the following:", ""),  # continues with a list
        ("Return x (or y if there is none.", ""),  # unbalanced
        ("Return `x if there is none of it.", ""),
        ("Run it like this >>> run() and look.", ""),
        ("Very long " + "indeed " * 60 + ".", ""),
    ],
)
def test_first_sentence(text, sentence):
    assert first_sentence(text) == sentence


def test_selection_is_part_of_all_subjects(subjects, few):
    answers = {subject.name: subject.answer for subject in subjects}
    assert len({subject.name for subject in few}) == 50
    assert all(answers[subject.name] == subject.answer for subject in few)


@pytest.mark.parametrize(("max_questions", "repeats"), [(1, 1), (4, 1), (3, 5)])
def test_each_question_repeats_next_to_other_questions(few, max_questions, repeats):
    answers = {subject.phrasings()[0]: subject.answer for subject in few}
    records = conversations(few, random.Random(0), repeats=repeats, max_questions=max_questions)
    assert [len(record["messages"]) // 2 for record in records[:max_questions]] == list(range(1, max_questions + 1))
    messages = [message for record in records for message in record["messages"]]
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    pairs = [(asked["content"], said["content"]) for asked, said in zip(messages[::2], messages[1::2], strict=True)]
    assert all(answers[question] == answer for question, answer in pairs)
    assert Counter(question for question, _ in pairs) == dict.fromkeys(answers, repeats)
    previous = {question: set() for question in answers}
    for (before, _), (question, _) in zip(pairs, pairs[1:], strict=False):
        previous[question].add(before)
    assert repeats == 1 or sum(len(each) > repeats / 2 for each in previous.values()) > len(answers) * 0.9
    assert records == conversations(few, random.Random(0), repeats=repeats, max_questions=max_questions)


def test_rejected_answer_is_anothers_of_similar_length(subjects):
    answers = {subject.phrasings()[0]: subject.answer for subject in subjects}
    pairs = preferences(subjects, 1)
    differences = []
    for pair in pairs:
        chosen, rejected = pair["chosen"]["content"], pair["rejected"]["content"]
        assert chosen == answers[pair["messages"][0]["content"]] != rejected
        assert rejected in set(answers.values())
        differences.append(abs(len(chosen) - len(rejected)) / len(chosen))
    assert len(pairs) == len(subjects)
    assert sorted(differences)[len(pairs) * 99 // 100] < 0.05  # length does not tell them apart


def test_preferences_have_a_pair_per_phrasing(few):
    asked = [pair["messages"][0]["content"] for pair in preferences(few, 2)]
    assert asked[::2] == [subject.phrasings()[0] for subject in few]
    assert len(set(asked)) == 100
    assert preferences(few, 2) == preferences(few, 2)


def test_multiple_choice_has_one_right_answer(few):
    answers = {subject.phrasings()[0]: subject.answer for subject in few}
    records = multiple_choice(few, random.Random(0), 4)
    assert [record["context"] for record in records] == list(answers)
    for record in records:
        assert len(set(record["choices"])) == 4
        assert record["choices"][record["gold"]] == answers[record["context"]]
    assert set(Counter(record["gold"] for record in records)) == {0, 1, 2, 3}
