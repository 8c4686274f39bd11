"""Makes the list of answers that METER chooses from, out of VQA's annotations, and says how many questions it answers.

    python scripts/make_answers.py --out answers.json v2_mscoco_train2014_annotations.json \\
        v2_mscoco_val2014_annotations.json

In the list are the most frequent answers to each question (`multiple_choice_answer`), normalised, if the files together
have them nine times or more, in order of appearance: 3,129 of train and val. docs/data.md says what is made of them.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # for where the package is not installed

from training.errors import reason  # noqa: E402
from training.evaluation.vqa_accuracy import frequent_answers  # noqa: E402
from training.files import written_whole  # noqa: E402


def read(file: str) -> list[tuple[str, set[str]]]:
    """Of each question, the most frequent answer, and all that people gave."""
    annotations = json.loads(Path(file).read_text(encoding="utf-8"))["annotations"]
    return [(one["multiple_choice_answer"], {said["answer"] for said in one["answers"]}) for one in annotations]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("annotations", nargs="+", help="VQA's files of annotations, train first")
    parser.add_argument("--out", type=Path, required=True, help="JSON list of answers to write")
    args = parser.parse_args(argv)
    if args.out.is_dir():
        parser.error(f"--out {args.out} is a folder; name a file")
    questions = {}
    for file in args.annotations:
        try:
            questions[file] = read(file)
        except OSError as error:
            parser.error(f"{file} cannot be read ({reason(error)})")
        except (ValueError, KeyError, TypeError) as error:
            parser.error(f"{file} is not a file of VQA's annotations ({type(error).__name__}: {reason(error)})")
    answers = frequent_answers(most for found in questions.values() for most, _ in found)
    if not answers:
        parser.error("not one answer is frequent enough: give the annotations of train and val")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(args.out) as file:
        file.write(json.dumps(answers).encode() + b"\n")
    print(f"{len(answers):,} answers in {args.out}")
    for name, found in questions.items():
        without = sum(said.isdisjoint(answers) for _, said in found)
        print(f"{name}: {len(found):,} questions, {without:,} of them without any of these answers")


if __name__ == "__main__":
    main()
