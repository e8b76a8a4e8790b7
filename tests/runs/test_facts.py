"""What a run records about its data: inputs of one view or several, and runs of before."""

from __future__ import annotations

from typing import Any

import pytest
from run_cases import facts_of_three_classes, facts_of_vectors

from dml_fast.data import open_dataset
from dml_fast.foreign import Unfit
from dml_fast.models import InputSpec
from dml_fast.models.heads import LINEAR, Head
from dml_fast.runs.facts import DataFacts

IMAGE = (InputSpec("image", (1, 8, 8)),)


def test_facts_of_images_and_of_vectors_come_back() -> None:
    for facts in (facts_of_three_classes(), facts_of_vectors()):
        assert DataFacts.from_json(facts.to_json(), "it") == facts
    images = facts_of_three_classes()
    assert images.to_json()["inputs"] == [{"kind": "image", "shape": [1, 8, 8]}]
    assert (images.in_channels, images.image_size) == (1, (8, 8))
    assert not {"in_channels", "image_size"} & facts_of_vectors().to_json().keys()


def test_runs_of_before_have_no_inputs() -> None:
    found = facts_of_three_classes().to_json()
    del found["inputs"]
    assert DataFacts.from_json(found, "it") == facts_of_three_classes()


@pytest.mark.parametrize("kind", ["linear", "bnneck"])
def test_runs_of_before_have_no_head_but_a_task(kind: Any) -> None:
    facts = facts_of_three_classes(retrieval=kind == "bnneck", head=Head(kind))
    found = facts.to_json()
    assert found.pop("head") == kind and "bits" not in found
    assert DataFacts.from_json(found, "it") == facts


def test_a_code_has_its_length_in_the_facts() -> None:
    for retrieval in (False, True):
        facts = facts_of_three_classes(retrieval=retrieval, head=Head("hash", 12))
        assert (facts.to_json()["head"], facts.to_json()["bits"]) == ("hash", 12)
        assert DataFacts.from_json(facts.to_json(), "it") == facts


def test_student_k_reads_view_k_of_v() -> None:
    facts = facts_of_vectors()
    assert [facts.view_of(k) for k in range(5)] == [0, 1, 2, 0, 1]
    assert [facts.input_of(k).shape for k in range(5)] == [(5,), (3,), (7,), (5,), (3,)]
    assert facts_of_three_classes().input_of(4) == IMAGE[0]


def test_the_data_says_what_it_gives() -> None:
    data = open_dataset("digits")
    assert data.inputs == IMAGE == DataFacts.of(data, LINEAR).inputs


@pytest.mark.parametrize(
    ("facts", "changes"),
    [
        (facts_of_vectors(), {"inputs": []}),
        (facts_of_vectors(), {"inputs": [{"kind": "vector", "shape": [10**9]}]}),
        (facts_of_vectors(), {"mean": [0.5], "std": [0.5]}),
        (facts_of_three_classes(), {"image_size": [8, 9]}),
        (facts_of_three_classes(), {"in_channels": 10**6}),
        (facts_of_three_classes(), {"inputs": [{"kind": "image", "shape": [2, 8, 8]}]}),
        (facts_of_three_classes(), {"head": "round"}),
        (facts_of_three_classes(), {"head": "hash"}),
        (facts_of_three_classes(), {"head": "hash", "bits": 10**9}),
        (facts_of_three_classes(), {"bits": 8}),
        (facts_of_three_classes(), {"task": "retrieval"}),
    ],
)
def test_facts_that_contradict_each_other(facts: DataFacts, changes: dict[str, Any]) -> None:
    with pytest.raises(Unfit):
        DataFacts.from_json(facts.to_json() | changes, "it")


def test_neither_inputs_nor_sizes() -> None:
    found = facts_of_vectors().to_json()
    del found["inputs"]
    with pytest.raises(Unfit, match="it has no in_channels"):
        DataFacts.from_json(found, "it")
