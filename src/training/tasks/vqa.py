"""Visual question answering: a decoder learns the answers that people gave, and ranks a list of them."""
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_elip.fusion.albef import AlbefAnswerer
from open_clip_elip.fusion.bert import Memory
from open_clip_elip.fusion.blip import BlipAnswerer
from open_clip_elip.fusion.generate import beam_search
from open_clip_elip.fusion.steps import SMOOTHING

from ..data.arrow import LeftOut
from ..data.lists import Item, ReadItem, text_of
from ..errors import UserError
from ..evaluation.vqa_accuracy import soft_scores, vqa_accuracy
from .base import Batch, Progress
from .downstream import Prepared, Setting, read_answers
from .fused import FusedEncoding, ListSuite, trimmed
from .momentum import DistilledTask

GENOME_WEIGHT = {"albef": 0.5, "blip": 0.2}  # of an answer of Visual Genome, which has one a question
People = Sequence[str] | Mapping[str, float]
LONGEST = 10  # tokens of an answer that is written


def read_item(
    item: Item, train: bool = False, genome: float = GENOME_WEIGHT["albef"]
) -> tuple[Sequence[str], dict[str, Any]] | str:
    """{"image", "question"}; to train on, "answer": a list of what people said (VQA), or a text (Visual Genome);
    to evaluate, a "question_id", and people's answers, or "answer_scores" as METER's files have them, if there are any.
    genome: weight of Visual Genome's."""
    image, question, answer = text_of(item, "image"), text_of(item, "question"), item.get("answer", [])
    if image is None or question is None:
        return f'it has no "{"image" if image is None else "question"}"'
    people = [answer] if isinstance(answer, str) else answer
    if not isinstance(people, list) or not all(isinstance(one, str) for one in people):
        return 'its "answer" is neither a text nor a list of texts'
    share = genome if isinstance(answer, str) else 1 / max(1, len(people))
    weights = {one: count * share for one, count in Counter(people).items() if one.strip()}
    scores = item.get("answer_scores", {})
    given = scores.values() if isinstance(scores, dict) else [None]
    if not all(isinstance(one, float | int) and 0 <= one <= 1 for one in given):
        return "it does not have a score from 0 to 1 for each answer"
    if train and not weights:
        given = "it has scores and not what people answered" if scores else 'it has no "answer"'
        return f"{given} to learn from"
    people = people or scores
    return (image,), {"text": question, "answers": weights, "people": people, "question_id": item.get("question_id")}


def read_labels(
    item: Item, numbers: Mapping[str, int], train: bool = False
) -> tuple[Sequence[str], dict[str, Any]] | str:
    """As `read_item`, with "labels": {number of an answer that people gave: its `soft_scores`}, by `numbers` in a list.

    Left out are questions to which people gave no answer of the list; with `train`, those without people's answers too.
    """
    found = read_item(item)
    if isinstance(found, str):
        return found
    pictures, fields = found
    people = fields["people"]
    scores = people if isinstance(people, dict) else soft_scores(people)
    labels = {numbers[answer]: score for answer, score in scores.items() if answer in numbers}
    if not labels and (people or train):
        return LeftOut("question without an answer of the list")
    return pictures, fields | {"labels": labels}


class AnswersEncoding(FusedEncoding):
    """Batches with "answers" (A, T), token ids of all answers to the B questions; "which" (A,) the question of each;
    "weights" (A,).

    Args:
        answer_tokens: from a list of answers to (A, T).
        others: see `FusedEncoding`.
    """

    def __init__(self, *args: Any, answer_tokens: Callable[[list[str]], Tensor]):
        super().__init__(*args, text="text")
        self.answer_tokens = answer_tokens

    def collate(self, encoded: list[tuple[list[Tensor], dict[str, Any]]]) -> dict[str, Any]:
        given = [(i, answer, weight) for i, (_, one) in enumerate(encoded) for answer, weight in one["answers"].items()]
        which, answers, weights = zip(*given, strict=True)
        return super().collate(encoded) | {
            "answers": trimmed(self.answer_tokens(list(answers)), 0),
            "which": torch.tensor(which),
            "weights": torch.tensor(weights),
        }


