from vreflection.data.template import LATENT_PLACEHOLDER, LVR, expand_assistant_text, expand_user_text


def test_assistant_text_matches_the_reference_and_keeps_its_prefix(golden):
    cases = golden("template.json")["latent"]
    assert cases
    for case in cases:
        num_latents = case["expanded"].count(LVR) // max(1, case["value"].count(LATENT_PLACEHOLDER)) or 1
        prefix = case["value"].partition(LATENT_PLACEHOLDER)[0] if LATENT_PLACEHOLDER in case["value"] else ""
        # The documented difference: the reference drops what stands before the first placeholder.
        expected = prefix + case["expanded"]
        assert expand_assistant_text(case["value"], "latent", num_latents) == expected


def test_user_text_matches_the_reference(golden):
    cases = golden("template.json")["image"]
    assert cases
    for case in cases:
        assert expand_user_text(case["value"]) == case["expanded"]
