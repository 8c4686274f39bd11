"""The table at the end of the quick start, from made-up run folders with known answers."""

import json

import pytest
import quickstart_report as report
import yaml

RESULTS = {
    "epoch": 2,
    "num_samples": 200,
    "clip_val_loss": 3.0,
    **{f"{way}_R@{k}": k / 20 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
    "zeroshot-val-top1": 0.25,
    "zeroshot-val-top5": 0.5,
    "zeroshot-val-mean_per_class_recall": 0.2,
    "zeroshot-val-classes": 50,
}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"epochs": 2, "model": "Some-Model", "batch_size": 32}))
    columns = "step,epoch,samples,loss,lr,samples_per_second,rrt"
    # Two processes with 32 each: the global batch is 64.
    rows = ["0,0,64,4.5,1e-5,5,0.28", "1,0,128,4,1e-4,90,0.28", "2,1,192,3,1e-4,100,0.28", "3,1,256,2,0,110,0.28"]
    (folder / "train.csv").write_text("\n".join([columns, *rows]) + "\n")
    old = RESULTS | {"epoch": 1, "zeroshot-val-top1": 0.01}
    (folder / "checkpoints" / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (old, RESULTS)))
    (folder / "checkpoints" / "epoch_2.pt").write_bytes(b"")
    return folder


def test_table(run, capsys):
    assert report.table(report.Run.read(run)) == [
        ("loss, first step", "4.500", "4.159"),
        ("loss, mean of the last epoch", "2.500", "4.159"),
        ("zero-shot top-1, 50 classes", "25.0%", "2.0% (x 12.5)"),
        ("zero-shot top-5, 50 classes", "50.0%", "10.0% (x 5.0)"),
        ("zero-shot mean of classes, 50 classes", "20.0%", "2.0% (x 10.0)"),
        *(
            (f"{way} R@{k}, 200 pairs", f"{5 * k}.0%", f"{k / 2}% (x 10.0)")
            for way in ("image to text", "text to image") for k in (1, 5, 10)
        ),
        ("removed tokens in training (RRT)", "28.0%", ""),
        ("samples/s, median", "100.0", ""),
    ]
    assert report.main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Some-Model: 2 epochs, 256 samples" and lines[-1] == f"The run is in {run}"
    assert len({line.index("%") for line in lines if "%" in line}) == 1  # the column is aligned


def test_an_albef_has_both_rankings_and_no_loss_of_guessing(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"val_rerank": 64}))
    (run / "train.csv").write_text("step,epoch,samples,loss,ita,itm,mlm,samples_per_second\n0,0,64,14,6,1,7,5\n")
    again = {f"reranked_{way}_R@{k}": k / 10 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    (run / "checkpoints" / "results.jsonl").write_text(json.dumps(RESULTS | again) + "\n")
    lines = report.table(report.Run.read(run))
    assert lines[0] == ("loss, first step", "14.000", "")
    assert ("image to text R@5", "25.0%", "2.5% (x 10.0)") in [(n.split(",")[0], *rest) for n, *rest in lines]
    assert ("text to image R@5, best 64 re-ranked, 200 pairs", "50.0%", "2.5% (x 20.0)") in lines


def test_a_meter_says_what_of_matching_and_of_masked_words_is_right(run):
    found = {"epoch": 2, "val-itm_accuracy": 0.75, "val-mlm_accuracy": 0.5}
    (run / "checkpoints" / "results.jsonl").write_text(json.dumps(found) + "\n")
    lines = report.table(report.Run.read(run))
    assert lines[2:4] == [("matching right", "75.0%", "50.0%"), ("masked words right", "50.0%", "")]


def test_finished_needs_the_last_evaluation_and_the_last_checkpoint(run, capsys):
    assert report.main(["--is-finished", str(run)]) == 0
    (run / "checkpoints" / "epoch_2.pt").rename(run / "checkpoints" / "epoch_1.pt")
    assert report.main(["--is-finished", str(run)]) == 1
    assert report.main([str(run)]) == 0
    (run / "checkpoints" / "epoch_1.pt").rename(run / "checkpoints" / "epoch_2.pt")
    (run / "checkpoints" / "results.jsonl").write_text(json.dumps(RESULTS | {"epoch": 1}) + "\n")
    assert report.main(["--is-finished", str(run)]) == 1
    out = capsys.readouterr()
    assert "NOT FINISHED" in out.out and out.err == ""


def test_without_evaluation_only_training_is_shown(run):
    (run / "checkpoints" / "results.jsonl").unlink()
    names = [name for name, _, _ in report.table(report.Run.read(run))]
    assert names == [
        "loss, first step", "loss, mean of the last epoch", "removed tokens in training (RRT)", "samples/s, median"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "file, content, sentence",
    [
        ("config.yaml", None, "has no config.yaml"),
        ("train.csv", None, "has no train.csv"),
        ("train.csv", "", "has not logged a training step yet"),
        ("train.csv", "step,epoch,samples,loss\n0,0,64,4.5\n1,0,12", "cannot be read"),
        ("checkpoints/results.jsonl", '{"epoch": 2}\n{"epo', "cannot be read"),
        ("config.yaml", "a: [", "cannot be read"),
    ],
)
def test_a_damaged_run_gives_one_sentence(run, capsys, file, content, sentence):
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    assert report.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert report.main(["--is-finished", str(run)]) == 1