class VqaTask(DistilledTask):
    """Language modelling of weighted answers, with the twin's answers as part of the targets (ALBEF, Sec. 4.2).

    Args:
        reduce: remove tokens of the images, guided by the questions (Guo et al., Sec. 4.4.5).
        smoothing: of the labels.
        others: see `DistilledTask`.
    """

    def __init__(self, *args: Any, reduce: bool = False, smoothing: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reduce, self.smoothing = reduce, smoothing

    def losses(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        names = ("image", "text", "answers", "which")
        losses = model(self.step, *(batch[name] for name in names), alpha=self.weight(progress))
        return {"loss": (losses * batch["weights"]).sum() / len(batch["text"])}

    def step(
        self, model: AlbefAnswerer | BlipAnswerer, image: Tensor, text: Tensor, answers: Tensor, which: Tensor, *,
        alpha: float,
    ) -> Tensor:  # fmt: skip
        """Losses (A,) of answers, each the sum over its tokens but the first.

        Args:
            image, text: (Q, 3, H, W); (Q, L) questions.
            answers: (A, T) token ids.
            which: (A,) the question of each.
        """
        chosen = model.mask(answers)[:, 1:]

        def logits(model: AlbefAnswerer, reduce: bool) -> Tensor:
            states = model.answer_states(answers, model.read_questions(image, text, reduce), which)
            return model.lm_head(states[:, :-1][chosen])

        found, labels = logits(model, self.reduce), answers[:, 1:][chosen]
        losses = F.cross_entropy(found, labels, reduction="none", label_smoothing=self.smoothing)
        if self.twin is not None:
            with torch.no_grad():
                teacher = F.softmax(logits(self.twin, False), dim=-1)
            losses = (1 - alpha) * losses + alpha * F.cross_entropy(found, teacher, reduction="none")
        answer_of = torch.arange(len(answers), device=answers.device)[:, None].expand_as(chosen)[chosen]
        return losses.new_zeros(len(answers)).index_add(0, answer_of, losses)


@torch.no_grad()
def rank_answers(
    model: AlbefAnswerer | BlipAnswerer, memory: list[Memory], answers: Tensor, best: int, *,
    count_first_twice: bool = True, smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The answers of a list, ranked for each question.

    Args:
        memory: of Q questions, from `AlbefAnswerer.read_questions`.
        answers: (A, T) token ids.
        best: of how many, by their first token, the rest is looked at.
        count_first_twice: add the first token's probability to the whole answer's, which has it already, as the
            program of ALBEF does. False: the whole answer's alone.
        smoothing: of the labels by which whole answers are scored, as the released program of BLIP has it.

    Returns:
        (Q, best) numbers of answers, best first, and their probabilities among these; (Q, A) of all first tokens.
    """
    questions, best = len(memory[0].keys), min(best, len(answers))
    start = answers[:1, :1].expand(questions, 1)
    first = F.softmax(model.lm_head(model.answer_states(start, memory)[:, -1]), dim=-1)[:, answers[:, 1]]
    shortlist = first.topk(best).indices
    found, which = answers[shortlist.flatten()], torch.arange(questions, device=answers.device).repeat_interleave(best)
    logits = model.lm_head(model.answer_states(found, memory, which)[:, :-1])
    tokens = F.cross_entropy(logits.transpose(1, 2), found[:, 1:], reduction="none", label_smoothing=smoothing)
    tokens = tokens * model.mask(found)[:, 1:]
    scores = -tokens.sum(dim=1).view(questions, best)
    if count_first_twice:
        scores = scores + first.gather(1, shortlist).log()
    probabilities, order = F.softmax(scores, dim=1).sort(dim=1, descending=True)
    return shortlist.gather(1, order), probabilities, first


class Ranking:
    """Evaluation: the best answer of a list to each question.

    Args:
        answers: what there is to choose from.
        tokens: (A, T) their token ids.
        people: for each question of the list, what `vqa_accuracy` takes; [] where that is not known.
        best, others: see `rank_answers`.
    """

    def __init__(
        self, answers: Sequence[str], tokens: Tensor, people: Sequence[People], best: int,
        count_first_twice: bool = True, reduce: bool = False, smoothing: float = 0.0,
    ):  # fmt: skip
        self.answers, self.tokens, self.people, self.best = answers, tokens, people, best
        self.more, self.reduce = {"count_first_twice": count_first_twice, "smoothing": smoothing}, reduce
        self.said: dict[int, str] = {}  # by place in the list, after an evaluation

    def rows(self, model: AlbefAnswerer | BlipAnswerer, batch: Mapping[str, Any]) -> Tensor:
        memory = model.read_questions(batch["image"], batch["text"], self.reduce)
        tokens = self.tokens.to(batch["text"].device)
        numbers, _, _ = rank_answers(model, memory, tokens, self.best, **self.more)
        return numbers[:, :1]

    def texts(self, rows: Tensor) -> list[str]:
        """Of `rows`, the answers."""
        return [self.answers[number] for number in rows[:, 0].tolist()]

    def metrics(self, rows: Tensor, places: Tensor) -> dict[str, float]:
        """Accuracy over the questions whose answers are known, and how often the list holds one that people gave."""
        self.said = dict(zip(places.tolist(), self.texts(rows), strict=True))
        known = [(said, self.people[place]) for place, said in self.said.items() if self.people[place]]
        if not known:
            return {}
        answers, found = set(self.answers), sum(vqa_accuracy(said, people) for said, people in known)
        answerable = sum(not answers.isdisjoint(people) for _, people in known)
        more = {"answerable": answerable / len(known)} if answers else {}
        return {"accuracy": found / len(known), **more}

    def submitted(self, question_ids: Sequence[Any]) -> list[dict[str, Any]]:
        """What VQA's server takes: [{"question_id", "answer"}], each question once."""
        said = {question_ids[place]: answer for place, answer in sorted(self.said.items())}
        return [{"question_id": number, "answer": answer} for number, answer in said.items()]


class Writing(Ranking):
    """Evaluation: an answer that is written, by beams.

    Args:
        pieces: the tokenizer of transformers.
        others: see `Ranking`; there are no answers to choose from.
    """

    def __init__(self, pieces: Any, people: Sequence[People], reduce: bool):
        super().__init__([], torch.empty(0), people, 0, reduce=reduce)
        self.pieces = pieces

    def rows(self, model: BlipAnswerer, batch: Mapping[str, Any]) -> Tensor:
        memory = model.read_questions(batch["image"], batch["text"], self.reduce)
        start = torch.tensor([model.decode_id], device=batch["text"].device)
        return beam_search(model.decoder, memory, start, self.pieces.sep_token_id, longest=LONGEST, shortest=1)

    def texts(self, rows: Tensor) -> list[str]:
        return self.pieces.batch_decode(rows[:, 1:], skip_special_tokens=True)


def ended(answer: str) -> str:
    """As answers are learnt: as they are, with an end."""
    return f"{answer}[SEP]"


def prepare(setting: Setting) -> Prepared:
    options, reduce = setting.options, setting.options.vision_guided_reduction
    rules, family, tokenizer = setting.rules, setting.built.identity.family, setting.built.tokenizer
    blip = family == "blip"
    if options.generate and not blip:
        raise UserError("--generate is for BLIP models: leave it out.")
    smoothing = SMOOTHING if blip else 0.0
    task = VqaTask(setting.built.model, reduce=reduce, smoothing=smoothing, **setting.twin())
    answer_tokens, cut = setting.words(str if blip else ended), rules.longest_question or tokenizer.context_length
    train = AnswersEncoding(setting.transform(True), setting.words(rules.question, cut), answer_tokens=answer_tokens)
    words = setting.words(partial(rules.question, words=50), rules.longest_question)
    test = FusedEncoding(setting.transform(False), words, "text")
    answers = read_answers(options.answers) if setting.lists() and not options.generate else []

    def ranking_of(fields: Sequence[Mapping[str, Any]]) -> Ranking:
        people = [one["people"] for one in fields]
        if options.generate:
            return Writing(tokenizer.pieces, people, reduce)
        twice, tokens = not (options.count_first_once or blip), trimmed(answer_tokens(answers), 0)
        return Ranking(answers, tokens, people, options.vqa_best, twice, reduce, smoothing)

    task.suite, finish = evaluated(setting, read_item, test, ranking_of)
    read = partial(read_item, train=True, genome=GENOME_WEIGHT[family])
    return Prepared(task, setting.train_data(read, train), finish)


def evaluated(
    setting: Setting, read: ReadItem, encoding: FusedEncoding, ranking_of: Callable[..., Ranking]
) -> tuple[ListSuite, Callable | None]:
    """The evaluations on lists, and what writes the answers at the end (None: nothing); `ranking_of` the fields of a
    list's samples."""
    options, evaluations, finish = setting.options, {}, None
    for name in setting.lists():
        rows = setting.rows(name, read)
        fields = [sample.fields for sample in map(rows.__getitem__, range(len(rows)))]
        few = sum(0 < len(one["people"]) < 4 for one in fields if not isinstance(one["people"], dict))
        if few:
            logging.warning(
                f"{rows.name}: {few} of {len(fields)} questions have fewer than four people's answers; by the rule of "
                "VQA's server no answer to them is wholly right, and where there is one answer none is right at all."
            )
        ranking = ranking_of(fields)
        evaluations[name] = setting.evaluation(rows, encoding, ranking.rows, ranking.metrics)
        if options.submission is not None:  # the last list's
            if None in (ids := [one["question_id"] for one in fields]):
                raise UserError(f'Item {ids.index(None)} of {rows.name} has no "question_id" for --submission to name.')
            number, count = Counter(ids).most_common(1)[0]
            if count > 1:
                raise UserError(
                    f"{rows.name} has {count} questions of question_id {number}: --submission names each once."
                )
            finish = setting.submission(evaluations[name], partial(ranking.submitted, ids))
    return setting.suite(evaluations, "accuracy"), finish
