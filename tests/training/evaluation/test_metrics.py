import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.evaluation.metrics import best_ranks, contrastive_loss, outcomes, retrieval_metrics, summary


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def retrieval_ranks(query, gallery, target, chunk=1024):
    """Each query has one right item, and that item may be the right one of several queries."""
    queries, items = torch.arange(len(query)), torch.arange(len(gallery))
    return best_ranks(query, gallery, (queries, target), (items, items), chunk)


def ranks_by_sorting(query, gallery, target):
    order = (query.double() @ gallery.double().T).argsort(dim=1, descending=True)
    return (order == target[:, None]).nonzero()[:, 1]


class TestRetrievalRanks:
    @pytest.mark.parametrize("items,width", [(257, 512), (33, 100), (17, 3)])
    def test_collapsed_gallery_has_the_worst_rank(self, items, width):
        gallery = unit(width).expand(items, width)
        ranks = retrieval_ranks(unit(items, width), gallery, torch.arange(items), chunk=64)
        assert ranks.tolist() == [items - 1] * items

    def test_rounding_error_does_not_break_a_tie(self):
        # What an encoder gives for one and the same input in batches of different lengths.
        point = unit(64)
        gallery = point + point * torch.finfo(torch.float32).eps * torch.randint(-1, 2, (50, 64))
        assert len((gallery @ point).unique()) > 1
        ranks = retrieval_ranks(point.expand(50, 64), gallery, torch.arange(50))
        assert ranks.tolist() == [49] * 50

    def test_small_differences_beyond_rounding_count(self):
        gallery = torch.tensor([[1.0, 0.0], [1.0 - 1e-5, 0.0]])
        assert retrieval_ranks(gallery[:1], gallery, torch.tensor([0])).tolist() == [0]

    def test_low_precision_features_are_compared_in_float32(self):
        query, gallery = unit(40, 64).bfloat16(), unit(40, 64).bfloat16()
        target = torch.arange(40)
        assert torch.equal(retrieval_ranks(query, gallery, target), ranks_by_sorting(query, gallery, target))

    def test_leaves_the_precision_of_matrix_products_as_it_was(self):
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high")
            retrieval_metrics(unit(3, 4), unit(3, 4))
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision(before)


class TestRetrievalMetrics:
    def test_recall_counts_ranks_below_k(self):
        # image i has i texts above its own: ranks 0 ... 19
        own = [-i - 0.5 for i in range(20)]
        similarity = torch.tensor([[own[i] if j == i else -float((j - i) % 20) for j in range(20)] for i in range(20)])
        metrics = retrieval_metrics(similarity, torch.eye(20))
        assert [metrics[f"image_to_text_R@{k}"] for k in (1, 5, 10)] == [1 / 20, 5 / 20, 10 / 20]
        assert metrics["image_to_text_mean_rank"] == 10.5
        assert metrics["image_to_text_median_rank"] == 10


def slow_best_ranks(similarity, right):
    """By definition, in float64, query by query: wrong items that are not less similar than the best right one."""
    ranks = []
    for row, own in zip(np.asarray(similarity, dtype=np.float64), np.asarray(right), strict=True):
        best = max((s for s in row[own] if not np.isnan(s)), default=-np.inf)
        ranks.append(sum(not s < best for s in row[~own]))
    return ranks


def ranks_of(similarity, image_of, same_text=None, chunk=1024):
    """Ranks of images (rows) and of captions (columns) of a similarity matrix, by the function and by definition."""
    similarity = torch.as_tensor(similarity, dtype=torch.float32)
    n, m = similarity.shape
    image_of, texts = torch.as_tensor(image_of), torch.arange(m)
    pairs = set(zip(image_of.tolist(), image_of.tolist() if same_text is None else same_text, strict=True))
    image_labels = tuple(torch.tensor(sorted(pairs)).T)
    text_labels = (texts, image_of if same_text is None else torch.as_tensor(same_text))
    right = np.array([[(i, t) in pairs for t in text_labels[1].tolist()] for i in range(n)])
    fast = (
        best_ranks(similarity, torch.eye(m), image_labels, text_labels, chunk).tolist(),
        best_ranks(similarity.T, torch.eye(n), text_labels, image_labels, chunk).tolist(),
    )
    return fast, (slow_best_ranks(similarity, right), slow_best_ranks(similarity.T, right.T))


