from vreflection.data.boxes import box_to_token_indices, window_token_rects


def test_window_rule_matches_every_golden_case(golden):
    cases = golden("box_tokens.json")
    assert cases
    for case in cases:
        assert box_to_token_indices(case["box"], case["grid_thw"]) == case["token_indices"], case["box"]


def test_vectorised_rectangles_cover_the_golden_tokens(golden):
    cases = golden("box_tokens.json")
    rects = window_token_rects([case["box"] for case in cases], [case["grid_thw"] for case in cases])
    for case, (ty0, ty1, tx0, tx1) in zip(cases, rects.tolist()):
        assert (ty1 - ty0) * (tx1 - tx0) == len(case["token_indices"])
        columns = case["grid_thw"][2] // 2
        if case["token_indices"]:
            assert case["token_indices"][0] == ty0 * columns + tx0
            assert case["token_indices"][-1] == (ty1 - 1) * columns + tx1 - 1
