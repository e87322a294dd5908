import copy

import numpy as np
import pytest
from PIL import Image


def proportion(correct, n=200):
    value = correct / n
    return {"correct": correct, "n": n, "value": value, "low": value - 0.051, "high": value + 0.043}


def make_arm(key, label, group, correct, **more):
    points = [{"hops": hops, **proportion(correct - 20 * hops)} for hops in range(3)]
    arm = {"key": key, "label": label, "group": group, "steps": 137, "accuracy": proportion(correct), "by_hops": points}
    return {**arm, "seconds_per_step": 0.2, "relative_step_cost": 1.0, "note": None, **more}


def one_token(row, column, weight=1.0):
    heat = np.zeros((4, 4))
    heat[row, column] = weight
    return heat.tolist()


METRICS = {
    "schema": 2,
    "title": "A small report",
    "created": "2025-01-02",
    "environment": {"torch": "2.99.1", "cores": 3},
    "settings": {"seed": 17, "stage1": {"steps": 137, "lr_llm": 1e-3, "milestones": [0.1, 0.5]}, "free_running": True},
    "task": {
        "name": "follow_the_notes",
        "question": "start at the <colour> note",
        "hops": [0, 1, 2],
        "chance": 0.1,
        "guess_in_image": 0.2,
        "uniform_mass": 0.078,
        "visual_tokens": 16,
        "train_images": 1024,
        "train_questions": 2047,
        "test_questions": 201,
    },
    "arms": [
        make_arm("stage2", "Stage two", "latent", 161, seconds_per_step=0.247, relative_step_cost=1.31, note="Noted."),
        make_arm("sft", "Plain tuning", "control", 117),
        make_arm("chain", "In words", "text", 150),
    ],
    "interventions": [
        {
            "key": "own",
            "label": "Own latents",
            "accuracy": proportion(161),
            "by_hops": [{"hops": 0, **proportion(160)}],
        },
        {
            "key": "swapped",
            "label": "Swapped latents",
            "accuracy": proportion(33),
            "by_hops": [{"hops": 0, **proportion(31)}],
        },
    ],
    "looks": [
        {
            "key": "free",
            "label": "Free-running",
            "mass": 0.742,
            "iou": 0.613,
            "n": 199,
            "by_hop": [
                {"mass": 0.812, "iou": 0.5, "uniform": 0.078, "n": 198, "right_box": 0.96},
                {"mass": 0.634, "iou": 0.5, "uniform": 0.078, "n": 197, "right_box": None},
            ],
        }
    ],
    "gauges": [
        {
            "label": "Latents of stage two",
            "std_over_samples": 0.834,
            "query_diversity": 0.645,
            "lvr_end_rate": 0.993,
            "trigger_rate": None,
            "cosine_to_teacher": 0.867,
        }
    ],
    "curves": {
        "sft": [{"step": s, "loss": 4.0 / s, "cross_entropy": 4.0 / s} for s in range(1, 51)],
        "stage2": [{"step": s, "loss": 2.0, "cross_entropy": 1.0, "attention_kl": 20.0 - s / 4} for s in range(1, 41)],
    },
    "timings": [{"phase": "Teaching", "seconds": 42.4}, {"phase": "Asking", "seconds": 30.0}],
    "examples": [
        {
            "id": "test/0",
            "hops": 1,
            "question": "start at the red note , follow 1 times : what digit ?",
            "expected": "7",
            "predicted": "3",
            "correct": False,
            "predicted_swapped": "9",
            "partner_answer": "8",
            "predicted_removed": "4",
            "boxes": [[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]],
            "image": "photo",
            "spans": [[one_token(1, 1, 0.8), one_token(1, 1, 0.4)], [one_token(3, 3, 0.4), one_token(0, 0, 0.4)]],
            "mass_in_box": [0.81, 0.02],
        }
    ],
    "findings": ["Finding one, 58.5 %.", "Finding two says less."],
    "attributions": [
        {
            "name": "china",
            "author": "A. N. Author",
            "licence": "CC BY 2.0",
            "source": "https://example.org/1",
            "split": "train",
        }
    ],
}


@pytest.fixture
def metrics():
    """Small metrics of schema 2, free to be changed by the test."""
    return copy.deepcopy(METRICS)


@pytest.fixture
def images():
    """The photograph that the example refers to."""
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    return {"photo": Image.fromarray(pixels)}