class TestBestRanks:
    # three images; captions 0 and 1 are of image 0, caption 2 of image 1, captions 3 and 4 of image 2
    image_of = [0, 0, 1, 2, 2]
    similarity = [
        [9, 8, 1, 2, 3],  # both own captions in front
        [7, 6, 5, 4, 3],  # two before the only own one
        [4, 1, 3, 2, 4],  # its best own one, the last, is tied with a wrong one
    ]

    def test_hand_made(self):
        (images, captions), slow = ranks_of(self.similarity, self.image_of)
        assert images == [0, 2, 1]
        assert captions == [0, 0, 0, 2, 0]
        assert (images, captions) == slow

    def test_nan(self):
        nan = float("nan")
        features = torch.tensor([[1.0, 0], [0, 1], [nan, nan]])
        queries = torch.arange(3)
        text = torch.tensor([[1.0, 0], [nan, 0], [0, 1], [0, 1], [0.5, 0.5]])
        labels = (torch.arange(5), torch.tensor([0, 0, 1, 1, 2]))
        # image 0: its NaN caption is not the best and does not count; image 1: that one does; image 2: worst of all
        assert best_ranks(features, text, (queries, queries), labels).tolist() == [0, 1, 4]
        # caption 1 is NaN, and each caption has the NaN image before its own
        assert best_ranks(text, features, labels, (queries, queries)).tolist() == [1, 2, 1, 1, 2]
        assert best_ranks(features, text * nan, (queries, queries), labels).tolist() == [3, 3, 4]

    @pytest.mark.parametrize("seed", range(20))
    def test_equals_the_definition(self, seed):
        """On small whole numbers, so that float32 is exact and ties are many."""
        random = np.random.default_rng(seed)
        n = int(random.integers(1, 9))
        image_of = random.permutation(np.concatenate([np.arange(n), random.integers(0, n, random.integers(0, 30))]))
        similarity = random.integers(-4, 5, (n, len(image_of))).astype(np.float32)
        for same_text in (None, random.integers(0, 2 + len(image_of) // 2, len(image_of)).tolist()):
            fast, slow = ranks_of(similarity, image_of, same_text, chunk=int(random.integers(1, 9)))
            assert fast == slow

    def test_never_holds_more_than_a_chunk_of_similarities(self):
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
                return out

        text, image_of = unit(300, 4), torch.arange(300) // 5
        with Watch():
            retrieval_metrics(unit(60, 4), text, image_of, torch.zeros(300, dtype=torch.int64), chunk=10)
        assert largest == 10 * 300


class TestCaptionRetrievalMetrics:
    def test_hand_made(self):
        similarity = torch.tensor(TestBestRanks.similarity, dtype=torch.float32)
        metrics = retrieval_metrics(similarity, torch.eye(5), torch.tensor(TestBestRanks.image_of))
        image = {"mean_rank": 2.0, "median_rank": 2.0, "R@1": 1 / 3, "R@5": 1.0, "R@10": 1.0}  # ranks 0, 2, 1
        text = {"mean_rank": pytest.approx(1.4), "median_rank": 1.0, "R@1": 4 / 5, "R@5": 1.0, "R@10": 1.0}
        expected = {f"image_to_text_{name}": value for name, value in image.items()}
        assert metrics == expected | {f"text_to_image_{name}": value for name, value in text.items()}

    def test_equal_captions(self):
        image, image_of = unit(20, 8), torch.arange(20).repeat_interleave(2)
        text = image[image_of]
        text[1::2] = image[(image_of[1::2] + 1) % 20]  # the second caption of each is the first of the next
        same_text = torch.stack([torch.arange(20), (torch.arange(20) + 1) % 20], dim=1).flatten()
        plain = retrieval_metrics(image, text, image_of)
        equal = retrieval_metrics(image, text, image_of, same_text)
        assert (plain["image_to_text_R@1"], plain["text_to_image_R@1"]) == (0, 0.5)
        assert (equal["image_to_text_R@1"], equal["text_to_image_R@1"]) == (1, 1)
        different = retrieval_metrics(image, text, image_of, torch.arange(40))
        assert different == plain

    @pytest.mark.parametrize("k", [1, 5, 10])
    def test_equals_clip_benchmark(self, k):
        """Its recall at k on the same features, where no two similarities are equal."""
        theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
        image, image_of = unit(37, 6), torch.arange(37).repeat_interleave(torch.randint(1, 7, (37,)))
        text = F.normalize(image[image_of] + 0.6 * torch.randn(len(image_of), 6), dim=-1)
        ours = retrieval_metrics(image, text, image_of)
        scores = text @ image.T
        positive = torch.zeros_like(scores, dtype=torch.bool)
        positive[torch.arange(len(scores)), image_of] = True
        for name, recall in (
            ("text_to_image", theirs.recall_at_k(scores, positive, k)),
            ("image_to_text", theirs.recall_at_k(scores.T, positive.T, k)),
        ):
            hits = recall > 0  # theirs is the share of the captions that are found
            assert ours[f"{name}_R@{k}"] == hits.sum().item() / len(hits)
            assert 0.1 < ours[f"{name}_R@{k}"] < 1


@pytest.mark.parametrize("siglip", [False, True])
def test_the_loss_is_open_clips_by_batches_weighted_by_length(siglip):
    from open_clip.loss import ClipLoss, SigLipLoss  # here, so that the processes of other tests start quickly

    image, text, scale, bias = unit(25, 8), unit(25, 8), torch.tensor(14.0), torch.tensor(-10.0)
    theirs, more = (SigLipLoss(), (bias,)) if siglip else (ClipLoss(), ())
    loss = contrastive_loss(image, text, 14.0, -10.0 if siglip else None, siglip, batch_size=10)
    batches = [slice(0, 10), slice(10, 20), slice(20, 25)]
    expected = sum(theirs(image[b], text[b], scale, *more).item() * len(image[b]) for b in batches) / 25
    assert loss == pytest.approx(expected, rel=1e-6)


class TestClassification:
    def test_known_answers(self):
        logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0], [0, 9, 0, 0, 0, 0]])
        assert outcomes(logits, torch.tensor([0, 4, 5, 1])).tolist() == [[0, 0], [4, 0], [5, 0], [0, 1]]

    def test_ties_go_to_the_lower_class(self):
        assert outcomes(torch.zeros(6, 6), torch.arange(6)).tolist() == [[i, 0] for i in range(6)]

    def test_nan_is_never_right(self):
        logits = torch.tensor([[torch.nan] * 3, [torch.nan, 1.0, 0.0], [1.0, torch.nan, 0.0]])
        found = summary(outcomes(logits, torch.tensor([0, 0, 0])), torch.tensor([0, 0, 0]), 3)
        assert found == {"top1": 0, "top5": 1 / 3, "mean_per_class_recall": 0, "num_samples": 3}

    def test_recall_is_that_of_the_classes_that_occur(self):
        target = torch.tensor([0, 0, 0, 0, 1, 1, 3])
        found = torch.tensor([[0, 0], [0, 0], [0, 0], [4, 3], [0, 1], [6, 0], [7, -1]])
        metrics = summary(found, target, 9)  # recalls 3/4, 1/2, 0; class 2 does not occur
        assert metrics["mean_per_class_recall"] == pytest.approx((0.75 + 0.5 + 0) / 3, rel=1e-12)
        assert (metrics["top1"], metrics["top5"]) == (4 / 7, 5 / 7)
