"""The positive control: planted tasks of a small network are learned in steps, and found by their
gradients."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import parity
from fulcrum.mechanism import clusters


@pytest.fixture(scope="module")
def trained() -> parity.Trained:
    return parity.train(
        parity.Toy(tasks=6, bits=10, hidden=96, batch=512, steps=800, learning_rate=0.01)
    )


def test_answers_are_parities_of_the_tasks_bits(trained: parity.Trained) -> None:
    source = trained.source
    inputs, answers = source.samples(torch.tensor([0, 3, 5]))
    assert inputs[:, :6].argmax(dim=1).tolist() == [0, 3, 5]
    assert inputs[:, :6].sum(dim=1).tolist() == [source.toy.control] * 3
    for task, row, answer in zip((0, 3, 5), inputs[:, 6:], answers, strict=True):
        assert int((row[source.subsets[task]] > 0).sum()) % 2 == answer
    assert len({tuple(subset.tolist()) for subset in source.subsets}) == 6


def test_frequencies_follow_the_power_law() -> None:
    frequencies = parity.Toy(tasks=4).frequencies
    assert frequencies.sum() == pytest.approx(1)
    np.testing.assert_allclose(frequencies[0] / frequencies, np.arange(1, 5) ** 1.4)


def test_tasks_are_learned_in_steps(trained: parity.Trained) -> None:
    found = parity.shape(trained)
    assert trained.losses[:, -1].max() < parity.LEARNED
    assert np.nanmedian(found.octaves) < found.octaves_mean
    assert parity._order(found.halves) > 0.7


def test_gradients_are_those_of_autograd(trained: parity.Trained) -> None:
    taken = parity.items(trained, 30)
    source, network = trained.source, trained.network
    source.random.manual_seed(9)
    tasks = source.tasks(30)
    inputs, answers = source.samples(tasks)
    source.random.manual_seed(9)
    taken = parity.items(trained, 30)
    learned = cross_entropy(network(inputs), answers, reduction="none") < parity.LEARNED
    assert taken.drawn == 30
    assert len(taken.tasks) == int(learned.sum())
    network.zero_grad()
    first = int(learned.nonzero()[0])
    torch.autograd.backward(
        cross_entropy(network(inputs[first : first + 1]), answers[first : first + 1])
    )
    weight, bias, last, ends = (parameter.grad for parameter in network.parameters())
    assert all(gradient is not None for gradient in (weight, bias, last, ends))
    own = torch.cat(
        [
            torch.cat([weight, bias[:, None]], 1).flatten(),
            torch.cat([last, ends[:, None]], 1).flatten(),
        ]
    ).numpy()
    cosine = own @ taken.of_loss[0] / np.linalg.norm(own) / np.linalg.norm(taken.of_loss[0])
    assert cosine == pytest.approx(1, abs=1e-4)


def test_the_tasks_are_found_and_how_many_they_are(trained: parity.Trained) -> None:
    taken = parity.items(trained, 700)
    found = clusters.find(taken.gradients, draws=5)
    assert found.k == 6
    assert parity.agreement(found, taken.tasks) >= 0.9


def test_gradients_of_the_loss_are_opposite_for_opposite_answers(trained: parity.Trained) -> None:
    taken = parity.items(trained, 300)
    pairs = clusters.affinity(taken.of_loss)
    task, answer = (side[:, None] == side for side in (taken.tasks, taken.answers))
    assert pairs[task & answer].mean() > 0.6
    assert pairs[task & ~answer].mean() < 0.4
