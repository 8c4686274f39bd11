"""Re-ranked retrieval: known answers from a table of scores; the command, with one process and with two, on files."""
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from open_clip_elip import identity as identities
from training import retrieval
from training.data.pixels import Images
from training.data.sets.captioned import load_captions
from training.distributed import Ranks, leave
from training.evaluation.pairs import evaluate_pairs
from training.evaluation.passes import NotFinite
from training.evaluation.rerank import rerank

from ...processes import spawn
from ..data.sets.layout_files import write_folder
from ..fusion_runs import ALBEF, write_albef
from ..runs import WORDS, picture, records

ONE = Ranks(torch.device("cpu"))

class Table:
    """Knows the score of each image, whose state is its number, and each text, which is its number after a `[CLS]`."""

    pad, adds_cosine = 0, False

    def __init__(self, scores):
        self.scores, self.asked = scores, []

    def text_states(self, text):
        return text[:, :, None].float()

    def read(self, states):
        return states

    def match(self, states, text, memory):
        assert torch.equal(states[:, :, 0].long(), text)
        image, texts = int(memory), text[:, 1] - 2
        self.asked += [(image, t) for t in texts.tolist()]
        return torch.stack([-self.scores[image, texts], self.scores[image, texts]], dim=1)


def from_table(scores, image_of, features, best, same_text=None):
    """`rerank`, the images in batches of two, of texts of several lengths."""
    model, count = Table(scores), len(image_of)
    tokens = torch.zeros(count, 5, dtype=torch.int64)
    for row in range(count):
        tokens[row, : 2 + row % 4] = 1
        tokens[row, 1] = row + 2
    states = [(rows, rows[:, None, None].float()) for rows in torch.arange(len(scores)).split(2)]
    found = rerank(
        model, features, tokens, states, best=best, ranks=ONE, precision="fp32", image_of=image_of,
        same_text=same_text, name=lambda image, text: f"the scores of image {image} and text {text}",
    )  # fmt: skip
    return found, model.asked


def slowly(scores, right, near, n):
    """Share of the rows whose best right one among the `near` (rows of numbers) is among the first n of them."""
    hits = 0
    for row, listed in enumerate(near):
        own = [scores[row, i] for i in listed if right[row, i]]
        hits += bool(own) and int(sum(scores[row, i] >= max(own) for i in listed if not right[row, i])) < n
    return hits / len(scores)


@pytest.mark.parametrize("best", [1, 3, 7, 10, 50])
@pytest.mark.parametrize("equal", [False, True])
def test_equals_slow_ranking(best, equal):
    torch.manual_seed(best)
    image_of = torch.arange(12).repeat_interleave(torch.tensor([1, 2, 3] * 4))
    scores, same_text = torch.randn(12, 24), torch.arange(24) % 20 if equal else None
    features = [F.normalize(torch.randn(count, 4), dim=1) for count in (12, 24)]
    labels = image_of if same_text is None else same_text
    right = torch.tensor([[any(labels[image_of == i] == t) for t in labels] for i in range(12)])
    cosine = features[0] @ features[1].T
    near = {"image_to_text": cosine.argsort(dim=1, descending=True)[:, :best].tolist()}
    near["text_to_image"] = cosine.T.argsort(dim=1, descending=True)[:, :best].tolist()

    found, asked = from_table(scores, image_of, features, best, same_text)
    expected = {
        f"reranked_{way}_R@{n}": slowly(*sides, near[way], n)
        for way, sides in (("image_to_text", (scores, right)), ("text_to_image", (scores.T, right.T)))
        for n in (1, 5, 10)
        if n <= best
    }
    if best >= 10:
        expected["reranked_r_mean"] = sum(expected.values()) / 6
    assert found == pytest.approx(expected, abs=1e-12)
    wanted = {(i, t) for i, texts in enumerate(near["image_to_text"]) for t in texts}
    wanted |= {(i, t) for t, images in enumerate(near["text_to_image"]) for i in images}
    assert len(asked) == len(wanted) and set(asked) == wanted  # each once


def test_one_image():
    found, _ = from_table(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), [torch.ones(1, 1)] * 2, 256)
    assert set(found.values()) == {1.0}


def test_ties_count_against_the_model():
    """Scores that are equal, up to the rounding of float32, are no answer; nor is the order of the shortlist."""
    own, features = torch.arange(30), [torch.eye(30)] * 2
    for scores in (torch.zeros(30, 30), 5 + 1e-6 * torch.rand(30, 30)):
        assert set(from_table(scores, own, features, 30)[0].values()) == {0.0}
    assert set(from_table(torch.eye(30), own, features, 30)[0].values()) == {1.0}


