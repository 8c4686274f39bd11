"""Makes a WordPiece vocabulary from the captions of shards, for a fusion model where BERT's cannot be downloaded.

    python scripts/make_vocabulary.py --out data/vocabulary 'data/openmoji-64/train/{00000..00003}.tar'
    python -m training.main --model ALBEF-Nano-8-64-ELIP --text-tokenizer data/vocabulary ...
"""
from __future__ import annotations

import argparse
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import braceexpand
from tokenizers.implementations import BertWordPieceTokenizer


def captions(shards: list[str]) -> Iterator[str]:
    for shard in shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".txt"):
                    yield archive.extractfile(member).read().decode("utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shards", nargs="+", help="shards, braces allowed; their .txt files are read")
    parser.add_argument("--out", type=Path, required=True, help="folder for vocab.txt and tokenizer_config.json")
    parser.add_argument("--size", type=int, default=4096, help="words and pieces at most, special ones included")
    args = parser.parse_args(argv)
    shards = [shard for pattern in args.shards for shard in braceexpand.braceexpand(pattern)]
    if missing := [shard for shard in shards if not Path(shard).is_file()]:
        parser.error(f"there is no shard {missing[0]}")
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(captions(shards), vocab_size=args.size, min_frequency=2, show_progress=False)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(args.out))
    (args.out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}) + "\n")
    print(f"{tokenizer.get_vocab_size():,} pieces in {args.out}")


if __name__ == "__main__":
    main()
