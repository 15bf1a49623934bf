"""Sentiment of a sentence: the data, the baseline, the network, and what it says of new sentences."""

import pytest
import torch
from making import data_of, figure, is_drawn, make

import nndist
from nndist.config import RunConfig
from nndist.datasets import reviews

NAME = "sentiment_rnn"


def test_the_sentences_are_rated_and_their_source_and_licence_lie_beside_them():
    parts = reviews.load_reviews()
    sizes = {part: len(texts) for part, (texts, _) in parts.items()}
    assert 7900 < sizes["train"] < 8100 and 950 < sizes["val"] < 1050 and 950 < sizes["test"] < 1050
    for _, classes in parts.values():
        assert 0.47 < sum(classes) / len(classes) < 0.53
    texts = [text.lower() for texts, _ in parts.values() for text in texts]
    assert len(set(texts)) == len(texts)  # none is in two parts
    page = reviews.PATH.with_name("movie_reviews.md").read_text()
    assert "MIT License" in page and "vaderSentiment 3.3.2" in page


def test_words_are_those_of_training_and_others_are_unknown():
    assert reviews.words_of("It's GOOD, isn't it?! 'No'") == ["it's", "good", "isn't", "it", "?", "!", "no"]
    words = reviews.vocabulary(["a b b", "b c a"], 2)
    assert words == ["a", "b"]
    tokens, classes, lengths = next(reviews.encoded(["b a c", "..."], [1, 0], words).batches([torch.arange(2)]))
    assert tokens.tolist() == [[3, 2, 1], [1, 0, 0]] and classes.tolist() == [1, 0] and lengths.tolist() == [3, 1]


def test_the_baseline_learns_what_a_word_says():
    words = ["bad", "film", "good"]
    train = reviews.encoded(["good film", "bad film"] * 20, [1, 0] * 20, words)
    test = reviews.encoded(["good", "bad", "good good film"], [1, 0, 1], words)
    assert reviews.bag_of_words(train, test, 3).tolist() == [1, 0, 1]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_padding_changes_no_answer_and_order_does(cell):
    recipe = make(NAME, cell=cell, width=8, hidden=8)
    recipe.data(RunConfig(data_source="sample").data_config(download=False))
    torch.manual_seed(0)
    network = recipe.networks()["model"].eval()
    words = torch.randint(2, 500, (3, 7))
    with torch.no_grad():
        alone = network(words)
        padded = network(torch.cat([words, torch.zeros(3, 4, dtype=torch.int64)], 1))
        turned = network(words.flip(1))
    torch.testing.assert_close(alone, padded)
    assert (alone - turned).abs().max() > 1e-4


def test_fields_that_cannot_be_meant():
    with pytest.raises(nndist.UserError, match="--dropout 1"):
        make(NAME, dropout=1.0)
    with pytest.raises(nndist.UserError, match="--least 0"):
        make(NAME, least=0)


@pytest.mark.nightly
def test_it_learns_and_judges_new_sentences(trained):
    """A smaller network, two epochs."""
    result = trained(NAME, width=16, hidden=8, lr=2e-2, epochs=2, dropout=0.3)
    assert result.scores["test/accuracy"] > 0.65
    assert is_drawn(figure(result, "reading.png")) and "bag of words" in figure(result, "baseline.txt").read_text()
    good, bad = nndist.predict(result, "a beautiful, moving and funny film", "dull, stupid and boring").rows()
    assert good["answer"] == "positive" and bad["answer"] == "negative"
    assert len(data_of(NAME).classes) == 2
