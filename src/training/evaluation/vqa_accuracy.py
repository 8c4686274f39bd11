"""Visual question answering (Antol et al., "VQA", ICCV 2015): accuracy as its server computes it, answers to learn."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS["none"] = "0"
_MARKS = ";/[]\"{}()=+\\_-><@`,?!"
_CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll let's ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't she'd she's
    should've shouldn't somebody'd somebody'll somebody's someone'd someone'll someone's something'd something'll that'd
    that's there'd there're there's they'd they'll they're they've 'twas wasn't we'd we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't
    y'all you'd you'll you're you've
""".split()
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED}

FREQUENT = 9  # times that an answer is to be found to be learnt


def vqa_accuracy(answer: str, people: Sequence[str] | Mapping[str, float]) -> float:
    """In [0, 1]: over the annotators, the mean of min(1, equal answers among the others / 3).

    As on the server, punctuation is normalised in all answers, number words, articles and contractions in the
    predicted one alone; and where all people agree, nothing is.

    people: what they answered, or `soft_scores` of it, by which answers are looked up as they are.
    """
    if isinstance(people, Mapping):
        return people.get(answer, 0.0)
    answer, people = _stripped(answer), [_stripped(one) for one in people]
    if len(set(people)) > 1:
        answer, people = normalised(answer), [_punctuation(one) for one in people]
    equal = sum(one == answer for one in people)
    return sum(min(1.0, (equal - (one == answer)) / 3) for one in people) / len(people)


def soft_scores(people: Iterable[str]) -> dict[str, float]:
    """Answer -> its accuracy among ten people: given by one .3, two .6, three .9, four or more 1."""
    return {answer: min(3 * count, 10) / 10 for answer, count in Counter(people).items()}


def frequent_answers(answers: Iterable[str]) -> list[str]:
    """Those that are found `FREQUENT` times once they are normalised, in the order in which they are found first."""
    return [answer for answer, count in Counter(map(normalised, answers)).items() if count >= FREQUENT]


def normalised(answer: str) -> str:
    """As the server normalises: punctuation, case, number words, articles, contractions; maybe nothing is left."""
    words = (_NUMBERS.get(word, word) for word in _punctuation(answer).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(answer: str) -> str:
    comma_in_number = re.search(r"\d,\d", answer)
    found = answer
    for mark in _MARKS:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        found = found.replace(mark, "" if beside_space or comma_in_number else " ")
    return re.sub(r"\.(?!\d)", "", found)