def test_random_scores_are_at_chance():
    torch.manual_seed(0)
    features = [F.normalize(torch.randn(400, 4), dim=1) for _ in range(2)]
    found, _ = from_table(torch.randn(400, 400), torch.arange(400), features, 400)
    assert found["reranked_image_to_text_R@10"] == pytest.approx(10 / 400, abs=0.02)


def test_a_score_that_is_no_number_is_refused():
    scores = torch.zeros(6, 6)
    scores[4, 3] = torch.nan
    with pytest.raises(NotFinite, match="The scores of image 4 and text 3 are not finite"):
        from_table(scores, torch.arange(6), [torch.eye(6)] * 2, 6)


# --- a model and files ---


@pytest.fixture(scope="module")
def albef(tmp_path_factory):
    """A folder for `local-dir:` with vocabulary and weights; in training captions have four tokens."""
    folder, short = tmp_path_factory.mktemp("albef"), {"text_cfg": ALBEF["text_cfg"] | {"context_length": 4}}
    model = identities.create(identities.describe(write_albef(folder, **short)))
    with torch.no_grad():
        for parameter in model.parameters():  # far from each other, which small weights would not tell
            parameter.add_(0.2 * torch.randn_like(parameter) * (parameter.ndim > 0))
    write_albef(folder, model.state_dict(), **short)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Fourteen, one of them broken, with up to three captions of up to eight words, as a JSON list."""
    write_folder(tmp_path / "set", {f"{i}.png": picture(i) if i != 7 else b"" for i in range(14)})
    named = [f"{WORDS[i % 8]} {WORDS[i // 8]}" for i in range(14)]
    captions = [[f"{named[i]} {WORDS[k]}{' thing' * (i % 4)}" for k in range(1 + i % 3)] for i in range(14)]
    path = tmp_path / "set" / "set.json"
    path.write_text(json.dumps([{"image": f"{i}.png", "caption": texts} for i, texts in enumerate(captions)]))
    return path


def command(model, data, results, *more):
    return ["--model", model, "--data", f"noise={data}", "--results", str(results), "--batch-size", "4", "--workers",
            "0", "--device", "cpu", "--precision", "fp32", *more]  # fmt: skip


def test_command(albef, pictures, tmp_path, capsys):
    """Equal to every pair by itself; both rankings are shown; K is part of what the result depends on."""
    words = command(f"local-dir:{albef}", pictures, tmp_path / "results")
    assert retrieval.main([*words, "--rerank", "10"]) == 0
    (record,) = records(tmp_path / "results")
    assert record["settings"]["rerank"] == 10 and len(record["skipped"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown[2:4]] == ["noise", "noise, best 10 re-ranked"]

    identity = identities.describe(f"local-dir:{albef}")
    model, tokenizer, transform = identities.create(identity).eval(), *map(
        lambda make: make(identity), (identities.tokenizer, identities.transform)
    )
    model.load_state_dict(torch.load(albef / "open_clip_pytorch_model.bin", weights_only=True))
    data = load_captions(str(pictures))
    good = [i for i in range(14) if i != 7]
    kept = [c for c, image in zip(data.captions, data.image_of.tolist(), strict=True) if image != 7]
    image_of = torch.tensor([good.index(i) for i in data.image_of.tolist() if i != 7])
    with torch.no_grad():
        image, text = torch.stack([transform(data.images.load(i)) for i in good]), tokenizer(kept, 30)
        i, t = model.image_states(image), model.text_states(text)
        scores = torch.stack(
            [torch.cat([model.match(t[[j]], text[[j]], model.read(i[[k]]))[:, 1] for j in range(len(t))])
             for k in range(len(i))]
        )  # fmt: skip
        cosine = model.encode_image(image, normalize=True) @ model.encode_text(text, normalize=True).T
    right = image_of == torch.arange(len(i))[:, None]
    for way, sides in (("image_to_text", (scores, right)), ("text_to_image", (scores.T, right.T))):
        near = (cosine if way == "image_to_text" else cosine.T).argsort(dim=1, descending=True)[:, :10].tolist()
        for n in (1, 5, 10):
            assert record["metrics"][f"reranked_{way}_R@{n}"] == pytest.approx(slowly(*sides, near, n)), (way, n)
    assert 0 < record["metrics"]["reranked_r_mean"] < 1

    assert retrieval.main([*words, "--rerank", "4"]) == 0
    assert len(records(tmp_path / "results")) == 2
    assert capsys.readouterr().out.splitlines()[3].split()[-1] == "-"  # of four, none is the tenth
    assert retrieval.main(words) == 0
    (plain,) = (r["metrics"] for r in records(tmp_path / "results") if "rerank" not in r["settings"])
    assert plain == {name: value for name, value in record["metrics"].items() if not name.startswith("reranked")}


def test_two_processes(albef, pictures, tmp_path):
    def words(name):
        return command(f"local-dir:{albef}", pictures, tmp_path / name, "--rerank", "12")

    spawn(rank_main, words("two"))
    assert retrieval.main(words("one")) == 0
    (one,), (two,) = (records(tmp_path / name) for name in ("one", "two"))
    assert {**one, "date": ""} == {**two, "date": ""}


def rank_main(rank, words):
    leave()
    assert retrieval.main(words) == 0


def test_a_released_file(albef, pictures, tmp_path):
    """Fine-tuned for retrieval, without language head and momentum copy; at another resolution, and with reduction."""
    from open_clip_elip.fusion.released import albef as names_of
    from open_clip_elip.fusion.released import read_released

    state = torch.load(albef / "open_clip_pytorch_model.bin", weights_only=True)
    ours = {name: value for name, value in state.items() if not name.startswith("mlm_head")}
    names = released_names(ours)
    assert set(read_released(names, names_of(2)).model) == set(ours)
    torch.save({"model": names}, tmp_path / "flickr30k.pth")
    results = tmp_path / "results"
    words = command(f"local-dir:{albef}", pictures, results, "--rerank", "12")
    assert retrieval.main(words) == 0
    released = [*words, "--pretrained", str(tmp_path / "flickr30k.pth"), "--text-tokenizer", str(albef)]
    assert retrieval.main(released) == 0
    first, second = (record["metrics"] for record in records(results))
    assert first == second
    for more in (["--force-image-size", "48"], ["--vision-guided-reduction"]):
        assert retrieval.main([*released, *more]) == 0
    assert len({json.dumps(record["metrics"]) for record in records(results)}) == 3


def released_names(state):
    """Weights of the small model by the names of a released file of retrieval."""
    found = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        if head == "visual":
            for ours, theirs in (
                ("conv1.", "patch_embed.proj."), ("class_embedding", "cls_token"),
                ("positional_embedding", "pos_embed"), ("transformer.resblocks.", "blocks."), (".ln_1.", ".norm1."),
                (".ln_2.", ".norm2."), (".attn.in_proj_", ".attn.qkv."), (".attn.out_proj.", ".attn.proj."),
                (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."), ("ln_post.", "norm."),
            ):  # fmt: skip
                rest = rest.replace(ours, theirs)
            shape = {"cls_token": (1, 1, -1), "pos_embed": (1, *value.shape)}.get(rest, value.shape)
            found[f"visual_encoder.{rest}"] = value.reshape(shape)
        elif head == "text":
            found[f"text_encoder.{rest}"] = value
        elif head == "fusion":
            number, _, rest = rest.partition(".")
            found[f"text_encoder.encoder.layer.{2 + int(number)}.{rest}"] = value
        else:
            found[name] = value
    return found


def test_a_model_without_fusion_layers(model, pictures, tmp_path, capsys):
    assert retrieval.main(command(f"local-dir:{model}", pictures, tmp_path / "results", "--rerank", "10")) == 2
    assert "--rerank is for models with fusion layers" in capsys.readouterr().err


def test_pairs_of_a_run(albef):
    """What a run evaluates on its validation pairs, also where some of them cannot be read."""
    identity = identities.describe(f"local-dir:{albef}")
    model = identities.create(identity)
    model.load_state_dict(torch.load(albef / "open_clip_pytorch_model.bin", weights_only=True))
    options = SimpleNamespace(precision="fp32", batch_size=4, siglip=False)
    texts = identities.tokenizer(identity)([f"{one} {two}" for one in WORDS[:3] for two in WORDS[:4]])
    image, index = torch.randn(12, 3, 32, 32), 3 * torch.arange(12)
    batches = [
        {"image": Images(image[rows]), "text": texts[rows], "index": index[rows], "key": index[rows].tolist()}
        for rows in torch.arange(12).split(5)
    ]
    plain = evaluate_pairs(model, batches, options, ONE)
    found = evaluate_pairs(model, batches[::-1], options, ONE, rerank_best=10)
    assert model.training
    assert plain.items() <= found.items() and len(found) == len(plain) + 7
    model.itm_head.bias.data += torch.nan
    with pytest.raises(NotFinite, match="The matching scores of the pair 0 are not finite"):
        evaluate_pairs(model, batches, options, ONE, rerank_best=10)
