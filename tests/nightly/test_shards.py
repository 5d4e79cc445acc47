"""Two processes audit models of other kinds spread over them by night, and the command opens them so."""

import pytest
import torch
import transformers

from distributed import shards
from distributed.test_shards import assert_same_audit, assert_same_check
from nightly.test_two import SIZES, ended
from peelwise.certificate.audit import read_certificate
from tiny_llama import SIZES as SIZES_OF_LLAMA
from tiny_llama import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::peelwise.errors.PeelwiseWarning")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return shards.run(tmp_path_factory.mktemp("shards"), "night")


@pytest.mark.parametrize("name", shards.NAMES["night"])
def test_an_audit_of_a_spread_model_is_that_of_the_whole_one(both, name):
    # In float32 what a change does to an output and to a weight differ, and so does what is rounded to bfloat16.
    exact = name not in shards.IN_FLOAT32
    assert_same_audit([each[name] for each in both], *((1e-5, 1e-5) if exact else (2e-2, 1e-3)))


@pytest.mark.parametrize("name", shards.CHECKED["night"])
def test_a_check_is_that_of_one_process(both, name):
    assert_same_check(both, name, rel=5e-3 if name in shards.IN_FLOAT32 else 5e-4)


@pytest.mark.parametrize("how", [(), ("--stream",)], ids=["in memory", "changes on disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_command_spreads_a_folder_and_its_certificate_holds_in_one_process(tmp_path, run, dtype, how):
    folder = tmp_path / "model"
    tiny_llama().to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    code, out, err = ended("audit", folder, *SIZES, "--shard", *how, "--out", tmp_path / "two")
    assert code == 0, err[-3000:]
    assert out.count("Files are in") == 1
    code, out, _ = run("verify", tmp_path / "two", "--model", folder)
    assert code == 0, out
    assert run("audit", folder, *SIZES, *how, "--out", tmp_path / "one")[0] == 0
    one, both = (read_certificate(tmp_path / which).record for which in ("one", "two"))
    assert both.model == one.model  # the fingerprint among it
    assert [block.verdict for block in one.blocks] == [block.verdict for block in both.blocks]
    for key, value in one.loss.model_dump().items():
        if isinstance(value, float):
            assert getattr(both.loss, key) == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize("how", [(), ("--shard",)], ids=["whole", "spread"])
def test_a_check_is_shared_printed_once_and_holds_in_one_process(tmp_path, run, how):
    folder = tmp_path / "model"
    torch.manual_seed(0)
    sizes = SIZES_OF_LLAMA | {"num_hidden_layers": 6, "intermediate_size": 32, "num_key_value_heads": 1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    code, out, err = ended(
        "check", folder, "--tokens", "1200", "--sequence-length", "32", *how, "--out", tmp_path / "two"
    )
    assert code == 0, err[-3000:]
    assert out.count("Files are in") == 1
    code, out, err = run("verify", tmp_path / "two", "--model", folder)
    assert code == 0, out + err
