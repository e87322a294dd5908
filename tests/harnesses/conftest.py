"""A checkpoint whose answer to every question is known: a latent span, then a text of one's choice."""

import pytest
import torch


@pytest.fixture(scope="session")
def saying(tiny, tmp_path_factory):
    """`saying("\\n<answer>", " B", " </answer>")`: the folder of a model that opens a span and then says these pieces.

    Each piece is a token of its own, and no layer adds to the residual stream, so that the last token alone decides
    the next one; a slot consumes what `<|lvr_start|>` left behind. The pieces must differ.
    """

    def write(*pieces):
        from tokenizers import AddedToken
        from transformers import GenerationConfig

        processor = tiny.processor()
        processor.tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
        chain = [tiny.LVR_START, tiny.LVR_END, *processor.tokenizer.convert_tokens_to_ids(list(pieces)), tiny.EOS]
        model = tiny.model("stage2")
        layers = model.model.language_model.layers
        with torch.no_grad():
            for layer in layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.model.language_model.norm.weight.fill_(1.0)
            embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
            embeddings.zero_(), head.zero_()
            embeddings[:, 0] = 1.0
            head[tiny.LVR_START, 0] = 1.0
            for place, (token, following) in enumerate(zip(chain, chain[1:], strict=False), start=1):
                embeddings[token, 0], embeddings[token, place] = 0.0, 1.0
                head[following, place] = 1.0
        model.generation_config = GenerationConfig(eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
        folder = tmp_path_factory.mktemp("saying") / "model"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return write
