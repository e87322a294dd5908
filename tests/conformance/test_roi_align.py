import pytest
import torch

from vreflection.ops import roi_align


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_forward_and_gradient(golden, impl):
    numbers = golden("roi_align.safetensors")
    for case in golden("roi_align.json"):
        features = numbers[f"{case['case']}.features"].clone().requires_grad_()
        images, width, rows, columns = features.shape
        tokens = features.permute(0, 2, 3, 1).reshape(-1, width)
        rois = numbers[f"{case['case']}.rois"]
        boxes = rois[:, 1:] / torch.tensor([columns, rows, columns, rows], dtype=rois.dtype)
        cells = roi_align(
            tokens, [[rows, columns]] * images, boxes, rois[:, 0].long(),
            case["output_size"], case["sampling_ratio"], case["aligned"], impl=impl,
        )  # fmt: skip
        expected = numbers[f"{case['case']}.output"]
        torch.testing.assert_close(cells.transpose(1, 2).reshape(expected.shape), expected, rtol=0, atol=1e-10)

        cells.backward(numbers[f"{case['case']}.cotangent"].flatten(2).transpose(1, 2))
        gradient = numbers[f"{case['case']}.grad_features"]
        # The reference yields 0/0 where an adaptive grid meets a box of no size; ours is finite everywhere.
        undefined = gradient.isnan()
        assert not undefined.any() or case["sampling_ratio"] == 0
        assert features.grad is not None and features.grad.isfinite().all()
        torch.testing.assert_close(features.grad[~undefined], gradient[~undefined], rtol=0, atol=1e-10)
