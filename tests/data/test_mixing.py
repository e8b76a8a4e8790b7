"""Mixup and CutMix of batches."""

from __future__ import annotations

import torch

from dml_fast.data.loaders.mixing import mix_inputs, mix_targets
from dml_fast.data.plan import Mix


def test_mixing_equals_a_loop_over_images() -> None:
    inputs, target = torch.rand(5, 3, 6, 7), torch.tensor([0, 2, 1, 2, 0])
    blended, mixed = mix_inputs(inputs, Mix(0.7, None)), mix_targets(target, 3, Mix(0.7, None))
    pasted = mix_inputs(inputs.clone(), Mix(0.9, (1, 2, 4, 7)))
    for k in range(5):
        other = 4 - k
        torch.testing.assert_close(blended[k], 0.7 * inputs[k] + 0.3 * inputs[other])
        expected = 0.7 * torch.eye(3)[target[k]] + 0.3 * torch.eye(3)[target[other]]
        torch.testing.assert_close(mixed[k], expected)
        inside = torch.zeros(6, 7, dtype=torch.bool)
        inside[1:4, 2:7] = True
        torch.testing.assert_close(pasted[k], torch.where(inside, inputs[other], inputs[k]))
